"""Healthy calls by grpc.aio in a process of its own, so that what a test does meanwhile does not slow them: one JSON object
a line for each call that ended.

Arrivals do not wait for replies. Streams are bidirectional: one message each way again and again, from the first moment to
the last. Answers are server streams of some length, so many in progress at any time.
"""

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from nodes import LONG, Process, wait_for

STEP_S = 0.25


@dataclass
class Ended:
    """One call that ended; `at` is its beginning on the clock of `time.monotonic`, which all processes share."""

    kind: str
    at: float
    took: float
    code: str
    details: str
    served_by: str
    messages: int


class Traffic(Process):
    """Calls to nodes until `finish`.

    Each flow is a dict: `kind` ("unary", "stream", "answer", "infer", or "fresh": each over a new
    connection), `target` (host:port, or several with commas between them: calls are spread over
    them), `ca` (a file; without it there is no TLS) and `rate` (per second; of streams: how many in
    all). Answers have so many `messages`, one every `delay_ms`. Unary calls are reported under
    `label`, if there is one, instead of their kind. `enter` is a command that starts another one
    elsewhere.
    """

    def __init__(
        self, directory: Path, flows: list[dict], name="traffic", deadline=5.0,
        enter=lambda *command: command,
    ):
        flows = [{k: str(v) if isinstance(v, Path) else v for k, v in f.items()} for f in flows]
        spec = json.dumps({"flows": flows, "deadline": deadline})
        super().__init__(name, Path(directory), enter(sys.executable, __file__, spec))

    def calls(self, since=0.0, *kinds: str) -> list[Ended]:
        """The calls that ended so far and began after `since`."""
        lines = self.out.read_text().splitlines(keepends=True)
        ended = [Ended(**json.loads(line)) for line in lines if line.endswith("\n")]
        return [call for call in ended if call.at > since and (not kinds or call.kind in kinds)]

    def begun(self):
        """Waits for the first good call."""

        def good():
            self.died()
            return any(call.code == "OK" for call in self.calls())

        wait_for("the first call", good)
        return self

    def finish(self, within=LONG) -> list[Ended]:
        """Ends the arrivals, lets what is in progress end, and returns every call."""
        assert self.stop(signal.SIGTERM, within) == 0, self.err.read_text()[-2000:]
        return self.calls()


def failures(calls: list[Ended], first: float = None) -> list[str]:
    """The calls that did not end with OK, in words."""
    begin = first if first is not None else min((call.at for call in calls), default=0)
    return [
        f"{c.kind} at {c.at - begin:.2f} s after {c.took:.2f} s: {c.code}: {c.details}"
        for c in calls
        if c.code != "OK"
    ]


