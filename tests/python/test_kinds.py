"""All four kinds of method, and every way a call can end, straight to the service and through two nodes."""

import queue
import threading
import time
import uuid

import grpc
import pytest
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc
from nodes import LONG, wait_for

ALL_BYTES = bytes(range(256))
WAYS = ["direct", "mesh", "plaintext"]
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def open_channel(world, way):
    if way == "direct":
        return grpc.insecure_channel(world.service.address, UNLIMITED)
    if way == "plaintext":
        return grpc.insecure_channel(world.a.plaintext, UNLIMITED)
    credentials = grpc.ssl_channel_credentials(world.a.ca.read_bytes())
    return grpc.secure_channel(world.a.clients, credentials, UNLIMITED)


@pytest.fixture(params=WAYS)
def stub(request, world):
    with open_channel(world, request.param) as channel:
        yield kinds_pb2_grpc.KindsStub(channel)


@pytest.fixture
def mesh(world):
    with open_channel(world, "mesh") as channel:
        yield kinds_pb2_grpc.KindsStub(channel)


@pytest.fixture
def service(world):
    with open_channel(world, "direct") as channel:
        yield kinds_pb2_grpc.KindsStub(channel)


class Feed:
    """Requests of a stream, one at a time, as the test decides."""

    def __init__(self):
        self.requests = queue.Queue()
        self.end = object()

    def send(self, **fields):
        self.requests.put(pb.Request(**fields))

    def close(self):
        self.requests.put(self.end)

    def __iter__(self):
        return iter(self.requests.get, self.end)


def call_id():
    name = uuid.uuid4().hex
    return name, (("x-call-id", name),)


def seen(service, name, what, within=1.0):
    """What the service saw of a call, once `what` is true of it, `within` seconds from now."""

    def found():
        reply = service.Seen(pb.SeenRequest(call_id=name), timeout=LONG)
        return reply if getattr(reply, what) else None

    return wait_for(f"{what} at the service", found, within)


def test_unary(stub):
    reply = stub.Unary(pb.Request(text="hello", payload=ALL_BYTES), timeout=LONG)
    assert (reply.text, reply.payload) == ("hello", ALL_BYTES)


def test_a_thousand_messages_arrive_in_order(stub):
    stream = stub.ServerStream(pb.StreamRequest(count=1000, payload_bytes=100), timeout=LONG)
    assert [reply.sequence for reply in stream] == list(range(1000))


def test_an_empty_stream_is_ok(stub):
    call = stub.ServerStream(pb.StreamRequest(count=0), timeout=LONG)
    assert list(call) == []
    assert call.code() == grpc.StatusCode.OK


def test_client_stream(stub):
    requests = (pb.Request(text=f"{i},") for i in range(500))
    assert stub.ClientStream(requests, timeout=LONG).text == "".join(f"{i}," for i in range(500))


def test_bidi_interleaves_strictly(stub):
    feed = Feed()
    call = stub.Bidi(iter(feed), timeout=LONG)
    for i in range(100):
        feed.send(text=f"ping {i}")
        reply = next(call)
        assert (reply.text, reply.sequence) == (f"ping {i}", i)
    feed.close()
    assert list(call) == []
    assert call.code() == grpc.StatusCode.OK


def test_half_close_lets_the_server_finish(stub):
    requests = [pb.Request(text=str(i), delay_ms=20) for i in range(10)]
    assert [reply.text for reply in stub.Bidi(iter(requests), timeout=LONG)] == [
        str(i) for i in range(10)
    ]


def test_the_server_may_end_early(stub, service):
    name, metadata = call_id()
    feed = Feed()
    call = stub.Bidi(iter(feed), timeout=LONG, metadata=metadata)
    feed.send(text="first")
    assert next(call).text == "first"
    feed.send(text="last", end_early=True)
    assert next(call).text == "last"
    assert list(call) == [] and call.code() == grpc.StatusCode.OK
    assert seen(service, name, "finished", LONG)
    feed.close()


def test_a_client_stream_may_end_early(stub):
    feed = Feed()
    feed.send(text="a")
    feed.send(text="b", end_early=True)
    reply = stub.ClientStream(iter(feed), timeout=LONG)
    assert reply.text == "ab"
    feed.close()


