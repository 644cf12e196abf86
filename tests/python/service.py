"""The test service of proto/isobar/test/v1/kinds.proto: all four kinds of method, on grpcio, as a process of its own.

Request metadata `x-echo-NAME` comes back as initial metadata, `x-trail-NAME` as trailing metadata, and `x-time-left` tells
the seconds the service was given. Prints its port when it is ready.

`--factor N` makes every delay N times as long. From SIGUSR1 to SIGUSR2 every call is refused with RESOURCE_EXHAUSTED.
With `--health` it offers gRPC health checking, SERVING but from one SIGHUP to the next; with `--reflection` server
reflection, of which grpcio has v1alpha alone.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from contextlib import contextmanager

sys.path.insert(0, os.environ["ISOBAR_STUBS"])

import grpc  # noqa: E402
from grpc_reflection.v1alpha import reflection  # noqa: E402
from isobar.test.v1 import kinds_pb2 as pb  # noqa: E402
from isobar.test.v1 import kinds_pb2_grpc  # noqa: E402

# A call whose caller is gone looks half-closed first and is cancelled a moment later.
SETTLE_S = 0.02
DETAILS = b"\x08\x0a\x12\x05hello"


class Seen:
    """What became of one call."""

    def __init__(self):
        self.started = time.monotonic()
        self.cancelled_after = None
        self.finished = False

    @contextmanager
    def watched(self):
        """Notes how the call ends: gRPC cancels the task of a call whose caller is gone."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled_after = time.monotonic() - self.started
            raise
        self.finished = True


class Kinds(kinds_pb2_grpc.KindsServicer):
    def __init__(self, factor=1.0):
        self.calls = {}
        self.starts = {}
        self.factor = factor
        self.refuses = False
        self.sick = False

    async def begin(self, context):
        """Notes the call and answers its metadata; returns a watch over its end."""
        if self.refuses:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "server busy")
        metadata = [(k, v) for k, v in context.invocation_metadata()]
        call_id = next((v for k, v in metadata if k == "x-call-id"), "")
        initial = [(k, v) for k, v in metadata if k.startswith("x-echo-")]
        left = context.time_remaining()
        if left is not None:
            initial.append(("x-time-left", f"{left:.6f}"))
        via = ", ".join(v for k, v in metadata if k == "via")
        if via:
            initial.append(("x-saw-via", via))
        told = ("traceparent", "priority", "authorization", "x-api-key")
        initial += [("x-saw-" + k, v) for k, v in metadata if k in told]
        if initial:
            await context.send_initial_metadata(initial)
        context.set_trailing_metadata([(k, v) for k, v in metadata if k.startswith("x-trail-")])
        seen = Seen()
        if call_id:
            self.calls[call_id] = seen
            self.starts[call_id] = self.starts.get(call_id, 0) + 1
        return call_id, seen

    async def Unary(self, request, context):
        call_id, seen = await self.begin(context)
        with seen.watched():
            reply = await self.answer(request, context, call_id, 0)
            return reply

    async def ServerStream(self, request, context):
        call_id, seen = await self.begin(context)
        with seen.watched():
            payload = bytes(request.payload_bytes)
            for sequence in range(request.count):
                await self.wait(request.delay_ms)
                if request.fail_after and sequence == request.fail_after:
                    await context.abort(grpc.StatusCode.ABORTED, "nach zehn ist Schluß ✂")
                yield pb.Reply(payload=payload, sequence=sequence, call_id=call_id)

    async def ClientStream(self, requests, context):
        call_id, seen = await self.begin(context)
        with seen.watched():
            texts, payloads = [], []
            async for request in requests:
                texts.append(request.text)
                payloads.append(request.payload)
                await self.wait(request.delay_ms)
                if request.end_early:
                    break
                if request.fail_code:
                    await self.answer(request, context, call_id, 0)
            else:
                await asyncio.sleep(SETTLE_S)
            return pb.Reply(text="".join(texts), payload=b"".join(payloads), call_id=call_id)

    async def Bidi(self, requests, context):
        call_id, seen = await self.begin(context)
        with seen.watched():
            sequence = 0
            async for request in requests:
                yield await self.answer(request, context, call_id, sequence)
                sequence += 1
                if request.end_early:
                    break
            else:
                await asyncio.sleep(SETTLE_S)

    async def Seen(self, request, context):
        seen = self.calls.get(request.call_id)
        if seen is None:
            return pb.SeenReply()
        cancelled = seen.cancelled_after is not None
        return pb.SeenReply(
            started=True,
            cancelled=cancelled,
            finished=seen.finished,
            cancelled_after_s=seen.cancelled_after or 0,
            starts=self.starts[request.call_id],
        )

    async def wait(self, delay_ms):
        if delay_ms:
            await asyncio.sleep(delay_ms * self.factor / 1000)

    async def answer(self, request, context, call_id, sequence):
        await self.wait(request.delay_ms)
        if request.fail_code:
            code = next(c for c in grpc.StatusCode if c.value[0] == request.fail_code)
            context.set_trailing_metadata(
                (*context.trailing_metadata(), ("grpc-status-details-bin", DETAILS))
            )
            await context.abort(code, request.fail_message)
        return pb.Reply(
            text=request.text, payload=request.payload, sequence=sequence, call_id=call_id
        )


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--health", action="store_true")
    parser.add_argument("--reflection", action="store_true")
    arguments = parser.parse_args()
    kinds = Kinds(arguments.factor)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(kinds, "refuses", True))
    loop.add_signal_handler(signal.SIGUSR2, lambda: setattr(kinds, "refuses", False))
    loop.add_signal_handler(signal.SIGHUP, lambda: setattr(kinds, "sick", not kinds.sick))
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=unlimited)
    kinds_pb2_grpc.add_KindsServicer_to_server(kinds, server)
    if arguments.health:

        async def check(_request, _context):
            # HealthCheckResponse: status NOT_SERVING or SERVING.
            return b"\x08\x02" if kinds.sick else b"\x08\x01"

        method = grpc.unary_unary_rpc_method_handler(check)
        service = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": method})
        server.add_generic_rpc_handlers((service,))
    if arguments.reflection:
        names = ["isobar.test.v1.Kinds", reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
    port = server.add_insecure_port(f"{arguments.host}:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
