"""`isobar bench`: what it counts, and that it agrees with h2load."""

import json
import re
import signal
import statistics
import subprocess
import threading
import time

import pytest
from nodes import BINARY, LONG, SimEngine, free_port, text_input

KSERVE = "inference.GRPCInferenceService"
READY = f"{KSERVE}/ServerReady"


@pytest.fixture
def sim(tmp_path):
    engine = SimEngine(tmp_path, slots=8)
    yield engine
    engine.kill()


def bench(*arguments):
    """The result, and the exit code."""
    done = subprocess.run(
        [BINARY, "bench", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=2 * LONG,
    )
    return (json.loads(done.stdout) if done.stdout else done.stderr), done.returncode


def h2load(address, path, body, calls, at_once, directory):
    """Calls per second of h2load, whose calls must all have succeeded as far as HTTP goes."""
    data = directory / "body"
    data.write_bytes(b"\0" + len(body).to_bytes(4, "big") + body)
    done = subprocess.run(
        ["h2load", "-n", str(calls), "-c", "1", "-m", str(at_once), "-d", data,
         "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}/{path}"],
        capture_output=True, text=True, timeout=2 * LONG,
    )
    assert f"{calls} succeeded" in done.stdout, done.stdout + done.stderr
    return float(re.search(r"([\d.]+) req/s", done.stdout)[1])


def test_it_agrees_with_h2load_within_a_tenth(sim, tmp_path):
    # Eight slots and eight calls at a time: the engine's steps set the pace, whatever else the machine does.
    request = text_input("hello", 10)
    tensor = b"\x0a\x0atext_input\x12\x05BYTES\x1a\x01\x01\x2a\x07\x42\x05hello"
    message = b"\x0a\x03sim\x22\x10\x0a\x0amax_tokens\x12\x02\x10\x0a\x2a" + bytes([len(tensor)]) + tensor
    ours, theirs = [], []
    for _ in range(3):
        theirs.append(h2load(sim.address, f"{KSERVE}/ModelInfer", message, 400, 8, tmp_path))
        found, code = bench(
            f"http://{sim.address}", f"{KSERVE}/ModelInfer", "-d", json.dumps(request),
            "--concurrency", 8, "--calls", 400,
        )
        assert code == 0 and (found["ok"], found["protocol"]) == (400, "h2c")
        ours.append(found["rate"])
    ratio = statistics.median(ours) / statistics.median(theirs)
    assert 0.9 < ratio < 1.1, (ours, theirs)


def test_an_open_loop_charges_a_stall_to_everybody_it_kept_waiting(sim):
    def stall():
        time.sleep(1)
        sim.inject("hang")
        time.sleep(1.5)
        sim.inject("heal")

    stalling = threading.Thread(target=stall)
    stalling.start()
    found, code = bench(f"http://{sim.address}", READY, "--rate", 100, "--duration", "4s")
    stalling.join()
    assert code == 0 and found["loop"] == "open" and found["ok"] == found["calls"] > 300
    latency = found["latency_s"]
    # 1.5 of 4 s: more than a third of the calls waited, the first of them all of it.
    assert latency["max"] > 1.3 and latency["p90"] > 0.7, latency


def test_refusals_and_wrong_answers_are_counted_and_fail_the_bench(sim):
    found, code = bench(f"http://{sim.address}", READY, "--calls", 50, "--expect", '{"ready": true}')
    assert code == 0 and found["ok"] == 50
    found, code = bench(f"http://{sim.address}", READY, "--calls", 50, "--expect", '{"ready": false}')
    assert code == 1 and (found["ok"], found["wrong"]) == (0, 50) and "ready" in found["first_wrong"]
    # Not ready: an empty message on the wire.
    method, name = f"{KSERVE}/ModelReady", '{"name": "nope"}'
    for expect in ('{"ready": true}', '{"Ready": true}'):
        found, code = bench(f"http://{sim.address}", method, "-d", name, "--calls", 5, "--expect", expect)
        assert code == 2 if "R" in expect else (code, found["wrong"]) == (1, 5), found
    sim.inject("refuse")
    request = json.dumps(text_input("hello", 1))
    found, code = bench(f"http://{sim.address}", f"{KSERVE}/ModelInfer", "-d", request, "--calls", 50)
    assert code == 1 and found["failed"] == {"RESOURCE_EXHAUSTED": 50}
    assert found["latency_s"] is None, "a fast refusal is no latency"


def test_streams_have_a_first_message_and_more_calls_than_may_be_open_are_not_made(sim):
    request = json.dumps(text_input("hello", 20))
    method = f"{KSERVE}/ModelStreamInfer"
    found, code = bench(f"http://{sim.address}", method, "-d", request, "--calls", 20, "--concurrency", 4)
    assert code == 0 and found["messages"] == 400
    assert found["first_message_s"]["p50"] < found["latency_s"]["p50"]
    wrong = json.dumps(text_input("hello", 20, "nobody"))
    found, code = bench(f"http://{sim.address}", method, "-d", wrong, "--calls", 3)
    assert code == 1 and found["wrong"] == 3 and "error in the stream" in found["first_wrong"]
    found, code = bench(
        f"http://{sim.address}", method, "-d", request,
        "--rate", 200, "--duration", "1s", "--in-flight-max", 2,
    )
    assert code == 1 and found["not_made"] > 50
    assert found["calls"] + found["not_made"] > 150


@pytest.mark.parametrize("options", [("--concurrency", 4), ("--rate", 50)])
def test_an_openai_server_is_loaded_over_http(sim, options):
    for stream in (True, False):
        message = {"role": "user", "content": "hi"}
        body = {"model": "sim", "stream": stream, "max_tokens": 5, "messages": [message]}
        found, code = bench(
            f"http://{sim.listen['http']}", "/v1/chat/completions", "-d", json.dumps(body),
            *options, "--calls", 40,
        )
        assert code == 0 and (found["ok"], found["protocol"]) == (40, "http/1.1"), found
        assert found["messages"] == (200 if stream else 40)
    sim.inject("refuse")
    found, code = bench(
        f"http://{sim.listen['http']}", "/v1/chat/completions", "-d", json.dumps(body), "--calls", 5
    )
    assert code == 1 and found["failed"] == {"503": 5}


def test_a_mesh_is_loaded_over_h2_and_h3_by_several_threads(mesh, sim):
    a = mesh.node("a", "eu", engines=[sim.engine()])
    for options in ([], ["--h3"]):
        found, code = bench(
            a.clients, "--ca", a.ca, *options, READY,
            "--calls", 300, "--concurrency", 6, "--threads", 2, "--connections", 3,
        )
        assert code == 0 and found["ok"] == 300, found
        assert found["protocol"] == ("h3" if options else "h2")
        assert found["served_by"] == {"a.eu/sim": 300}
        assert 0 < found["client_cpu_s_per_call"] < 1


def test_bad_input_is_said(sim):
    address = f"http://{sim.address}"
    for arguments, code, wanted in [
        ((address, READY, "--rate", "0"), 2, "calls per second"),
        ((address, READY, "--duration", "500000000000years"), 2, "a year at most"),
        ((address, READY, "--expect", '{"redy": true}'), 2, "redy"),
        ((address, READY, "--ca", "x"), 2, "TLS"),
        ((address, READY, "--rate", "1", "--concurrency", "2"), 2, "cannot be used"),
        ((address, READY, "--threads", "2"), 2, "--connections"),
        ((address, READY, "-d", "["), 2, "JSON"),
        ((address, READY, "--expect", "{"), 2, "not JSON"),
        ((address, f"{KSERVE}/Nope"), 2, "no method"),
        ((f"http://127.0.0.1:{free_port()}", READY), 1, "refused"),
        ((address, "/v1/models", "-d", "{"), 2, "not JSON"),
        ((address, "/v1/models", "--expect", "{}"), 2, "--expect is for gRPC"),
        ((f"https://{sim.address}", READY, "--plaintext"), 2, "leave out --plaintext"),
        ((address, READY, "--in-flight-max", "0"), 2, "--in-flight-max"),
    ]:
        found, found_code = bench(*arguments)
        assert found_code == code and wanted in found, (arguments, found)


def test_a_bench_that_is_interrupted_says_what_it_measured_until_then(sim):
    started = subprocess.Popen(
        [BINARY, "bench", f"http://{sim.address}", READY, "--rate", "50", "--duration", "60s", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    time.sleep(2)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=LONG)
    found = json.loads(out)
    assert started.returncode == 1 and "stopped before its end" in err
    assert found["cut_short"] and 10 < found["ok"] < 200


def test_connections_are_opened_before_the_time_counts(mesh, sim):
    a = mesh.node("a", "eu", engines=[sim.engine()])
    found, code = bench(
        a.clients, "--ca", a.ca, READY, "--connections", 50, "--rate", 50, "--duration", "2s",
        "--arrivals", "even",
    )
    assert code == 0 and 90 < found["ok"] <= 100, found
    assert found["duration_s"] < 10
