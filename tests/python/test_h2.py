"""HTTP/2 on the bare frames, by a client that keeps no deadline and follows no rule of its own accord."""

import socket
import ssl
import time

import h2.config
import h2.connection
import h2.events
from isobar.test.v1 import kinds_pb2 as pb
from nodes import LONG

UNARY = "/isobar.test.v1.Kinds/Unary"
STREAM = "/isobar.test.v1.Kinds/ServerStream"


class Client:
    """One connection to node a."""

    def __init__(self, node):
        context = ssl.create_default_context(cafile=node.ca)
        context.set_alpn_protocols(["h2"])
        host, port = node.clients.rsplit(":", 1)
        raw = socket.create_connection((host, int(port)), timeout=LONG)
        self.socket = context.wrap_socket(raw, server_hostname="localhost")
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.flush()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def call(self, path, message, **headers):
        """Begins a call, its request whole."""
        stream = self.h2.get_next_available_stream_id()
        head = [
            (":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", path),
            ("content-type", "application/grpc"), ("te", "trailers"),
            *((k.replace("_", "-"), v) for k, v in headers.items()),
        ]
        self.h2.send_headers(stream, head)
        data = message.SerializeToString()
        self.h2.send_data(stream, b"\x00" + len(data).to_bytes(4, "big") + data, end_stream=True)
        self.flush()
        return stream

    def events(self):
        """What comes next; flow control windows stay as they are."""
        data = self.socket.recv(1 << 16)
        assert data, "the connection ended"
        events = self.h2.receive_data(data)
        self.flush()
        return events

    def status(self, stream):
        """The gRPC status a call ends with."""
        while True:
            for event in self.events():
                if getattr(event, "stream_id", None) != stream:
                    continue
                assert not isinstance(event, h2.events.StreamReset), event
                fields = dict(getattr(event, "headers", None) or ())
                if "grpc-status" in fields:
                    return int(fields["grpc-status"])


def test_the_node_keeps_the_deadline_itself(world):
    client = Client(world.a)
    began = time.monotonic()
    stream = client.call(UNARY, pb.Request(delay_ms=60_000), grpc_timeout="100m")
    assert client.status(stream) == 4
    assert 0.09 < time.monotonic() - began < 5


def test_a_deadline_in_mid_stream_is_kept_too(world):
    client = Client(world.a)
    message = pb.StreamRequest(count=1000, delay_ms=20)
    stream = client.call(STREAM, message, grpc_timeout="300m")
    assert client.status(stream) == 4


def test_a_client_that_reads_nothing_holds_no_slot_beyond_its_deadline(own_world):
    """Its window fills, and nobody polls the reply any more."""
    from nodes import wait_for

    client = Client(own_world.a)
    message = pb.StreamRequest(count=1000, payload_bytes=100_000)
    client.call(STREAM, message, grpc_timeout="1S")
    engine = 'isobar_engine_calls_in_flight{engine="service"}'
    wait_for("the call", lambda: own_world.b.metric(engine) == 1)
    wait_for("its end", lambda: own_world.b.metric(engine) == 0, 10)
    ended = 'isobar_calls_total{side="ingress",code="DEADLINE_EXCEEDED"}'
    wait_for("the books", lambda: own_world.a.metric(ended) == 1, 10)


def test_a_timeout_nobody_can_read_is_the_callers_fault(world):
    client = Client(world.a)
    assert client.status(client.call(UNARY, pb.Request(), grpc_timeout="soon")) == 3
