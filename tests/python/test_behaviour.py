"""How nodes behave when nothing is broken, or little: load told to peers and clients, room, refusals, records, drain."""

import asyncio
import base64
import json
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import grpc
import pytest
from faults import Relay
from h3 import connected
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc
from nodes import LONG, MLServer, wait_for, wait_for_peers
from xds.data.orca.v3 import orca_load_report_pb2 as orca

METHOD = "/isobar.test.v1.Kinds/Unary"


def open_channel(node, **options):
    credentials = grpc.ssl_channel_credentials(node.ca.read_bytes())
    return grpc.secure_channel(node.clients, credentials, list(options.items()))


def stub_at(node):
    return kinds_pb2_grpc.KindsStub(open_channel(node))


def pair(mesh, **engine):
    """a, which has no engine, and b, which has one."""
    service = mesh.service("engine")
    b = mesh.node("b", "us", engines=[service.engine(**engine)])
    a = mesh.node("a", "eu", peers=[b])
    wait_for_peers(a, b)
    return a, b, service


async def report(client, method, message):
    """The ORCA report of a call over HTTP/3: gRPC's own libraries keep it to themselves."""
    call, _, status, _ = await client.unary(f"/isobar.test.v1.Kinds/{method}", message.SerializeToString())
    last = call.trailers if call.trailers is not None else call.headers
    encoded = last["endpoint-load-metrics-bin"]
    padded = encoded + "=" * (-len(encoded) % 4)
    return status, orca.OrcaLoadReport.FromString(base64.b64decode(padded))


def probe(address, path, context=None):
    scheme = "https" if context else "http"
    try:
        with urllib.request.urlopen(f"{scheme}://{address}{path}", timeout=LONG, context=context) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_every_reply_says_how_pressed_the_node_is(mesh):
    a, b, _ = pair(mesh, slots=4)
    stub = stub_at(a)
    held = [stub.Unary.future(pb.Request(delay_ms=60_000)) for _ in range(2)]
    gauge = 'isobar_engine_calls_in_flight{engine="engine"}'
    wait_for("two calls", lambda: b.metric(gauge) == 2)
    # The next frame has told a.
    time.sleep(0.5)

    async def test():
        for node in (a, b):
            async with connected(node.clients, node.ca) as client:
                status, said = await report(client, "Unary", pb.Request())
                assert status == 0 and 0.4 <= said.application_utilization <= 0.8, said
                assert said.named_metrics["isobar.slots"] == 4, said
                assert 2 <= said.named_metrics["isobar.in_flight"] <= 3, said
                status, said = await report(client, "Unary", pb.Request(fail_code=5))
                assert status == 5 and said.application_utilization >= 0.4, said
                status, said = await report(client, "ServerStream", pb.StreamRequest(count=3))
                assert status == 0 and said.application_utilization >= 0.4, said

    asyncio.run(asyncio.wait_for(test(), LONG))
    for call in held:
        call.cancel()


def test_a_full_mesh_refuses_with_who_why_and_when_to_come_back(mesh):
    a, b, _ = pair(mesh, slots=1)
    stub = stub_at(a)
    held = stub.Unary.future(pb.Request(delay_ms=60_000))
    wait_for("the call", lambda: b.metric('isobar_engine_calls_in_flight{engine="engine"}') == 1)

    def refused():
        try:
            stub.Unary(pb.Request(), timeout=LONG)
        except grpc.RpcError as error:
            return error
        return None

    error = wait_for("a refusal", refused)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "isobar node" in error.details() and "every slot" in error.details()
    trailers = dict(error.trailing_metadata())
    assert 50 <= int(trailers["grpc-retry-pushback-ms"]) <= 10_000
    assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
    assert trailers["x-isobar-flags"] == "refused, full"
    refusals = 'isobar_calls_refused_total{side="%s",reason="full"}'
    wait_for("the books", lambda: a.metric(refusals % "ingress") + b.metric(refusals % "egress") >= 1)
    # Neither the engine nor the peer is thought broken for it.
    assert a.metric('isobar_peer_ejected{peer="b",region="us"}') == 0
    assert b.metric('isobar_engine_ejected{engine="engine"}') == 0

    status, body = a.get(f"/room?method={METHOD}")
    assert status == 503 and json.loads(body)["reason"] == "full"
    held.cancel()
    wait_for("room", lambda: json.loads(a.get(f"/room?method={METHOD}")[1]).get("free_slots") == 1)
    wait_for("a call that is not refused", lambda: refused() is None)


def test_room_is_asked_by_model_and_bad_questions_are_explained(mesh):
    a, _, _ = pair(mesh)
    assert a.get("/room")[0] == 400
    assert a.get("/room?model=")[0] == 400
    assert a.get("/room?method=foo")[0] == 400
    status, body = a.get("/room?model=nobody%2Fhas-it")
    # An engine that lists no models may have any.
    assert status == 200, body
    assert a.get("/room?method=/p.S/M")[0] == 200


def test_probes_are_answered_on_every_port_over_http1_and_grpc_is_not(mesh):
    service = mesh.service("engine")
    node = mesh.node("a", "eu", engines=[service.engine()], plaintext=True)
    context = ssl.create_default_context(cafile=node.ca)
    assert probe(node.clients, f"/room?method={'x' * 600}", context)[0] == 400
    for address, tls in ((node.clients, context), (node.plaintext, None), (node.metrics_address, None)):
        assert probe(address, "/livez", tls) == (200, "ok\n")
        assert probe(address, "/readyz", tls) == (200, "ok\n")
        assert probe(address, f"/room?method={METHOD}", tls)[0] == 200
    assert probe(node.clients, "/", context)[0] == 415
    request = urllib.request.Request(
        f"http://{node.plaintext}{METHOD}", b"", {"content-type": "application/grpc"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=LONG)
    assert caught.value.code == 426 and "HTTP/2" in caught.value.read().decode()
    # Nobody cancelled anything.
    wait_for("the books", lambda: node.metric('isobar_calls_total{side="ingress",code="UNKNOWN"}') == 2)
    assert node.metric('isobar_calls_total{side="ingress",code="CANCELLED"}') == 0


def test_a_peer_without_a_gossip_address_is_still_called(mesh):
    service = mesh.service("engine")
    b = mesh.node("b", "us", engines=[service.engine()])
    listed = b.as_peer()
    del listed["gossip"]
    a = mesh.node("a", "eu", peers=[listed])
    assert stub_at(a).Unary(pb.Request(text="x"), timeout=LONG).text == "x"


def test_a_peer_without_a_gossip_address_that_restarts_is_called_again(mesh):
    service = mesh.service("engine")
    b = mesh.node("b", "us", engines=[service.engine()])
    listed = b.as_peer()
    del listed["gossip"]
    a = mesh.node("a", "eu", peers=[listed])
    stub = stub_at(a)
    stub.Unary(pb.Request(), timeout=LONG)
    b.kill()

    def outcome():
        try:
            stub.Unary(pb.Request(), timeout=LONG)
        except grpc.RpcError as error:
            return error.code()
        return None

    for _ in range(5):
        assert outcome() == grpc.StatusCode.UNAVAILABLE, "it may be there again: not NOT_FOUND"
    mesh.again(b)
    wait_for("calls", lambda: outcome() is None, 10)


def test_where_udp_is_blocked_every_kind_of_call_crosses_over_tcp(mesh):
    """The peer's port is reached through a relay that carries TCP and no UDP."""
    service = mesh.service("engine")
    b = mesh.node("b", "us", engines=[service.engine(slots=8)])
    relay = mesh.keep(Relay(b.peers))
    a = mesh.node("a", "eu", peers=[b.as_peer() | {"peers": relay.address}])
    wait_for_peers(a, b)
    stub = stub_at(a)
    assert stub.Unary(pb.Request(text="x"), timeout=LONG).text == "x"
    requests = [pb.Request(text=text) for text in "abc"]
    assert stub.ClientStream(iter(requests), timeout=LONG).text == "abc"
    assert [r.text for r in stub.Bidi(iter(requests), timeout=LONG)] == list("abc")
    stream = stub.ServerStream(pb.StreamRequest(count=100), timeout=LONG)
    assert len(list(stream)) == 100
    assert b.metric('isobar_calls_total{side="egress",code="OK"}') == 4


def test_a_call_is_started_three_times_at_most_however_many_engines_fail(mesh):
    services = [mesh.service(name) for name in ("one", "two", "three", "four", "five")]
    engines = [service.engine(slots=8) for service in services]
    b = mesh.node("b", "us", engines=engines[:3])
    c = mesh.node("c", "us", engines=engines[3:])
    a = mesh.node("a", "eu", peers=[b, c])
    wait_for_peers(a, b, c)
    for service in services:
        service.popen.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    with pytest.raises(grpc.RpcError) as caught:
        stub_at(a).Unary(pb.Request(), timeout=LONG)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "server busy", "the engine's own word"
    attempts = 'isobar_attempts_total{to="engine"}'
    assert b.metric(attempts) + c.metric(attempts) == 3
    assert a.metric('isobar_peer_ejected{peer="b",region="us"}') == 0


def test_a_client_whose_upload_breaks_off_harms_no_engine(mesh):
    a, b, _ = pair(mesh, slots=64)

    async def test():
        for _ in range(5):
            async with connected(a.clients, a.ca) as client:
                calls = [client.start("/isobar.test.v1.Kinds/ClientStream") for _ in range(5)]
                for call in calls:
                    call.send(pb.Request(text="half").SerializeToString())
                await asyncio.sleep(0.2)
                for call in calls:
                    call.cancel()

    asyncio.run(asyncio.wait_for(test(), LONG))
    stub_at(a).Unary(pb.Request(), timeout=LONG)
    assert a.metric('isobar_peer_ejected{peer="b",region="us"}') == 0
    assert b.metric('isobar_engine_ejected{engine="engine"}') == 0
    assert b.metric('isobar_engine_slots{engine="engine"}') == 64


def test_metadata_at_its_limit_harms_no_peer(mesh):
    a, b, _ = pair(mesh)
    stub = stub_at(a)
    refusals = 0
    for size in range(15_700, 16_400, 50):
        try:
            stub.Unary(pb.Request(), timeout=LONG, metadata=(("x-large", "v" * size),))
        except grpc.RpcError as error:
            assert error.code() != grpc.StatusCode.DEADLINE_EXCEEDED
            refusals += 1
    assert refusals > 0, "some of them are beyond what the engine takes"
    assert stub.Unary(pb.Request(text="x"), timeout=LONG).text == "x"
    assert a.metric('isobar_peer_ejected{peer="b",region="us"}') == 0


def test_an_engine_of_its_own_comes_before_a_peers(mesh):
    services = [mesh.service("own"), mesh.service("other")]
    b = mesh.node("b", "us", engines=[services[1].engine(slots=64)])
    a = mesh.node("a", "eu", engines=[services[0].engine(slots=1)], peers=[b])
    wait_for_peers(a, b)
    stub = stub_at(a)

    def served_by(call):
        return dict(call.initial_metadata())["x-isobar-served-by"]

    for _ in range(5):
        assert served_by(stub.Unary.with_call(pb.Request(), timeout=LONG)[1]) == "a.eu/own"
    held = stub.Unary.future(pb.Request(delay_ms=60_000))
    wait_for("the call", lambda: a.metric('isobar_engine_calls_in_flight{engine="own"}') == 1)
    for _ in range(5):
        assert served_by(stub.Unary.with_call(pb.Request(), timeout=LONG)[1]) == "b.us/other"
    held.cancel()


def test_a_call_goes_to_who_has_its_model(mesh, tmp_path):
    import numpy as np
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    server = mesh.keep(MLServer(tmp_path / "mlserver"))
    other = mesh.service("other")
    kserve = {"protocol": "kserve-v2", "slots": 8}
    b = mesh.node("b", "us", engines=[
        {"name": "mlserver", "url": f"http://{server.address}", "models": ["summer"], **kserve},
    ])
    c = mesh.node("c", "us", engines=[
        # Not really a KServe server, and therefore fails its checks: it must never be asked.
        {"name": "other", "url": f"http://{other.address}", "models": ["winter"], **kserve},
    ])
    a = mesh.node("a", "eu", peers=[b, c])
    wait_for_peers(a, b, c)
    wait_for("the engine", lambda: a.get("/room?model=summer")[0] == 200)
    with triton.InferenceServerClient(a.clients, ssl=True, root_certificates=str(a.ca)) as client:
        wanted = triton.InferInput("x", [2, 3], "FP32")
        wanted.set_data_from_numpy(np.ones((2, 3), dtype=np.float32))
        for _ in range(10):
            assert client.infer("summer", [wanted]).as_numpy("sum").tolist() == [[3], [3]]
        with pytest.raises(InferenceServerException) as caught:
            client.infer("autumn", [wanted])
        assert "no engine this node knows of serves model autumn" in str(caught.value)
    assert a.get("/room?model=autumn")[0] == 404


def test_a_quiet_call_at_an_engine_that_forbids_pings_goes_on(mesh):
    """gRPC servers close a connection that pings them more than twice without data."""
    a, _, _ = pair(mesh)
    assert stub_at(a).Unary(pb.Request(text="late", delay_ms=26_000), timeout=60).text == "late"


def test_a_trace_passes_through_and_a_clients_priority_does_not(mesh):
    a, _, _ = pair(mesh)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("traceparent", trace), ("priority", "u=0"))
    _, call = stub_at(a).Unary.with_call(pb.Request(), timeout=LONG, metadata=metadata)
    initial = dict(call.initial_metadata())
    assert initial["x-saw-traceparent"] == trace
    assert "x-saw-priority" not in initial


