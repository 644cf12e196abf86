"""A double of a node: with a certificate that is good, a card it signs itself, and whatever it is told to say. It shares no
code with the node: QUIC by aioquic, packets of SWIM by hand as docs/wire.md has them.
"""

import asyncio
import hashlib
import os
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from aioquic.asyncio import connect
from aioquic.quic.events import DatagramFrameReceived
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError
from meshes import MESH, at
from nodes import LONG
from strangers import GOSSIP, Client, Credentials, configuration, mesh_pb

ECDSA_P256_SHA256 = 0x0403
REGION, RELAYS = mesh_pb.POOL_REGION, mesh_pb.POOL_RELAYS

# Kinds of packets, and states of members.
PING, ACK, ANNOUNCE, GOSSIP_KIND = 1, 2, 7, 9
ALIVE, SUSPECT, DOWN = 1, 2, 3
UPDATES_MAX = 36


@dataclass(frozen=True)
class Pair:
    """A node as it stands on one of its cards."""

    id: bytes
    epoch: int
    bump: int = 0

    def write(self) -> bytes:
        return self.id + struct.pack(">QH", self.epoch, self.bump)

    @staticmethod
    def read(octets: bytes) -> "Pair":
        return Pair(octets[:16], *struct.unpack(">QH", octets[16:26]))


def node_id(name: str, region: str, mesh=MESH) -> bytes:
    return hashlib.sha256(f"spiffe://{mesh}/node/{region}/{name}".encode()).digest()[:16]


def packet(kind: int, src: Pair, dst: Pair, updates=(), number=0, incarnation=0) -> bytes:
    """A packet of SWIM that names no third node; updates are (pair, incarnation, state)."""
    header = bytes([kind, number]) + src.write() + struct.pack(">H", incarnation) + dst.write()
    said = [pair.write() + struct.pack(">HB", count, state) for pair, count, state in updates]
    return header + struct.pack(">H", len(said)) + b"".join(said)


def announce(src: Pair, dst: Pair) -> bytes:
    """What asks to be a member; it has no place for updates."""
    return packet(ANNOUNCE, src, dst)[:-2]


def sign(card: bytes, credentials: Credentials, chain=None):
    """A card, signed with a key; `chain` says that it is somebody else's."""
    signature = credentials.key.sign(b"isobar card\0" + card, ec.ECDSA(hashes.SHA256()))
    certificates = chain or [one.public_bytes(Encoding.DER) for one in credentials.chain]
    return mesh_pb.SignedCard(
        card=card, signature=signature, scheme=ECDSA_P256_SHA256, certificates=certificates
    )


def frame(**body) -> bytes:
    return mesh_pb.Frame(**body).SerializeToString()


def swim(said: bytes, pool=REGION) -> bytes:
    return frame(swim=mesh_pb.Swim(pool=pool, packet=said))