def p99(calls: list[Ended]) -> float:
    took = sorted(call.took for call in calls)
    return took[len(took) * 99 // 100]


class Driver:
    """The calls of one process."""

    def __init__(self, spec):
        self.flows, self.deadline = spec["flows"], spec["deadline"]
        self.stopping = asyncio.Event()
        self.channels = {}

    async def run(self):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        drivers = []
        for flow in self.flows:
            channel = self.channel(flow)
            if flow["kind"] == "stream":
                drivers += [self.stream(channel) for _ in range(flow["rate"])]
            elif flow["kind"] == "answer":
                drivers += [self.answers(flow, channel) for _ in range(flow["rate"])]
            else:
                drivers.append(self.arrivals(flow, channel))
        await asyncio.gather(*drivers)
        for channel in self.channels.values():
            await channel.close()

    def channel(self, flow):
        key = (flow["target"], flow.get("ca"))
        if key not in self.channels:
            self.channels[key] = open_channel(*key)
        return self.channels[key]

    async def arrivals(self, flow, channel):
        """Open loop: one call after the other is begun, however long they take."""
        kinds = {
            "unary": lambda: Unary(channel),
            "infer": lambda: Infer(channel, flow["model"]),
            "fresh": lambda: Fresh(flow),
        }
        method = kinds[flow["kind"]]()
        tasks, due = set(), time.monotonic()
        while not self.stopping.is_set():
            due += 1 / flow["rate"]
            await asyncio.sleep(max(0, due - time.monotonic()))
            task = asyncio.create_task(self.record(flow.get("label", flow["kind"]), method))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def record(self, kind, method):
        at = time.monotonic()
        call = method.begin(self.deadline)
        try:
            await call
        except grpc.RpcError:
            pass
        await report(kind, at, call, 1)

    async def stream(self, channel):
        """A stream that lives as long as this process; it is begun again if it is cut, so that more is seen."""
        while not self.stopping.is_set():
            at, messages = time.monotonic(), 0
            call = Bidi(channel).begin(self.requests())
            try:
                async for _ in call:
                    messages += 1
            except grpc.RpcError:
                pass
            await report("stream", at, call, messages)
            if await call.code() != grpc.StatusCode.OK:
                await asyncio.sleep(STEP_S)

    async def answers(self, flow, channel):
        """One server stream after the other."""
        while not self.stopping.is_set():
            at, messages = time.monotonic(), 0
            call = Answer(channel).begin(flow["messages"], flow["delay_ms"])
            try:
                async for _ in call:
                    messages += 1
            except grpc.RpcError:
                pass
            await report("answer", at, call, messages)
            if await call.code() != grpc.StatusCode.OK:
                await asyncio.sleep(STEP_S)

    async def requests(self):
        while not self.stopping.is_set():
            yield pb.Request(text="tick")
            await asyncio.sleep(STEP_S)


def open_channel(target, ca):
    options = [
        ("grpc.ssl_target_name_override", "localhost"),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        # Two flows to one target are two connections.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if "," in target:
        target = f"ipv4:{target}"
        options.append(("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'))
    if not ca:
        return grpc.aio.insecure_channel(target, options)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes())
    return grpc.aio.secure_channel(target, credentials, options)


class Unary:
    def __init__(self, channel):
        self.method = kinds_pb2_grpc.KindsStub(channel).Unary

    def begin(self, deadline):
        return self.method(pb.Request(delay_ms=5), timeout=deadline)


class Infer:
    """A ModelInfer of one short text, by hand: a bytes tensor called `text_input`, of one element."""

    def __init__(self, channel, model):
        path = "/inference.GRPCInferenceService/ModelInfer"
        self.method = channel.unary_unary(path)
        text = field(8, b"hello")
        tensor = field(1, b"text_input") + field(2, b"BYTES") + field(3, b"\x01") + field(5, text)
        limit = field(1, b"max_tokens") + field(2, b"\x10\x04")
        self.message = field(1, model.encode()) + field(4, limit) + field(5, tensor)

    def begin(self, deadline):
        return self.method(self.message, timeout=deadline)


class Fresh:
    """An inference over a connection of its own."""

    def __init__(self, flow):
        self.flow, self.closing = flow, set()

    def begin(self, deadline):
        channel = open_channel(self.flow["target"], self.flow.get("ca"))
        call = Infer(channel, self.flow["model"]).begin(deadline)
        call.add_done_callback(lambda _: self.close(channel))
        return call

    def close(self, channel):
        closing = asyncio.ensure_future(channel.close())
        self.closing.add(closing)
        closing.add_done_callback(self.closing.discard)


class Bidi:
    def __init__(self, channel):
        self.method = kinds_pb2_grpc.KindsStub(channel).Bidi

    def begin(self, requests):
        return self.method(requests)


class Answer:
    def __init__(self, channel):
        self.method = kinds_pb2_grpc.KindsStub(channel).ServerStream

    def begin(self, messages, delay_ms):
        return self.method(pb.StreamRequest(count=messages, delay_ms=delay_ms))


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, shorter than 128, as protobuf spells it."""
    assert number < 16 and len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


async def report(kind, at, call, messages):
    code, details = await call.code(), await call.details()
    served_by = ""
    for key, value in await call.initial_metadata() or ():
        if key == "x-isobar-served-by":
            served_by = value
    ended = {
        "kind": kind, "at": at, "took": time.monotonic() - at, "code": code.name,
        "details": details or "", "served_by": served_by, "messages": messages,
    }
    print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.environ["ISOBAR_STUBS"])
    from isobar.test.v1 import kinds_pb2 as pb
    from isobar.test.v1 import kinds_pb2_grpc

    asyncio.run(Driver(json.loads(sys.argv[1])).run())
