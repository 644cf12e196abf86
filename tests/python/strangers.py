"""Whoever should not get in: certificates of every wrong kind, and clients over TLS, QUIC and enrolment that share no code
with the node."""

import asyncio
import base64
import hashlib
import selectors
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, StreamDataReceived, StreamReset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from meshes import MESH, at
from nodes import LONG, ROOT

GOSSIP, ENROL = "isobar/1", "isobar-enrol/1"
HOUR = timedelta(hours=1)
H2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# Kept for as long as this process lives; what is in it is imported.
STUBS = tempfile.TemporaryDirectory(prefix="isobar-stubs-")


def stubs():
    """The modules of mesh.proto and enrol.proto."""
    files = [f"isobar/mesh/v1/{name}.proto" for name in ("mesh", "enrol")]
    if STUBS.name not in sys.path:
        options = ["-I", ROOT / "proto", f"--python_out={STUBS.name}"]
        command = [sys.executable, "-m", "grpc_tools.protoc", *options, *files]
        subprocess.run([str(part) for part in command], check=True, timeout=LONG)
        sys.path.insert(0, STUBS.name)
    from isobar.mesh.v1 import enrol_pb2, mesh_pb2

    return mesh_pb2, enrol_pb2


mesh_pb, enrol_pb = stubs()


