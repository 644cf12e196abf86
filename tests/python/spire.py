"""A SPIRE agent as far as a workload sees it: the SPIFFE Workload API on a Unix socket. Its messages are put together here byte
by byte, so that it shares no code with what it is asked by."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from pki import Certified

SERVICE, METHOD = "SpiffeWorkloadAPI", "FetchX509SVID"


@dataclass
class Svid:
    """What the agent knows of one workload."""

    id: str
    certified: Certified
    bundle: list

    def encode(self) -> bytes:
        fields = (self.id.encode(), self.certified.der(), self.certified.key_der())
        roots = b"".join(root.der() for root in self.bundle)
        return message(*fields, roots)


def message(*fields: bytes) -> bytes:
    """A protobuf message whose fields 1, 2, … are bytes."""
    return b"".join(field(number, content) for number, content in enumerate(fields, 1))


def field(number: int, content: bytes) -> bytes:
    length, encoded = len(content), bytearray()
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes([number << 3 | 2]) + bytes(encoded) + content


class Agent:
    """An agent that hands out what it is given, and newer ones to whoever listens."""

    def __init__(self, socket: Path):
        self.socket = socket
        self.svids, self.version = [], 0
        self.changed = threading.Condition()
        self.server = None
        # Calls without the header that proves that nobody was tricked into asking.
        self.unmarked = 0

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    def give(self, *svids: Svid):
        with self.changed:
            self.svids, self.version = svids, self.version + 1
            self.changed.notify_all()
        return self

    def start(self):
        self.socket.unlink(missing_ok=True)
        handler = grpc.unary_stream_rpc_method_handler(self.fetch)
        self.server = grpc.server(ThreadPoolExecutor(max_workers=16))
        handlers = grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})
        self.server.add_generic_rpc_handlers((handlers,))
        self.server.add_insecure_port(f"unix:{self.socket}")
        self.server.start()
        return self

    def stop(self):
        """Ends, and everybody's stream with it."""
        if self.server:
            server, self.server = self.server, None
            ended = server.stop(None)
            with self.changed:
                self.changed.notify_all()
            ended.wait()
        self.socket.unlink(missing_ok=True)

    kill = stop

    def fetch(self, _request, context):
        if dict(context.invocation_metadata()).get("workload.spiffe.io") != "true":
            self.unmarked += 1
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
        sent = 0
        while context.is_active() and self.server:
            with self.changed:
                self.changed.wait_for(lambda: self.version > sent or not self.server, timeout=0.2)
                svids, version = self.svids, self.version
            if version > sent:
                if not svids:
                    context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
                yield b"".join(field(1, svid.encode()) for svid in svids)
                sent = version