def test_an_error_after_ten_messages_arrives_whole(stub):
    got = []
    metadata = (("x-trail-a", "1"), ("x-trail-b-bin", ALL_BYTES))
    call = stub.ServerStream(
        pb.StreamRequest(count=20, fail_after=10), timeout=LONG, metadata=metadata
    )
    with pytest.raises(grpc.RpcError) as caught:
        for reply in call:
            got.append(reply.sequence)
    assert got == list(range(10))
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert caught.value.details() == "nach zehn ist Schluß ✂"
    for entry in metadata:
        assert entry in [tuple(e) for e in call.trailing_metadata()]


def test_metadata_survives_in_both_directions(stub):
    initial = (("x-echo-bin", ALL_BYTES), ("x-echo-a", "one"), ("x-echo-a", "two"))
    trailing = (("x-trail-bin", ALL_BYTES), ("x-trail-a", "one"), ("x-trail-a", "two"))
    _, call = stub.Unary.with_call(
        pb.Request(text="x"), timeout=LONG, metadata=(*initial, *trailing)
    )
    assert [tuple(e) for e in call.initial_metadata() if e[0].startswith("x-echo")] == list(initial)
    assert [tuple(e) for e in call.trailing_metadata() if e[0].startswith("x-trail")] == list(
        trailing
    )


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c.value[0] != 0])
def test_every_status_comes_back_with_message_and_details(stub, code):
    message = f"denied: 100 % «{code.name}»\n"
    request = pb.Request(fail_code=code.value[0], fail_message=message)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Unary(request, timeout=LONG)
    assert caught.value.code() == code
    assert caught.value.details() == message
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    assert details == b"\x08\x0a\x12\x05hello"


def test_an_unknown_method_is_the_services_error(world):
    for way in WAYS:
        with open_channel(world, way) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/isobar.test.v1.Kinds/Nope")(b"", timeout=LONG)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, way
            assert caught.value.details() == "Method not found!", way


def test_three_megabytes_cross_both_ways(stub):
    payload = ALL_BYTES * (3 << 12)
    assert stub.Unary(pb.Request(payload=payload), timeout=LONG).payload == payload
    replies = stub.Bidi(iter([pb.Request(payload=payload)] * 3), timeout=LONG)
    assert all(reply.payload == payload for reply in replies)


def test_cancelling_a_unary_call_reaches_the_service(stub, service):
    name, metadata = call_id()
    call = stub.Unary.future(pb.Request(delay_ms=60_000), metadata=metadata)
    seen(service, name, "started", LONG)
    call.cancel()
    assert seen(service, name, "cancelled").cancelled_after_s < 30


def test_cancelling_a_server_stream_reaches_the_service(stub, service):
    name, metadata = call_id()
    call = stub.ServerStream(pb.StreamRequest(count=10**6, delay_ms=5), metadata=metadata)
    next(call)
    call.cancel()
    seen(service, name, "cancelled")


def test_cancelling_an_idle_bidi_reaches_the_service(stub, service):
    name, metadata = call_id()
    feed = Feed()
    call = stub.Bidi(iter(feed), metadata=metadata)
    feed.send(text="x")
    next(call)
    call.cancel()
    seen(service, name, "cancelled")
    feed.close()


def test_cancelling_a_client_stream_reaches_the_service(stub, service):
    name, metadata = call_id()
    feed = Feed()
    call = stub.ClientStream.future(iter(feed), metadata=metadata)
    feed.send(text="x")
    seen(service, name, "started", LONG)
    call.cancel()
    seen(service, name, "cancelled")
    feed.close()


def test_a_client_that_vanishes_cancels_its_calls(world, service):
    name, metadata = call_id()
    channel = open_channel(world, "mesh")
    call = kinds_pb2_grpc.KindsStub(channel).Unary.future(
        pb.Request(delay_ms=60_000), metadata=metadata
    )
    seen(service, name, "started", LONG)
    channel.close()
    seen(service, name, "cancelled")
    assert call.code() == grpc.StatusCode.CANCELLED


