"""Load by grpc.aio, open loop (arrivals do not wait for replies) or closed, in a thread of its own while a test breaks things."""

import asyncio
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

import grpc
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc

OK = grpc.StatusCode.OK


@dataclass
class Call:
    """One call that ended."""

    kind: str
    name: str
    at: float
    took: float
    code: grpc.StatusCode
    details: str
    served_by: str
    messages: int


@dataclass
class Load:
    """Calls to nodes over one channel that spreads over all of them.

    `unary`, `once` and `streams` are per second: idempotent unary calls, calls that may run only once (client streams of one
    message), and server streams. `closed` keeps so many unary calls in progress instead.
    """

    nodes: list
    unary: float = 0
    once: float = 0
    closed: int = 0
    streams_open: int = 0
    delay_ms: int = 10
    stream_messages: int = 100
    stream_delay_ms: int = 100
    deadline: float = 5.0
    calls: list = field(default_factory=list)

    def start(self):
        self.stopping = False
        self.began = time.monotonic()
        self.failure = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        """Ends the arrivals, waits for what is in progress and returns every call."""
        self.stopping = True
        self.thread.join(120)
        assert not self.thread.is_alive(), "calls are still in progress"
        if self.failure:
            raise self.failure
        return self.calls

    def now(self) -> float:
        return time.monotonic() - self.began

    def run(self):
        try:
            asyncio.run(self.drive())
        except Exception as failure:
            self.failure = failure

    async def drive(self):
        credentials = grpc.ssl_channel_credentials(self.nodes[0].ca.read_bytes())
        targets = ",".join(node.clients for node in self.nodes)
        options = [
            ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
            ("grpc.ssl_target_name_override", "localhost"),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        target = f"ipv4:{targets}"
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            self.stub = kinds_pb2_grpc.KindsStub(channel)
            drivers = [self.open_loop(self.unary, self.one_unary)]
            drivers += [self.open_loop(self.once, self.one_once)]
            drivers += [self.one_after_another(self.one_unary) for _ in range(self.closed)]
            drivers += [self.one_after_another(self.one_stream) for _ in range(self.streams_open)]
            await asyncio.gather(*drivers)

    async def open_loop(self, per_second, call):
        if not per_second:
            return
        tasks = set()
        due = time.monotonic()
        while not self.stopping:
            due += 1 / per_second
            await asyncio.sleep(max(0, due - time.monotonic()))
            task = asyncio.create_task(call())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def one_after_another(self, call):
        while not self.stopping:
            if await call() != OK:
                await asyncio.sleep(0.02)

    async def one_unary(self):
        def call(metadata):
            request = pb.Request(delay_ms=self.delay_ms)
            return self.stub.Unary(request, timeout=self.deadline, metadata=metadata)

        return await self.record("unary", call)

    async def one_once(self):
        def call(metadata):
            requests = iter([pb.Request(delay_ms=self.delay_ms)])
            return self.stub.ClientStream(requests, timeout=self.deadline, metadata=metadata)

        return await self.record("once", call)

    async def one_stream(self):
        def call(metadata):
            request = pb.StreamRequest(count=self.stream_messages, delay_ms=self.stream_delay_ms)
            return self.stub.ServerStream(request, metadata=metadata)

        return await self.record("stream", call)

    async def record(self, kind, make):
        name = uuid.uuid4().hex
        at = self.now()
        call = make((("x-call-id", name),))
        messages = 0
        try:
            if kind == "stream":
                async for _ in call:
                    messages += 1
            else:
                await call
                messages = 1
        except grpc.RpcError:
            pass
        code, details = await call.code(), await call.details()
        served_by = ""
        for key, value in await call.initial_metadata() or ():
            if key == "x-isobar-served-by":
                served_by = value
        took = self.now() - at
        self.calls.append(Call(kind, name, at, took, code, details, served_by, messages))
        return code


def failed(calls, *kinds):
    """The calls of these kinds that did not end with OK, in words."""
    return [
        f"{call.kind} at {call.at:.2f} s after {call.took:.2f} s: {call.code.name}: {call.details}"
        for call in calls
        if call.kind in kinds and call.code != OK
    ]


def shares(calls):
    """Which share of the good calls each engine served."""
    served = Counter(call.served_by for call in calls if call.code == OK)
    total = sum(served.values())
    return {by: count / total for by, count in served.items()}
