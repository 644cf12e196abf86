"""aioquic, an HTTP/3 stack that shares no code with ours, as a client of node a: every call crosses to b and the service."""

import asyncio
import time
import uuid

import grpc
import pytest
from h3 import LONG, Reset, connected
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc
from nodes import wait_for

UNARY = "/isobar.test.v1.Kinds/Unary"
STREAM = "/isobar.test.v1.Kinds/ServerStream"
BIDI = "/isobar.test.v1.Kinds/Bidi"
MESSAGE_ERROR = 0x10E


def run(world, test):
    """Runs `test(client)` on a connection to node a."""

    async def main():
        async with connected(world.a.clients, world.a.ca) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(main(), LONG))


def seen(world, name, what, within=1.0):
    with grpc.insecure_channel(world.service.address) as channel:
        stub = kinds_pb2_grpc.KindsStub(channel)

        def found():
            return getattr(stub.Seen(pb.SeenRequest(call_id=name), timeout=LONG), what)

        wait_for(f"{what} at the service", found, within)


def request(**fields):
    return pb.Request(**fields).SerializeToString()


def test_unary(world):
    async def test(client):
        call, messages, status, _ = await client.unary(UNARY, request(text="over h3"))
        assert status == 0
        assert [pb.Reply.FromString(m).text for m in messages] == ["over h3"]
        assert call.headers[":status"] == "200"
        assert call.headers["content-type"] == "application/grpc"
        assert call.headers["x-isobar-served-by"] == "b.us/service"

    run(world, test)


def test_a_server_stream_of_a_hundred(world):
    async def test(client):
        message = pb.StreamRequest(count=100, payload_bytes=1000).SerializeToString()
        _, messages, status, _ = await client.unary(STREAM, message)
        assert status == 0
        assert [pb.Reply.FromString(m).sequence for m in messages] == list(range(100))

    run(world, test)


def test_bidi_interleaves(world):
    async def test(client):
        call = client.start(BIDI)
        for i in range(50):
            call.send(request(text=str(i)))
            assert pb.Reply.FromString(await call.message()).text == str(i)
        call.end()
        assert (await call.finish())[1] == 0

    run(world, test)


def test_errors_keep_status_and_message(world):
    async def test(client):
        message = request(fail_code=7, fail_message="not 100 % yours")
        _, messages, status, text = await client.unary(UNARY, message)
        assert (messages, status, text) == ([], 7, "not 100 %25 yours")
        message = pb.StreamRequest(count=20, fail_after=10).SerializeToString()
        _, messages, status, _ = await client.unary(STREAM, message)
        assert (len(messages), status) == (10, 10)
        _, _, status, _ = await client.unary("/isobar.test.v1.Kinds/Nope", b"")
        assert status == 12

    run(world, test)


def test_three_megabytes_cross_both_ways(world):
    async def test(client):
        payload = bytes(range(256)) * (3 << 12)
        _, messages, status, _ = await client.unary(UNARY, request(payload=payload))
        assert status == 0
        assert pb.Reply.FromString(messages[0]).payload == payload

    run(world, test)


@pytest.mark.parametrize("half_closed", [True, False])
def test_a_cancel_reaches_the_service(world, half_closed):
    name = uuid.uuid4().hex

    async def test(client):
        metadata = [("x-call-id", name)]
        call = client.start(UNARY if half_closed else BIDI, metadata)
        call.send(request(delay_ms=60_000), end=half_closed)
        await asyncio.to_thread(seen, world, name, "started", LONG)
        call.cancel()
        await asyncio.to_thread(seen, world, name, "cancelled")
        # The connection goes on.
        assert (await client.unary(UNARY, request(text="next")))[2] == 0

    run(world, test)


def test_a_connection_that_closes_cancels_its_calls(world):
    name = uuid.uuid4().hex

    async def test(client):
        call = client.start(UNARY, [("x-call-id", name)])
        call.send(request(delay_ms=60_000), end=True)
        await asyncio.to_thread(seen, world, name, "started", LONG)

    run(world, test)
    seen(world, name, "cancelled")


