"""How pressed a node is, by ORCA: in trailers and out of band, read by grpcio with stubs of its own."""

import base64
import hashlib
import json
import subprocess
import threading
import time
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from nodes import BINARY, LONG, ROOT, Node, SimEngine, text_input, wait_for, wait_for_peers
from tritonclient.grpc import service_pb2, service_pb2_grpc
from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2, orca_pb2_grpc

SLOTS = 4
STEP_S = 0.01
FIGURES = {
    "isobar.in_flight", "isobar.queued", "isobar.slots", "isobar.service_time_s",
    "isobar.step_time_s", "isobar.drain_rate_per_s",
}


class Pair:
    """An engine with four slots behind b, and a, which has none."""

    def __init__(self, directory):
        self.started = []
        ca = directory / "ca"
        sim = self.keep(SimEngine(directory, "gpu", slots=SLOTS, queue=0, step="10ms"))
        self.b = self.keep(Node(directory / "b", "b", "us", ca, [sim.engine(slots=SLOTS)]))
        self.a = self.keep(Node(directory / "a", "a", "eu", ca, peers=[self.b]))
        wait_for_peers(self.a, self.b)

    def keep(self, process):
        self.started.append(process)
        return process


@pytest.fixture
def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    for process in reversed(pair.started):
        process.kill()


def channel(address, node, identity=None):
    roots = node.ca.read_bytes()
    own = (None, None)
    if identity:
        own = ((identity / "key.pem").read_bytes(), (identity / "cert.pem").read_bytes())
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots, *own))


def asked(interval_s):
    interval = Duration(seconds=int(interval_s), nanos=int(interval_s % 1 * 1e9))
    return orca_pb2.OrcaLoadReportRequest(report_interval=interval)


@contextmanager
def reports(open_channel, interval_s=0.1):
    """The reports of a stream, as they come, each with when it did; behind them how the stream ended."""
    stream = orca_pb2_grpc.OpenRcaServiceStub(open_channel).StreamCoreMetrics(asked(interval_s))
    said = []

    def listen():
        try:
            for report in stream:
                said.append((time.monotonic(), report))
            said.append((time.monotonic(), stream.code()))
        except grpc.RpcError as error:
            said.append((time.monotonic(), error.code()))

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield said
    finally:
        stream.cancel()
        listener.join(LONG)


def stream(stub, tokens):
    """A streamed answer of so many tokens."""
    request = service_pb2.ModelInferRequest(model_name="sim")
    request.parameters["max_tokens"].int64_param = tokens
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hello")
    call = stub.ModelStreamInfer(iter([request]), timeout=LONG)
    assert len(list(call)) == tokens


def ended(node, tokens, *flags):
    """Exit code and trailers of such a call: gRPC's own libraries keep the report in them to themselves."""
    at = ["call", node.clients, "--ca", node.ca, "--json", *flags]
    method = "inference.GRPCInferenceService/ModelStreamInfer"
    done = subprocess.run(
        [BINARY, *at, method, "-d", json.dumps(text_input("hello", tokens))],
        capture_output=True, text=True, timeout=LONG,
    )
    return done.returncode, json.loads(done.stdout)["calls"][0]["trailers"]


def trailer(node, tokens):
    """The report in the trailers of such a call."""
    code, trailers = ended(node, tokens)
    assert code == 0
    [encoded] = trailers["endpoint-load-metrics-bin"]
    padded = encoded + "=" * (-len(encoded) % 4)
    return orca_load_report_pb2.OrcaLoadReport.FromString(base64.b64decode(padded))


def latest(said):
    return said[-1][1] if said else None


def test_a_stream_of_reports_says_how_utilisation_rises_and_what_the_trailers_say(pair):
    with channel(pair.a.clients, pair.a) as load, channel(pair.a.clients, pair.a) as beside:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(load)
        with reports(beside) as said:
            wait_for("the first report", lambda: said)
            assert latest(said).application_utilization == 0
            callers = [threading.Thread(target=stream, args=(stub, 300)) for _ in range(3)]
            for caller in callers:
                caller.start()
            wait_for("utilisation", lambda: latest(said).application_utilization == 3 / SLOTS)
            busy = latest(said)
            assert busy.named_metrics["isobar.in_flight"] == 3
            assert busy.named_metrics["isobar.slots"] == SLOTS
            # The engine says itself how full it is, in the trailers of a call that ends meanwhile.
            in_trailer = trailer(pair.a, 3)
            assert set(in_trailer.named_metrics) >= {"isobar.in_flight", "isobar.slots"}
            wait_for("what the engine says", lambda: latest(said).utilization)
            assert latest(said).utilization["kv_cache_utilization"] == 3 / SLOTS
            for caller in callers:
                caller.join(LONG)
            wait_for("an idle engine", lambda: latest(said).application_utilization == 0)
            quiet = wait_for("all figures", lambda: figures(latest(said)))
        last = trailer(pair.a, 3)
        assert set(last.named_metrics) == FIGURES
        assert last.named_metrics["isobar.slots"] == quiet["isobar.slots"] == SLOTS
        assert last.named_metrics["isobar.queued"] == quiet["isobar.queued"] == 0
        # A step takes 10 ms alone and up to 20 ms in a full batch; the machine adds what it likes.
        for step in (last.named_metrics["isobar.step_time_s"], quiet["isobar.step_time_s"]):
            assert 0.9 * STEP_S < step < 10 * STEP_S
        assert last.named_metrics["isobar.drain_rate_per_s"] == last.rps_fractional


def figures(report):
    return dict(report.named_metrics) if set(report.named_metrics) == FIGURES else None


def test_reports_come_at_the_interval_and_end_with_the_node(pair):
    with channel(pair.a.clients, pair.a) as open_channel, reports(open_channel, 0.5) as said:
        wait_for("five reports", lambda: len(said) >= 5)
        gaps = [after - before for (before, _), (after, _) in zip(said, said[1:], strict=False)]
        assert sum(gaps) / len(gaps) >= 0.45, gaps
        assert pair.a.stop() == 0
        wait_for("the end", lambda: said[-1][1] is grpc.StatusCode.OK)


def test_a_node_tells_peers_of_its_own_engines_and_strangers_nothing(pair):
    identity = pair.b.ca.parent / "nodes" / "eu" / "a"
    with channel(pair.b.peers, pair.b, identity) as peers, reports(peers) as said:
        wait_for("a report", lambda: said)
        assert said[0][1].named_metrics["isobar.slots"] == SLOTS
    key = "a key of the team that searches"
    digest = hashlib.sha256(key.encode()).hexdigest()
    tenant = {"name": "search", "api_key_sha256": [digest]}
    c = pair.keep(
        Node(pair.a.made_with[0].parent / "c", "c", "eu", pair.a.made_with[3], tenants=[tenant])
    )
    with channel(c.clients, c) as open_channel:
        stub = orca_pb2_grpc.OpenRcaServiceStub(open_channel)
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.StreamCoreMetrics(asked(1), timeout=LONG))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        known = stub.StreamCoreMetrics(asked(1), timeout=LONG, metadata=[("x-api-key", key)])
        assert next(known).application_utilization == 0
        known.cancel()
    # A refusal says as much to who is known, and no more than why to who is not.
    proto = ("--proto", ROOT / "proto/inference/grpc_service.proto", "-I", ROOT / "proto")
    for flags, may_know in ((proto, False), ((*proto, "-H", f"x-api-key: {key}"), True)):
        code, trailers = ended(c, 3, *flags)
        assert code == 1
        assert ("endpoint-load-metrics-bin" in trailers) == may_know, trailers