@dataclass
class Credentials:
    """A certificate with its intermediates, its own first, and its key."""

    chain: list
    key: object

    @staticmethod
    def read(directory: Path):
        """What a node or a member has in `cert.pem` and `key.pem`."""
        chain = x509.load_pem_x509_certificates((directory / "cert.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), None)
        return Credentials(chain, key)

    def write(self, directory: Path):
        """Both as files, for whoever reads nothing else."""
        pem = [certificate.public_bytes(serialization.Encoding.PEM) for certificate in self.chain]
        paths = directory / "cert.pem", directory / "key.pem"
        paths[0].write_bytes(b"".join(pem))
        paths[1].write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths


class Issuer:
    """Signs what it is told to, with a certificate and key that lie in files: what a thief of both could do."""

    def __init__(self, cert: Path, key: Path):
        self.chain = x509.load_pem_x509_certificates(cert.read_bytes())
        self.key = serialization.load_pem_private_key(key.read_bytes(), None)

    @staticmethod
    def of(authority):
        return Issuer(authority.online / "issuer.pem", authority.online / "issuer.key")

    def issue(self, member: str, begins=-HOUR, ends=HOUR, mesh=MESH) -> Credentials:
        """A certificate of `member` (role/region/name), from and until so long from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = leaf(member, key, begins, ends, mesh).issuer_name(self.chain[0].subject)
        return Credentials([builder.sign(self.key, hashes.SHA256()), *self.chain], key)


def self_signed(member: str, mesh=MESH) -> Credentials:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = leaf(member, key, -HOUR, HOUR, mesh)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
    return Credentials([builder.issuer_name(name).sign(key, hashes.SHA256())], key)


def leaf(member, key, begins, ends, mesh):
    """Everything a node's certificate says but who signs it."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
    id = x509.UniformResourceIdentifier(f"spiffe://{mesh}/{member}")
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.SubjectAlternativeName([id, x509.DNSName("localhost")]), False)
        .add_extension(x509.ExtendedKeyUsage(usages), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    )


@dataclass
class Outcome:
    """How far somebody got: in, when the other end said something to them; otherwise why not."""

    entered: bool
    why: str = ""


def tcp(address: str, credentials=None, highest=ssl.TLSVersion.TLSv1_3) -> Outcome:
    """Speaks HTTP/2 over TLS with a peers port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.maximum_version = highest
    if credentials:
        with tempfile.TemporaryDirectory() as directory:
            context.load_cert_chain(*credentials.write(Path(directory)))
    try:
        with socket.create_connection(at(address), LONG) as plain, context.wrap_socket(plain) as tls:
            # A client of TLS 1.3 is done before the server has judged its certificate: only an answer shows that it did.
            tls.sendall(H2_HELLO)
            answer = tls.recv(9)
    except TimeoutError:
        raise AssertionError("the port neither answers nor refuses") from None
    except OSError as error:
        return Outcome(False, str(error))
    return Outcome(True) if answer else Outcome(False, "closed")


class Client(QuicConnectionProtocol):
    """A QUIC connection that remembers what it is told."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.shaken, self.terminated, self.reset = False, None, False
        self.received, self.ended = {}, set()
        self.changed = asyncio.Event()

    def quic_event_received(self, event):
        if isinstance(event, HandshakeCompleted):
            self.shaken = True
        elif isinstance(event, ConnectionTerminated):
            self.terminated = event
        elif isinstance(event, StreamReset):
            self.reset = True
        elif isinstance(event, StreamDataReceived):
            known = self.received.setdefault(event.stream_id, bytearray())
            known += event.data
            if event.end_stream:
                self.ended.add(event.stream_id)
        self.changed.set()

    async def until(self, check, within=LONG):
        """Waits until `check` holds or the connection is gone."""
        async with asyncio.timeout(within):
            while not (check() or self.terminated or self.reset):
                self.changed.clear()
                await self.changed.wait()

    def say(self, data: bytes, is_unidirectional=True) -> int:
        stream = self._quic.get_next_available_stream_id(is_unidirectional)
        self._quic.send_stream_data(stream, data, end_stream=True)
        self.transmit()
        return stream

    def why(self) -> str:
        if self.terminated is None:
            return "the stream was reset" if self.reset else ""
        return f"{self.terminated.error_code:#x} {self.terminated.reason_phrase}"


def configuration(alpn: str, credentials=None) -> QuicConfiguration:
    names = H3_ALPN if alpn == "h3" else [alpn]
    found = QuicConfiguration(alpn_protocols=names, is_client=True, verify_mode=ssl.CERT_NONE)
    found.max_datagram_frame_size = 65_536
    if credentials:
        found.certificate, *found.certificate_chain = credentials.chain
        found.private_key = credentials.key
    return found


@asynccontextmanager
async def connected(address: str, alpn: str, credentials=None):
    """A connection, refused or not."""
    options = {"configuration": configuration(alpn, credentials), "create_protocol": Client}
    async with connect(*at(address), wait_connected=False, **options) as client:
        client.transmit()
        await client.until(lambda: client.shaken)
        yield client


async def speak(address: str, alpn: str, credentials, *frames: bytes) -> Outcome:
    async with connected(address, alpn, credentials) as client:
        if alpn == "h3" and not client.terminated:
            H3Connection(client._quic)
            client.transmit()
        for frame in frames:
            if not client.terminated:
                client.say(frame)
        await client.until(lambda: any(client.received.values()))
        if any(client.received.values()) and not client.terminated:
            return Outcome(True)
        return Outcome(False, client.why())


def quic(address: str, credentials=None) -> Outcome:
    """Speaks HTTP/3 with a peers port."""
    return asyncio.run(speak(address, "h3", credentials))


def hello(node: str, region: str, mesh=MESH) -> bytes:
    """The first frame of a link."""
    said = mesh_pb.Hello(
        trust_domain=mesh, protocol_min=1, protocol_max=1, node=node, region=region, epoch=1
    )
    return mesh_pb.Frame(hello=said).SerializeToString()


def gossip(address: str, credentials, frame: bytes | None) -> Outcome:
    """Subscribes at a gossip port, or says nothing there."""
    frames = [] if frame is None else [frame]
    return asyncio.run(speak(address, GOSSIP, credentials, *frames))


def request(padding=0) -> bytes:
    """A request for a certificate (PKCS#10 in DER), of at least `padding` bytes."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = []
    if padding:
        text = "x" * 60
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, text)] * (padding // 60)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def join_request(token: str, node: str, region: str, csr=None) -> bytes:
    join = enrol_pb.Join(token=token, csr=csr or request(), node=node, region=region)
    return enrol_pb.EnrolRequest(join=join).SerializeToString()


def renew_request(csr=None) -> bytes:
    renew = enrol_pb.Renew(csr=csr or request())
    return enrol_pb.EnrolRequest(renew=renew).SerializeToString()


async def ask(address: str, asked: bytes, credentials=None):
    """Asks an authority; its reply, or why there was none."""
    async with connected(address, ENROL, credentials) as client:
        if client.terminated:
            return Outcome(False, client.why())
        stream = client.say(asked, is_unidirectional=False)
        await client.until(lambda: stream in client.ended)
        if stream not in client.ended:
            return Outcome(False, client.why())
        reply = enrol_pb.EnrolReply()
        reply.ParseFromString(bytes(client.received[stream]))
        return reply


def enrol(address: str, asked: bytes, credentials=None):
    return asyncio.run(ask(address, asked, credentials))


def refusal(address: str, asked: bytes, credentials=None) -> str:
    """The one word with which an authority refused."""
    reply = enrol(address, asked, credentials)
    assert not isinstance(reply, Outcome), reply.why
    assert reply.WhichOneof("outcome") == "refused", "a certificate was issued"
    assert reply.refused.why, "it does not say why"
    return reply.refused.reason


class Token:
    """A token taken apart, to be put together again as something else."""

    PREFIX = "isobar-join-1."

    def __init__(self, text: str):
        body = text.removeprefix(self.PREFIX)
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        self.payload = enrol_pb.JoinToken()
        self.payload.ParseFromString(raw[2 : 2 + int.from_bytes(raw[:2], "big")])

    def text(self) -> str:
        payload = self.payload.SerializeToString()
        checksum = hashlib.sha256(payload).digest()[:4]
        raw = len(payload).to_bytes(2, "big") + payload + checksum
        return self.PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Idlers:
    """Connections to an authority that show nothing and ask nothing, each begun again when it was closed; in a thread."""

    def __init__(self, address: str, count: int):
        self.address, self.count, self.opened = address, count, 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join(LONG)

    async def run(self):
        tasks = [asyncio.create_task(self.idle()) for _ in range(self.count)]
        while not self.stopping.is_set():
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(self):
        while True:
            async with connected(self.address, ENROL) as client:
                self.opened += 1
                await client.until(lambda: False)
            await asyncio.sleep(0.05)


@dataclass(eq=False)
class Attempt:
    """One connection that asks an authority for a certificate, driven by hand: thousands of them must not take minutes."""

    address: tuple
    asked: bytes
    sock: socket.socket = None
    quic: QuicConnection = None
    stream: int = None
    answer: bytearray = field(default_factory=bytearray)
    ended: str = ""

    def begin(self):
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.connect(self.address)
        self.quic = QuicConnection(configuration=configuration(ENROL))
        self.quic.connect(self.address, time.monotonic())
        self.send()
        return self

    def send(self):
        for datagram, _ in self.quic.datagrams_to_send(time.monotonic()):
            try:
                self.sock.send(datagram)
            except OSError:
                # A full buffer is a lost datagram.
                pass

    def read(self):
        try:
            while not self.ended:
                datagram = self.sock.recv(2048)
                self.quic.receive_datagram(datagram, self.address, time.monotonic())
        except BlockingIOError:
            pass
        except OSError as error:
            self.ended = f"no answer: {error}"
        self.look()

    def look(self):
        while event := self.quic.next_event():
            if isinstance(event, HandshakeCompleted):
                self.stream = self.quic.get_next_available_stream_id()
                self.quic.send_stream_data(self.stream, self.asked, end_stream=True)
            elif isinstance(event, StreamDataReceived) and event.stream_id == self.stream:
                self.answer += event.data
                if event.end_stream:
                    self.ended = reason(bytes(self.answer))
                    self.quic.close()
            elif isinstance(event, ConnectionTerminated):
                self.ended = self.ended or f"closed: {event.reason_phrase}"
        self.send()

    def tick(self, now):
        timer = self.quic.get_timer()
        if timer is not None and timer <= now:
            self.quic.handle_timer(now)
            self.look()


def reason(answer: bytes) -> str:
    reply = enrol_pb.EnrolReply()
    reply.ParseFromString(answer)
    return reply.refused.reason if reply.HasField("refused") else "issued"


def flood(address: str, asked: bytes, count: int, in_flight: int, within: float) -> Counter:
    """Asks `count` times, so many at once, and counts how that ended; what has not ended `within` seconds fails."""
    deadline, begun, ended = time.monotonic() + within, 0, Counter()
    selector, attempts = selectors.DefaultSelector(), set()
    try:
        while begun < count or attempts:
            while begun < count and len(attempts) < in_flight:
                attempt = Attempt(at(address), asked).begin()
                selector.register(attempt.sock, selectors.EVENT_READ, attempt)
                attempts.add(attempt)
                begun += 1
            for key, _ in selector.select(0.02):
                key.data.read()
            now = time.monotonic()
            assert now < deadline, f"{begun} were begun in {within} s: {ended}"
            for attempt in list(attempts):
                attempt.tick(now)
                if attempt.ended:
                    selector.unregister(attempt.sock)
                    attempt.sock.close()
                    attempts.discard(attempt)
                    ended[attempt.ended] += 1
    finally:
        for attempt in attempts:
            attempt.sock.close()
        selector.close()
    return ended
