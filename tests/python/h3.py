"""gRPC over HTTP/3 on aioquic: a client that shares no code with the node."""

import asyncio
import ssl
from contextlib import asynccontextmanager

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.buffer import encode_uint_var
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import (
    ConnectionTerminated,
    QuicEvent,
    StopSendingReceived,
    StreamReset,
)

REQUEST_CANCELLED = 0x10C
LONG = 30


class Reset(Exception):
    """The server reset the stream; the argument is the code."""


class Call:
    """One request stream."""

    def __init__(self, client, stream_id):
        self.client, self.stream_id = client, stream_id
        self.headers, self.trailers = None, None
        self.data = bytearray()
        self.ended, self.reset, self.stopped = False, None, None
        self.changed = asyncio.Condition()

    def send(self, message: bytes, end=False):
        """Sends a gRPC message."""
        framed = b"\x00" + len(message).to_bytes(4, "big") + message
        self.client.http.send_data(self.stream_id, framed, end)
        self.client.transmit()

    def end(self):
        self.client.http.send_data(self.stream_id, b"", True)
        self.client.transmit()

    def cancel(self):
        """What a gRPC client does: reset its half and ask the server to stop."""
        quic = self.client._quic
        quic.reset_stream(self.stream_id, REQUEST_CANCELLED)
        quic.stop_stream(self.stream_id, REQUEST_CANCELLED)
        self.client.transmit()

    async def wait(self, check):
        async with self.changed:
            await asyncio.wait_for(
                self.changed.wait_for(lambda: check() or self.reset is not None), LONG
            )
        if self.reset is not None and not check():
            raise Reset(self.reset)

    async def message(self) -> bytes:
        """The next gRPC message, or None at the end."""

        def ready():
            if len(self.data) >= 5:
                return len(self.data) >= 5 + int.from_bytes(self.data[1:5], "big")
            return self.ended

        await self.wait(ready)
        if not self.data:
            return None
        length = int.from_bytes(self.data[1:5], "big")
        message = bytes(self.data[5 : 5 + length])
        del self.data[: 5 + length]
        return message

    async def finish(self):
        """Everything to the end: messages, status and its message."""
        messages = []
        while (message := await self.message()) is not None:
            messages.append(message)
        last = self.trailers if self.trailers is not None else self.headers
        return messages, int(last.get("grpc-status", -1)), last.get("grpc-message", "")


class Client(QuicConnectionProtocol):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.http = H3Connection(self._quic)
        self.calls = {}
        self.notifying = set()
        self.terminated = None

    def quic_event_received(self, event: QuicEvent):
        if isinstance(event, ConnectionTerminated):
            self.terminated = event
            for call in self.calls.values():
                call.reset = event.error_code
                self.notify(call)
        elif isinstance(event, (StreamReset, StopSendingReceived)):
            call = self.calls.get(event.stream_id)
            if call is not None:
                if isinstance(event, StreamReset):
                    call.reset = event.error_code
                else:
                    call.stopped = event.error_code
                self.notify(call)
        for happened in self.http.handle_event(event):
            call = self.calls.get(getattr(happened, "stream_id", None))
            if call is None:
                continue
            if isinstance(happened, HeadersReceived):
                fields = {k.decode(): v.decode() for k, v in happened.headers}
                if call.headers is None:
                    call.headers = fields
                else:
                    call.trailers = fields
                call.ended |= happened.stream_ended
            elif isinstance(happened, DataReceived):
                call.data += happened.data
                call.ended |= happened.stream_ended
            self.notify(call)

    def notify(self, call):
        async def notify():
            async with call.changed:
                call.changed.notify_all()

        # The loop holds tasks weakly; the set holds them until they are done.
        task = asyncio.ensure_future(notify())
        self.notifying.add(task)
        task.add_done_callback(self.notifying.discard)

    def start(self, path: str, metadata=(), authority="localhost", content_type="application/grpc"):
        """Opens a stream and sends the head of a request."""
        stream_id = self._quic.get_next_available_stream_id()
        call = self.calls[stream_id] = Call(self, stream_id)
        head = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", authority.encode()),
            (b":path", path.encode()),
            (b"te", b"trailers"),
            (b"content-type", content_type.encode()),
        ]
        head += [(k.encode(), v.encode()) for k, v in metadata]
        self.http.send_headers(stream_id, head)
        self.transmit()
        return call

    async def unary(self, path: str, message: bytes, metadata=()):
        call = self.start(path, metadata)
        call.send(message, end=True)
        return call, *await call.finish()

    def raw_frame(self, call: Call, kind: int, payload: bytes):
        """A frame of any type on a request stream."""
        frame = encode_uint_var(kind) + encode_uint_var(len(payload)) + payload
        self._quic.send_stream_data(call.stream_id, frame)
        self.transmit()

    def raw_uni(self, payload: bytes):
        """A unidirectional stream of any content."""
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional=True)
        self._quic.send_stream_data(stream_id, payload)
        self.transmit()


@asynccontextmanager
async def connected(address: str, ca):
    """A connection to a node that is verified against `ca`."""
    host, port = address.rsplit(":", 1)
    configuration = QuicConfiguration(
        alpn_protocols=H3_ALPN, is_client=True, verify_mode=ssl.CERT_REQUIRED, server_name="localhost"
    )
    configuration.load_verify_locations(cafile=str(ca))
    async with connect(
        host, int(port), configuration=configuration, create_protocol=Client
    ) as client:
        yield client
