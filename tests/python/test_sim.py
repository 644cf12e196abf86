"""The simulated GPU server, asked by other people's clients: tritonclient, grpcio, plain HTTP, a Prometheus parser."""

import json
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from nodes import LONG, SimEngine, wait_for
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

GRPCURL = Path(sys.executable).with_name("grpcurl")


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    engine = SimEngine(tmp_path_factory.mktemp("sim"))
    yield engine
    engine.stop()


@pytest.fixture
def own_sim(tmp_path):
    """One for a test that breaks it: two slots, a queue of one."""
    engine = SimEngine(tmp_path, slots=2, queue=1, step="20ms")
    yield engine
    engine.kill()


def tensor(prompt):
    wanted = triton.InferInput("text_input", [1], "BYTES")
    wanted.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    return [wanted]


def infer(engine, prompt="hello", tokens=5, **options):
    with triton.InferenceServerClient(engine.address) as client:
        reply = client.infer(engine.model, tensor(prompt), parameters={"max_tokens": tokens}, **options)
        return reply.as_numpy("text_output")[0].decode()


def test_tritonclient_finds_the_model_ready_and_gets_as_many_tokens_as_it_asks_for(sim):
    with triton.InferenceServerClient(sim.address) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("sim")
        names = [tensor.name for tensor in client.get_model_metadata("sim").inputs]
        assert "text_input" in names
    text = infer(sim, tokens=7)
    assert len(text.split()) == 7
    assert text == infer(sim, tokens=7), "the same prompt is answered in the same words"
    assert text != infer(sim, "something else", tokens=7)


def test_a_stream_of_tritonclient_brings_the_same_words_one_by_one(sim):
    answers = queue.Queue()
    with triton.InferenceServerClient(sim.address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for request in range(2):
            client.async_stream_infer(
                "sim", tensor("hello"), request_id=str(request), parameters={"max_tokens": 6}
            )
        words = {}
        while sum(len(tokens) for tokens in words.values()) < 12:
            result, error = answers.get(timeout=LONG)
            assert error is None
            text = result.as_numpy("text_output")[0].decode()
            words.setdefault(result.get_response().id, []).append(text)
        client.stop_stream()
    assert ["".join(tokens) for tokens in words.values()] == [infer(sim, tokens=6)] * 2


def test_bad_requests_say_what_is_expected(sim):
    with triton.InferenceServerClient(sim.address) as client:
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.infer("other", tensor("x"))
        wrong = triton.InferInput("image", [1], "FP32")
        wrong.set_data_from_numpy(np.zeros(1, dtype=np.float32))
        with pytest.raises(InferenceServerException, match="text_input"):
            client.infer("sim", [wrong])
        assert not client.is_model_ready("other")


def test_a_bad_first_request_of_a_stream_of_tritonclient_leaves_it_alive(sim):
    answers = queue.Queue()
    with triton.InferenceServerClient(sim.address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for model in ("other", "sim"):
            client.async_stream_infer(model, tensor("hello"), parameters={"max_tokens": 1})
        _, error = answers.get(timeout=LONG)
        assert "ask for `sim`" in str(error)
        result, error = answers.get(timeout=LONG)
        assert error is None and result.as_numpy("text_output")[0]
        client.stop_stream()


def chat(**more):
    message = {"role": "user", "content": "tell me"}
    return {"model": "sim", "messages": [message], "max_tokens": 5, **more}


def test_chat_completions_stream_as_server_sent_events(sim):
    status, body = sim.http("/v1/chat/completions", chat(stream=True))
    assert status == 200
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[-1]["finish_reason"] == "length"
    streamed = "".join(choice["delta"].get("content") or "" for choice in choices)
    status, body = sim.http("/v1/chat/completions", chat())
    whole = json.loads(body)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": streamed}
    assert whole["usage"]["completion_tokens"] == 5
    assert len(streamed.split()) == 5


def test_http_errors_have_the_shape_of_openai(sim):
    for body, status in [(chat(model="other"), 404), ({"messages": 1}, 400)]:
        found, said = sim.http("/v1/chat/completions", body)
        assert found == status and json.loads(said)["error"]["message"], said
    assert sim.http("/v1/models")[0] == 200
    assert json.loads(sim.http("/v1/models")[1])["data"][0]["id"] == "sim"


def test_metrics_are_those_of_vllm(sim):
    before = infer(sim, "count these words", tokens=9)
    assert before
    status, page = sim.http("/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        sample = families[f"vllm:{name}"].samples[0]
        assert sample.labels == {"engine": "0", "model_name": "sim"}
    for name in ("generation_tokens", "prompt_tokens", "request_success"):
        family = families[f"vllm:{name}"]
        assert family.type == "counter"
        assert sum(sample.value for sample in family.samples) > 0, name
    assert "vllm:time_to_first_token_seconds" in families


def test_a_full_server_is_busy_and_says_when_to_come_back(own_sim):
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(infer, own_sim, f"call {n}", 60) for n in range(8)]
        outcomes = [call.exception(LONG) for call in calls]
    failed = [error for error in outcomes if error]
    assert len(failed) == 5, "two run, one waits"
    assert all("RESOURCE_EXHAUSTED" in str(error) for error in failed)
    own_sim.inject("refuse")
    status, said = own_sim.http("/v1/chat/completions", chat())
    assert status == 503 and "error" in json.loads(said)
    own_sim.inject("heal")
    assert infer(own_sim)


def test_a_call_that_is_given_up_frees_its_slot(own_sim):
    def running():
        return json.loads(own_sim.http("/", address=own_sim.listen["admin"])[1])["running"]

    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(infer, own_sim, f"long {n}", 5_000, client_timeout=1.0) for n in range(2)
        ]
        wait_for("both slots", lambda: running() == 2)
        assert all(call.exception(LONG) for call in calls)
    wait_for("free slots", lambda: running() == 0)


def test_a_hung_server_answers_nobody_but_its_admin_and_heals(own_sim):
    own_sim.inject("hang")
    with triton.InferenceServerClient(own_sim.address) as client:
        with pytest.raises(InferenceServerException):
            client.is_server_ready(client_timeout=0.5)
    own_sim.inject("heal")
    assert infer(own_sim)


def test_a_slow_server_is_slow_and_one_that_dies_is_gone(own_sim):
    own_sim.inject("slow?factor=10")
    began = time.monotonic()
    infer(own_sim, tokens=3)
    # Three steps, of which the first takes in the prompt, 20 ms each and ten times as slow.
    assert time.monotonic() - began > 0.6
    try:
        own_sim.inject("die")
    except OSError:
        pass
    assert own_sim.popen.wait(LONG) != 0


def grpcurl(*arguments):
    return subprocess.run([GRPCURL, *arguments], capture_output=True, text=True, timeout=LONG)


def test_grpcurl_and_the_health_protocol_work_on_it(sim):
    listed = grpcurl("-plaintext", sim.address, "list")
    assert "inference.GRPCInferenceService" in listed.stdout.splitlines(), listed.stderr
    checked = grpcurl("-plaintext", sim.address, "grpc.health.v1.Health/Check")
    assert json.loads(checked.stdout) == {"status": "SERVING"}
    with grpc.insecure_channel(sim.address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as failed:
            check(b"\x0a\x04nope", timeout=LONG)
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND
