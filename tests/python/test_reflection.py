"""Reflection and health for the mesh, asked at a node that owns nothing: grpcurl and grpcio."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from nodes import BINARY, LONG, SimEngine, free_port, text_input, wait_for, wait_for_peers
from reflects import Reflects, file

GRPCURL = Path(sys.executable).with_name("grpcurl")
KSERVE = "inference.GRPCInferenceService"
KINDS = "isobar.test.v1.Kinds"
HEALTH = "/grpc.health.v1.Health/"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


@pytest.fixture
def far(mesh):
    """Two engines behind b, one of which reflects v1 and the other v1alpha alone, and a, which has none."""
    mesh.sim = mesh.keep(SimEngine(mesh.directory, "gpu", model="llama"))
    mesh.kinds = mesh.service("kinds", reflection=True)
    check = {"kind": "tcp", "interval": "200ms", "timeout": "200ms", "failures": 1, "successes": 1}
    mesh.b = mesh.node(
        "b", "us", engines=[mesh.sim.engine(health=check), mesh.kinds.engine(health=check)]
    )
    mesh.a = mesh.node("a", "eu", peers=[mesh.b])
    wait_for_peers(mesh.a, mesh.b)
    return mesh


def grpcurl(node, *arguments):
    command = [GRPCURL, "-cacert", node.ca, *arguments[:-1], node.clients, *arguments[-1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG)


def listed(node):
    done = grpcurl(node, "list")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def name(service):
    """A HealthCheckRequest."""
    return bytes([0x0A, len(service)]) + service.encode() if service else b""


def channel(node):
    credentials = grpc.ssl_channel_credentials(node.ca.read_bytes())
    return grpc.secure_channel(node.clients, credentials)


def test_grpcurl_lists_describes_and_calls_what_only_a_peer_has(far):
    wanted = {
        KSERVE, KINDS, "grpc.health.v1.Health", "xds.service.orca.v3.OpenRcaService",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
    }
    wait_for("the services of the peer", lambda: wanted == set(listed(far.a)))
    described = subprocess.run(
        [GRPCURL, "-cacert", far.a.ca, far.a.clients, "describe", f"{KINDS}.Unary"],
        capture_output=True, text=True, timeout=LONG,
    )
    assert "rpc Unary" in described.stdout, described.stderr
    called = grpcurl(far.a, "-d", '{"text": "there and back"}', f"{KINDS}/Unary")
    assert json.loads(called.stdout)["text"] == "there and back", called.stderr
    data = json.dumps(text_input("hello", 3, "llama"))
    called = grpcurl(far.a, "-v", "-d", data, f"{KSERVE}/ModelInfer")
    assert "x-isobar-served-by: b.us/gpu" in called.stdout, called.stderr


def test_what_nobody_declares_is_not_found(far):
    for symbol in ("no.Such", "isobar.test.v1.Kinds.Nope"):
        done = subprocess.run(
            [GRPCURL, "-cacert", far.a.ca, far.a.clients, "describe", symbol],
            capture_output=True, text=True, timeout=LONG,
        )
        assert done.returncode != 0
        assert "not found" in done.stderr.lower() or "declares" in done.stderr, done.stderr


def test_health_is_that_of_whoever_serves_a_model_or_a_service(far):
    with channel(far.a) as open_channel:
        check = open_channel.unary_unary(f"{HEALTH}Check")
        wait_for("the services of the peer", lambda: KINDS in listed(far.a))
        wait_for("the engine", lambda: check(name("llama"), timeout=LONG) == SERVING)
        for service in ("", KSERVE, KINDS, "llama", "grpc.health.v1.Health"):
            assert check(name(service), timeout=LONG) == SERVING, service
        with pytest.raises(grpc.RpcError) as failed:
            check(name("mixtral"), timeout=LONG)
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND
        assert open_channel.unary_unary(f"{HEALTH}List")(b"", timeout=LONG).count(b"llama") == 1


def test_a_watch_tells_that_the_only_engine_is_gone_and_back_and_ends_with_the_node(far):
    said = []
    with channel(far.a) as open_channel:
        check = open_channel.unary_unary(f"{HEALTH}Check")
        wait_for("the engine", lambda: check(name("llama"), timeout=LONG) == SERVING)
        # Until they are known the peer may have anything.
        wait_for("the services of the peer", lambda: KINDS in listed(far.a))
        stream = open_channel.unary_stream(f"{HEALTH}Watch")
        watch, unknown = (stream(name(service), timeout=LONG) for service in ("llama", "mixtral"))
        assert next(unknown) == SERVICE_UNKNOWN
        unknown.cancel()

        def listen():
            try:
                for status in watch:
                    said.append(status)
            except grpc.RpcError as error:
                said.append(error.code())

        listener = threading.Thread(target=listen)
        listener.start()
        wait_for("the first status", lambda: said == [SERVING])
        far.sim.kill()
        wait_for("the second", lambda: said == [SERVING, NOT_SERVING])
        port = far.sim.address
        far.keep(SimEngine(far.directory, "gpu", model="llama", grpc=port))
        wait_for("the third", lambda: said == [SERVING, NOT_SERVING, SERVING])
        # A watch would last for ever: the node must not wait for it.
        assert far.a.stop() == 0
        listener.join(LONG)
    # The node says that it takes no more calls, and then no more at all.
    assert not listener.is_alive() and said[3] == NOT_SERVING


def test_busy_is_not_unhealthy(far):
    with channel(far.a) as open_channel:
        check = open_channel.unary_unary(f"{HEALTH}Check")
        wait_for("the engine", lambda: check(name("llama"), timeout=LONG) == SERVING)
        far.sim.inject("refuse")
        infer = open_channel.unary_unary(f"/{KSERVE}/ModelInfer")
        for _ in range(20):
            with pytest.raises(grpc.RpcError):
                # model_name, and nothing else: refused before anybody looks at it.
                infer(b"\x0a\x05llama", timeout=LONG)
        assert check(name("llama"), timeout=LONG) == SERVING


def test_services_that_appear_later_are_told(mesh):
    port = f"127.0.0.1:{free_port()}"
    # An opaque engine: what it serves is known from its reflection alone.
    engine = {"name": "late", "url": f"http://{port}", "protocol": "grpc"}
    b = mesh.node("b", "us", engines=[engine])
    a = mesh.node("a", "eu", peers=[b])
    wait_for_peers(a, b)
    assert KSERVE not in listed(a)
    sim = mesh.keep(SimEngine(mesh.directory, "late", grpc=port))
    wait_for("the services of the peer", lambda: KSERVE in listed(a))
    called = grpcurl(a, "-d", json.dumps(text_input("hello", 2)), f"{KSERVE}/ModelInfer")
    assert json.loads(called.stdout)["modelName"] == sim.model, called.stderr


def called(node, method):
    """Which engine answers a call that carries nothing."""
    done = subprocess.run(
        [BINARY, "call", node.clients, "--ca", node.ca, method, "-d", "{}", "--json"],
        capture_output=True, text=True, timeout=LONG,
    )
    one = json.loads(done.stdout)["calls"][0]
    assert one["status"]["name"] == "OK", one
    return one["served_by"]


def described(node, symbol):
    return subprocess.run(
        [GRPCURL, "-cacert", node.ca, node.clients, "describe", symbol],
        capture_output=True, text=True, timeout=LONG,
    ).stdout


def test_engines_whose_files_have_one_name_are_kept_apart_and_called_each_for_its_own(mesh):
    engines = []
    for package in ("p", "q"):
        common = file("common.proto", f"common.{package}")
        own = file(f"{package}.proto", package, ["common.proto"], service="S", of=f".common.{package}.R")
        engines.append(mesh.keep(Reflects([own, common])).engine(f"of-{package}"))
    b = mesh.node("b", "us", engines=engines)
    a = mesh.node("a", "eu", peers=[b])
    wait_for("the services of the peer", lambda: {"p.S", "q.S"} <= set(listed(a)))
    for node in (a, b):
        for package in ("p", "q"):
            assert f"{package}.S is a service" in described(node, f"{package}.S")
            assert called(node, f"{package}.S/M") == f"b.us/of-{package}"


@pytest.mark.parametrize("order", [1, -1])
def test_a_call_goes_to_who_names_its_service_before_who_says_nothing_or_names_others(mesh, order):
    kinds = mesh.service("kinds", reflection=True)
    silent = mesh.service("silent")
    others = mesh.keep(Reflects([file("p.proto", "p", service="S")]))
    sim = mesh.keep(SimEngine(mesh.directory, "sim"))
    opaque_sim = {**sim.engine(), "protocol": "grpc"}
    opaque_sim.pop("models")
    engines = [silent.engine(), others.engine("others"), kinds.engine(), opaque_sim]
    b = mesh.node("b", "us", engines=engines[::order])
    a = mesh.node("a", "eu", peers=[b])
    wait_for("the services of the peer", lambda: {KINDS, KSERVE, "p.S"} <= set(listed(a)))
    for node in (a, b):
        for _ in range(5):
            assert called(node, f"{KINDS}/Unary") == "b.us/kinds"
            assert called(node, f"{KSERVE}/ServerReady") == "b.us/sim"
            assert called(node, "p.S/M") == "b.us/others"


def test_a_peer_that_is_long_dead_makes_nobody_healthy(far):
    with channel(far.a) as open_channel:
        check = open_channel.unary_unary(f"{HEALTH}Check")
        wait_for("the services of the peer", lambda: KINDS in listed(far.a))
        wait_for("the engine", lambda: check(name("llama"), timeout=LONG) == SERVING)
        far.b.kill()
        wait_for("its silence", lambda: check(name("llama"), timeout=LONG) == NOT_SERVING)
        # After ten seconds of silence routing tries it again when there is nobody else: that is no health.
        heard = 'isobar_peer_heard_seconds{peer="b",region="us"}'
        wait_for("its long silence", lambda: far.a.metric(heard) > 14 or far.a.metric(heard) == 0)
        assert check(name("llama"), timeout=LONG) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as failed:
            check(name("mixtral"), timeout=LONG)
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND


def test_what_an_engine_declares_anew_is_told(mesh):
    old = mesh.keep(Reflects([file("p.proto", "p", service="S", methods=["Old"])]))
    port = old.port
    check = {"kind": "tcp", "interval": "200ms", "timeout": "200ms", "failures": 1, "successes": 1}
    b = mesh.node("b", "us", engines=[{**old.engine("e"), "health": check}])
    a = mesh.node("a", "eu", peers=[b])
    wait_for("the old method", lambda: "rpc Old" in described(a, "p.S"))
    old.kill()
    wait_for("the end of the old", lambda: b.metric('isobar_engine_healthy{engine="e"}') == 0)
    mesh.keep(Reflects([file("p.proto", "p", service="S", methods=["New"])], port))
    wait_for("the new method", lambda: "rpc New" in described(a, "p.S"))


def test_declarations_no_compiler_would_make_hurt_nobody_else(mesh):
    circle = [
        file("a.proto", "p", ["b.proto"], public=[0], service="S"),
        file("b.proto", "p2", ["a.proto"], public=[0]),
    ]
    itself = [file("self.proto", "q", ["self.proto"], public=[0], service="S")]
    hole = [file("h.proto", "h", ["gone.proto"], service="S")]
    hostile = [mesh.keep(Reflects(files)) for files in (circle, itself, hole)]
    engines = [engine.engine(f"hostile-{number}") for number, engine in enumerate(hostile)]
    kinds = mesh.service("kinds", reflection=True)
    b = mesh.node("b", "us", engines=[*engines, kinds.engine()])
    a = mesh.node("a", "eu", peers=[b])
    wanted = {"p.S", "q.S", "h.S", KINDS}
    wait_for("the services of the peer", lambda: wanted <= set(listed(a)))
    assert all(engine.asked > 0 for engine in hostile)
    for node in (a, b):
        assert "rpc Unary" in described(node, f"{KINDS}.Unary")
        assert described(node, "p.S") == ""
    # What is not declared can be called all the same, by whoever knows it.
    with channel(a) as open_channel:
        for package in ("p", "q", "h"):
            echo = open_channel.unary_unary(f"/{package}.S/M")
            assert echo(b"\x0a\x01x", timeout=LONG) == b"\x0a\x01x"


def test_a_health_check_whose_request_never_comes_does_not_hold_the_node_up(far):
    held = threading.Event()

    def never():
        held.wait(LONG)
        yield b""

    with channel(far.a) as open_channel:
        answer = open_channel.stream_unary(f"{HEALTH}Check").future(never(), timeout=LONG)
        in_flight = 'isobar_calls_in_flight{side="ingress"}'
        wait_for("the call", lambda: far.a.metric(in_flight) >= 1)
        # Its drain timeout is two minutes, and `stop` waits for thirty seconds.
        assert far.a.stop() == 0
        assert answer.exception(LONG).code() == grpc.StatusCode.UNAVAILABLE
        held.set()


def test_compressed_health_checks_and_long_names_are_answered(far):
    credentials = grpc.ssl_channel_credentials(far.a.ca.read_bytes())
    with grpc.secure_channel(far.a.clients, credentials, compression=grpc.Compression.Gzip) as gzip:
        check = gzip.unary_unary(f"{HEALTH}Check")
        assert check(b"", timeout=LONG) == SERVING
        with pytest.raises(grpc.RpcError) as failed:
            check(b"\x0a\xd0\x0f" + b"x" * 2000, timeout=LONG)
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