class Line(Client):
    """A link to a node. It answers as a node does: to pings, and to those who ask for its card, descriptor or load."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.double, self.hello, self.frames, self.read_already = None, None, [], set()
        self.cards = []

    def quic_event_received(self, event):
        super().quic_event_received(event)
        if isinstance(event, DatagramFrameReceived):
            self.heard(event.data)
        for stream in self.ended - self.read_already:
            self.read_already.add(stream)
            self.heard(bytes(self.received.pop(stream, b"")))

    def heard(self, octets: bytes):
        said = mesh_pb.Frame()
        with suppress(DecodeError):
            said.ParseFromString(octets)
        kind = said.WhichOneof("body")
        if kind == "hello":
            self.hello = said.hello
        if kind == "cards" and self.hello:
            mine = self.hello.card.certificates
            self.cards = [one for one in said.cards.cards if one.certificates == mine] or self.cards
        # Enough to know what is said; nobody reads thousands.
        self.frames = [*self.frames[-999:], said]
        if self.double and self.hello:
            for answer in self.double.answers(self, kind, said):
                self.send(answer)

    def send(self, said: bytes):
        """A datagram where it fits, a stream where not."""
        if len(said) <= 1150:
            self._quic.send_datagram_frame(said)
            self.transmit()
        else:
            self.say(said)

    @property
    def pair(self) -> Pair:
        """The node at the other end, by the newest of its cards."""
        return max(map(self.read_pair, [self.hello.card, *self.cards]), key=lambda pair: pair.bump)

    def read_pair(self, signed) -> Pair:
        card = mesh_pb.Card()
        card.ParseFromString(signed.card)
        return Pair(node_id(self.hello.node, self.hello.region), card.epoch, card.bump)


class Double:
    """A node of the mesh with a tongue of its own. It runs in a thread; it dials, and is dialled by nobody."""

    def __init__(self, credentials: Credentials, name: str, region: str, engines=(), free=0):
        self.credentials, self.name, self.region, self.free = credentials, name, region, free
        self.epoch, self.sequence = int(time.time() * 1000), 0
        self.pair = Pair(node_id(name, region), self.epoch)
        descriptor = mesh_pb.Descriptor(version=1, engines=engines)
        self.descriptor = descriptor.SerializeToString()
        self.engines = len(engines)
        self.lines, self.contexts = {}, []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def card(self, epoch=None, bump=0) -> bytes:
        return mesh_pb.Card(
            epoch=epoch or self.epoch, bump=bump, peers="127.0.0.1:9", gossip="127.0.0.1:9",
            descriptor_sha256=hashlib.sha256(self.descriptor).digest(), release="double",
            protocol_max=2,
        ).SerializeToString()

    def hello(self) -> bytes:
        said = mesh_pb.Hello(
            trust_domain=MESH, protocol_min=1, protocol_max=2, node=self.name, region=self.region,
            epoch=self.epoch, card=sign(self.card(), self.credentials),
        )
        return frame(hello=said)

    def load(self, epoch=None, slots=None) -> bytes:
        self.sequence += 1
        slots = self.free if slots is None else slots
        engine = mesh_pb.EngineLoad(in_flight=0, slots=slots, service_time_us=1, drain_rate=1e6)
        return frame(load=mesh_pb.Load(
            epoch=epoch or self.epoch, sequence=self.sequence, descriptor_version=1, next_ms=500,
            engines=[engine] * self.engines,
        ))

    def answers(self, line: Line, kind: str, said) -> list[bytes]:
        """What a node answers."""
        if kind == "swim" and said.swim.packet[:1] == bytes([PING]):
            octets = said.swim.packet
            ack = packet(ACK, self.pair, Pair.read(octets[2:28]), number=octets[1])
            return [swim(ack, said.swim.pool)]
        if kind == "cards_ask":
            cards = [sign(self.card(), self.credentials)]
            return [frame(cards=mesh_pb.Cards(pool=said.cards_ask.pool, cards=cards))]
        if kind == "descriptors_ask":
            return [frame(descriptors=mesh_pb.Descriptors(descriptors=[self.descriptor]))]
        if kind == "subscribe" and said.subscribe.wanted:
            return [self.load()]
        return []

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LONG)

    def dial(self, *nodes) -> list[Line]:
        """Links with nodes, at which both have said who they are."""
        for node in nodes:
            self.lines[node.name] = self.run(self.open(node.gossip))
        return list(self.lines.values())

    async def open(self, address: str) -> Line:
        options = {"configuration": configuration(GOSSIP, self.credentials), "create_protocol": Line}
        context = connect(*at(address), wait_connected=False, **options)
        line = await context.__aenter__()
        # Whoever lets go of it closes the connection.
        self.contexts.append(context)
        line.transmit()
        await line.until(lambda: line.shaken)
        line.double = self
        line.say(self.hello())
        await line.until(lambda: line.hello)
        assert line.hello, f"the node turned its double away: {line.why()}"
        return line

    def say(self, line: Line, *frames: bytes):
        """Frames over streams."""
        self.do(line, lambda: [line.say(said) for said in frames])

    def whisper(self, line: Line, *frames: bytes):
        """Frames as datagrams, or streams where they are too long."""
        self.do(line, lambda: [line.send(said) for said in frames])

    def do(self, line: Line, act):
        async def acted():
            # Who was thrown out says nothing any more.
            if not line.terminated:
                act()

        self.run(acted())

    def is_heard(self) -> bool:
        """Whether anybody listens yet."""
        return not all(map(self.is_out, self.lines.values()))

    def is_out(self, line: Line) -> bool:
        return line.terminated is not None

    def end(self):
        async def closed():
            for context in self.contexts:
                await context.__aexit__(None, None, None)

        with suppress(TimeoutError):
            self.run(closed())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(LONG)
        self.loop.close()


def bogus(count: int) -> list[Pair]:
    """Nodes nobody has ever seen."""
    return [Pair(os.urandom(16), int(time.time() * 1000), 0) for _ in range(count)]


def gossip(src: Pair, dst: Pair, updates, incarnation=0) -> list[bytes]:
    """As many packets of gossip as the updates take."""
    parts = [updates[i : i + UPDATES_MAX] for i in range(0, len(updates), UPDATES_MAX)]
    return [swim(packet(GOSSIP_KIND, src, dst, part, incarnation=incarnation)) for part in parts]