def test_the_access_log_has_a_line_per_call(mesh):
    service = mesh.service("engine")
    b = mesh.node("b", "us", engines=[service.engine()], log={"access": 1.0})
    a = mesh.node("a", "eu", peers=[b], log={"access": 1.0})
    wait_for_peers(a, b)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    stub = stub_at(a)
    stub.Unary(pb.Request(delay_ms=20), timeout=LONG, metadata=(("traceparent", trace),))
    with pytest.raises(grpc.RpcError):
        stub.Unary(pb.Request(fail_code=9), timeout=LONG)

    def lines(node):
        found = [json.loads(l) for l in node.err.read_text().splitlines() if '"access":' in l]
        return found if len(found) == 2 else None

    for node, side, protocol in ((a, "ingress", "h2"), (b, "egress", "h3")):
        first, second = wait_for("two lines", lambda: lines(node))
        assert first["access"] == side and first["protocol"] == protocol
        assert first["method"] == METHOD and first["code"] == "OK"
        assert first["served_by"] == "b.us/engine" and first["refusal"] is None
        assert first["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
        assert 0.02 <= first["first_byte_s"] <= first["duration_s"] < LONG
        assert second["code"] == "FAILED_PRECONDITION"


def test_metrics_are_openmetrics_with_closed_labels(mesh):
    a, b, _ = pair(mesh, slots=4)
    stub_at(a).Unary(pb.Request(), timeout=LONG)
    wait_for("the books", lambda: a.metric('isobar_calls_total{side="ingress",code="OK"}') == 1)
    text = a.get("/metrics")[1]
    assert text.endswith("# EOF\n")
    assert 'isobar_call_duration_seconds_bucket{le="+Inf",side="ingress"} 1' in text
    assert a.metric('isobar_call_first_byte_seconds_count{side="ingress"}') == 1
    assert a.metric('isobar_peer_heard_seconds{peer="b",region="us"}') < 2
    assert b.metric('isobar_engine_slots{engine="engine"}') == 4
    assert b.metric('isobar_engine_healthy{engine="engine"}') == 1


class Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("kind", ["http:/healthz", "tcp", "grpc", "auto", "hung"])
def test_an_engine_leaves_and_returns_by_each_kind_of_check(mesh, kind):
    service = mesh.service("engine", health=kind != "hung")
    health = {"interval": "200ms", "timeout": "500ms", "failures": 2, "successes": 2}
    health["kind"] = "grpc" if kind == "hung" else kind
    server = None
    address = service.address
    if kind.startswith("http"):
        handler = type("Handler", (Health,), {})
        server = HTTPServer(("127.0.0.1", 0), handler)
        Thread(target=server.serve_forever, daemon=True).start()
        address = "127.0.0.1:%d" % server.server_port
    engine = service.engine(health=health) | {"url": f"http://{address}"}
    node = mesh.node("a", "eu", engines=[engine])
    healthy = 'isobar_engine_healthy{engine="engine"}'
    try:
        # Several checks, all of them passed.
        time.sleep(1)
        assert node.metric(healthy) == 1
        if server:
            handler.status = 500
        elif kind == "tcp":
            service.kill()
        elif kind == "hung":
            service.popen.send_signal(signal.SIGSTOP)
        else:
            service.popen.send_signal(signal.SIGHUP)
        wait_for("the engine to leave", lambda: node.metric(healthy) == 0)
        if server:
            handler.status = 204
        elif kind == "hung":
            service.popen.send_signal(signal.SIGCONT)
        elif kind != "tcp":
            service.popen.send_signal(signal.SIGHUP)
        if kind != "tcp":
            wait_for("the engine to return", lambda: node.metric(healthy) == 1)
    finally:
        if server:
            server.shutdown()


def test_a_draining_node_tells_its_peers_and_takes_no_calls_of_theirs(mesh):
    services = [mesh.service("one"), mesh.service("two")]
    b, c = (
        mesh.node(name, "us", engines=[service.engine(slots=8)])
        for name, service in zip("bc", services)
    )
    a = mesh.node("a", "eu", peers=[b, c])
    wait_for_peers(a, b, c)
    held = stub_at(b).ServerStream(pb.StreamRequest(count=40, delay_ms=100), timeout=LONG)
    next(held)
    b.popen.send_signal(signal.SIGTERM)
    wait_for("draining", lambda: b.get("/readyz") == (503, "draining\n"))
    assert json.loads(b.get(f"/room?method={METHOD}")[1])["reason"] == "draining"
    present = 'isobar_peer_present{peer="b",region="us"}'
    wait_for("the peer to hear it", lambda: a.metric(present) == 0, 5)
    stub = stub_at(a)
    for _ in range(20):
        _, call = stub.Unary.with_call(pb.Request(), timeout=LONG)
        assert dict(call.initial_metadata())["x-isobar-served-by"] == "c.us/two"
    assert len(list(held)) == 39
    assert b.popen.wait(LONG) == 0


@pytest.mark.parametrize("how", ["a second signal", "the drain timeout"])
def test_a_drain_ends_at_the_latest_with(mesh, how):
    service = mesh.service("engine")
    timeout = "60s" if how == "a second signal" else "1s"
    node = mesh.node("a", "eu", engines=[service.engine()], drain_timeout=timeout)
    held = stub_at(node).ServerStream(pb.StreamRequest(count=10_000, delay_ms=50), timeout=60)
    next(held)
    began = time.monotonic()
    node.popen.send_signal(signal.SIGTERM)
    wait_for("draining", lambda: node.get("/readyz") == (503, "draining\n"))
    if how == "a second signal":
        time.sleep(1)
        assert node.popen.poll() is None, "it waits for the stream"
        node.popen.send_signal(signal.SIGTERM)
    assert node.popen.wait(10) == 0
    assert time.monotonic() - began < 10
    with pytest.raises(grpc.RpcError) as caught:
        for _ in held:
            pass
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_full_budget_of_memory_is_busy_not_broken(mesh):
    """Requests are held back until they are answered, so that they can be sent again."""
    service = mesh.service("engine")
    node = mesh.node("a", "eu", engines=[service.engine()], buffer_bytes=16 << 20)
    stub = stub_at(node)
    large = pb.Request(payload=bytes(1_000_000), delay_ms=60_000)
    held = [stub.Unary.future(large) for _ in range(16)]

    def refused():
        try:
            stub.Unary(pb.Request(), timeout=LONG)
        except grpc.RpcError as error:
            return error
        return None

    error = wait_for("a refusal", refused)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "node.buffer_bytes" in error.details()
    assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
    for call in held:
        call.cancel()
    wait_for("room again", lambda: refused() is None)
    # What was answered is not held back any more, however long the answer lasts.
    held = [stub.Bidi(iter([pb.Request(payload=bytes(1_000_000))] * 3)) for _ in range(2)]
    for call in held:
        assert len(list(call)) == 3
    assert refused() is None


def test_a_silent_tcp_client_delays_nothing(mesh):
    service = mesh.service("engine")
    node = mesh.node("a", "eu", engines=[service.engine()], plaintext=True)
    host, port = node.plaintext.rsplit(":", 1)
    with socket.create_connection((host, int(port))):
        stub_at(node).Unary(pb.Request(), timeout=LONG)
        began = time.monotonic()
        assert node.stop() == 0
        assert time.monotonic() - began < 5