def test_a_deadline_of_100_ms_ends_the_call_on_both_sides(stub, service):
    name, metadata = call_id()
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Unary(pb.Request(delay_ms=60_000), timeout=0.1, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 1
    seen(service, name, "cancelled")


def test_a_deadline_holds_in_the_middle_of_a_stream(stub, service):
    name, metadata = call_id()
    call = stub.ServerStream(
        pb.StreamRequest(count=10**6, delay_ms=10), timeout=0.5, metadata=metadata
    )
    started, got = time.monotonic(), 0
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            got += 1
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert got > 0 and time.monotonic() - started < 2
    seen(service, name, "cancelled")


def test_the_service_is_told_the_time_that_is_left(mesh):
    _, call = mesh.Unary.with_call(pb.Request(), timeout=20)
    left = float(dict(call.initial_metadata())["x-time-left"])
    assert 10 < left <= 20


def test_the_service_sees_which_way_the_call_came(mesh):
    _, call = mesh.Unary.with_call(pb.Request(), timeout=LONG)
    metadata = dict(call.initial_metadata())
    assert metadata["x-saw-via"] == "2.0 a.eu.mesh.test, 3.0 b.us.mesh.test"
    assert metadata["x-isobar-served-by"] == "b.us/service"


def test_callers_cannot_speak_for_nodes(mesh):
    """What begins with x-isobar- is taken off at the door, so the service's echo of it would be missing."""
    _, call = mesh.Unary.with_call(
        pb.Request(), timeout=LONG, metadata=(("x-isobar-served-by", "me"), ("x-echo-ok", "1"))
    )
    metadata = call.initial_metadata()
    assert ("x-echo-ok", "1") in [tuple(e) for e in metadata]
    assert [e.value for e in metadata if e.key == "x-isobar-served-by"] == ["b.us/service"]


def test_metadata_beyond_16_kib_fails_and_the_next_call_works(mesh):
    with pytest.raises(grpc.RpcError) as caught:
        mesh.Unary(pb.Request(), timeout=LONG, metadata=(("x-long", "v" * 20_000),))
    assert caught.value.code() != grpc.StatusCode.DEADLINE_EXCEEDED
    assert mesh.Unary(pb.Request(text="next"), timeout=LONG).text == "next"


def test_slots_are_kept_and_come_back(world, tmp_path):
    """An engine with two slots: a third call is refused, and after they end there is room again."""
    from nodes import Node

    node = Node(tmp_path, "c", "us", tmp_path / "ca", engines=[world.service.engine(slots=2)])
    try:
        credentials = grpc.ssl_channel_credentials(node.ca.read_bytes())
        with grpc.secure_channel(node.clients, credentials) as channel:
            stub = kinds_pb2_grpc.KindsStub(channel)
            held = [stub.Unary.future(pb.Request(delay_ms=60_000)) for _ in range(2)]
            gauge = 'isobar_engine_calls_in_flight{engine="service"}'
            wait_for("two calls", lambda: node.metric(gauge) == 2)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Unary(pb.Request(), timeout=LONG)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "every slot" in caught.value.details()
            for call in held:
                call.cancel()
            wait_for("free slots", lambda: node.metric(gauge) == 0)
            assert stub.Unary(pb.Request(text="room"), timeout=LONG).text == "room"
    finally:
        node.stop()


def test_a_slow_reader_holds_the_service_back_not_memory(world, mesh):
    before = [node.memory_bytes() for node in (world.a, world.b)]
    call = mesh.ServerStream(pb.StreamRequest(count=4000, payload_bytes=65_536), timeout=LONG * 4)
    next(call)
    # Two seconds in which the service could send all of its 260 MB, were it not held back.
    end = time.monotonic() + 2
    most = [0, 0]
    while time.monotonic() < end:
        now = [node.memory_bytes() for node in (world.a, world.b)]
        most = [max(m, n - b) for m, n, b in zip(most, now, before)]
        time.sleep(0.05)
    assert max(most) < 40 << 20, most
    assert sum(1 for _ in call) == 3999


def test_when_the_service_dies_running_calls_end_with_an_error(own_world):
    with open_channel(own_world, "mesh") as channel:
        stub = kinds_pb2_grpc.KindsStub(channel)
        call = stub.ServerStream(pb.StreamRequest(count=10**6, delay_ms=5), timeout=LONG)
        next(call)
        own_world.service.kill()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            stub.Unary(pb.Request(), timeout=LONG)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "engine service" in caught.value.details()


def test_draining_finishes_calls_in_progress(own_world):
    with open_channel(own_world, "mesh") as channel:
        stub = kinds_pb2_grpc.KindsStub(channel)
        feed = Feed()
        call = stub.Bidi(iter(feed), timeout=LONG)
        feed.send(text="before")
        assert next(call).text == "before"
        ended = []
        stopping = [
            threading.Thread(target=lambda n=node: ended.append(n.stop()))
            for node in (own_world.a, own_world.b)
        ]
        for thread in stopping:
            thread.start()
        wait_for("draining", lambda: own_world.a.get("/readyz") == (503, "draining\n"))
        feed.send(text="during")
        assert next(call).text == "during"
        feed.close()
        assert list(call) == [] and call.code() == grpc.StatusCode.OK
        for thread in stopping:
            thread.join(LONG)
        assert ended == [0, 0]