def test_a_deadline_the_client_does_not_keep_is_kept_by_the_node(world):
    name = uuid.uuid4().hex

    async def test(client):
        started = time.monotonic()
        metadata = [("grpc-timeout", "100m"), ("x-call-id", name)]
        _, messages, status, text = await client.unary(
            UNARY, request(delay_ms=60_000), metadata
        )
        assert (messages, status) == ([], 4), text
        assert time.monotonic() - started < 1
        await asyncio.to_thread(seen, world, name, "cancelled")

    run(world, test)


def test_a_deadline_holds_in_the_middle_of_a_stream(world):
    async def test(client):
        message = pb.StreamRequest(count=10**6, delay_ms=10).SerializeToString()
        _, messages, status, _ = await client.unary(STREAM, message, [("grpc-timeout", "400m")])
        assert len(messages) > 0
        assert status == 4

    run(world, test)


def test_a_timeout_nobody_can_read_is_refused(world):
    async def test(client):
        _, _, status, text = await client.unary(UNARY, request(), [("grpc-timeout", "soon")])
        assert status == 3 and "grpc-timeout" in text

    run(world, test)


def test_two_calls_at_once_do_not_wait_for_each_other(world):
    async def test(client):
        slow = client.start(UNARY)
        slow.send(request(text="slow", delay_ms=500), end=True)
        _, _, status, _ = await client.unary(UNARY, request(text="fast"))
        assert status == 0 and not slow.ended
        messages, status, _ = await slow.finish()
        assert status == 0 and pb.Reply.FromString(messages[0]).text == "slow"

    run(world, test)


def test_a_host_that_differs_from_the_authority_harms_nobody_else(world):
    async def test(client):
        innocent = client.start(BIDI)
        innocent.send(request(text="before"))
        assert pb.Reply.FromString(await innocent.message()).text == "before"
        guilty = client.start(UNARY, [("host", "elsewhere")])
        guilty.send(request(), end=True)
        with pytest.raises(Reset) as caught:
            await guilty.finish()
        assert caught.value.args == (MESSAGE_ERROR,)
        innocent.send(request(text="after"))
        assert pb.Reply.FromString(await innocent.message()).text == "after"
        innocent.end()
        assert (await innocent.finish())[1] == 0
        assert client.terminated is None

    run(world, test)


def test_unknown_frames_and_streams_are_ignored(world):
    async def test(client):
        client.raw_uni(b"\x21hello")
        call = client.start(UNARY)
        client.raw_frame(call, 0x1F * 3 + 0x21, b"x" * 100_000)
        call.send(request(text="still"), end=True)
        messages, status, _ = await call.finish()
        assert status == 0 and pb.Reply.FromString(messages[0]).text == "still"

    run(world, test)


def test_what_is_not_grpc_is_answered_with_415(world):
    async def test(client):
        call = client.start(UNARY, content_type="application/json")
        call.end()
        await call.wait(lambda: call.ended)
        assert call.headers[":status"] == "415"

    run(world, test)


def test_the_port_for_peers_needs_a_certificate(world):
    async def main():
        async with connected(world.b.peers, world.b.ca) as client:
            # TLS 1.3 lets a client believe it is in before the server has looked at its certificate.
            call = client.start(UNARY)
            call.send(request(), end=True)
            await call.finish()

    with pytest.raises((ConnectionError, Reset)):
        asyncio.run(asyncio.wait_for(main(), LONG))
    assert world.b.metric('isobar_calls_total{side="egress",code="OK"}') > 0, "peers do get in"


def test_h2_replies_say_where_h3_is(world):
    credentials = grpc.ssl_channel_credentials(world.a.ca.read_bytes())
    with grpc.secure_channel(world.a.clients, credentials) as channel:
        stub = kinds_pb2_grpc.KindsStub(channel)
        _, call = stub.Unary.with_call(pb.Request(), timeout=LONG)
    port = world.a.clients.rsplit(":", 1)[1]
    assert dict(call.initial_metadata())["alt-svc"] == f'h3=":{port}"; ma=86400'
