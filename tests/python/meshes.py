"""Meshes with an authority: a directory that `isobar ca init` made, nodes that hold it or joined with a token, and what
can be seen of them from outside."""

import json
import random
import re
import shutil
import socket
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc
from nodes import (
    BINARY,
    LONG,
    Node,
    Process,
    Service,
    SimEngine,
    start_environment,
    toml,
    wait_for,
)

MESH = "mesh.test"
PORTS = ("clients", "peers", "gossip", "metrics", "admin")
# Lets everybody call: who may call is what other tests are about.
DEV = ["--dev"]


def environment(**more) -> dict:
    """What isobar is started with."""
    return start_environment("info", **more)


def isobar(*arguments, cwd=None, text=None):
    """Runs a command of the real binary to its end."""
    return subprocess.run(
        [BINARY, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LONG,
        cwd=cwd,
        input=text if text is not None else "",
        env=environment(),
    )


def done(*arguments, **options) -> str:
    """What a command that has to work printed."""
    result = isobar(*arguments, **options)
    assert result.returncode == 0, f"{result.args[1:3]}: {result.stderr}{result.stdout}"
    return result.stdout


GIVEN = set()


def free_address() -> str:
    """An address nobody has, neither over TCP nor over UDP, apart from the ports that dialling takes; another each time."""
    for _ in range(200):
        address = ("127.0.0.1", random.randrange(20_000, 30_000))
        if address in GIVEN:
            continue
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        try:
            for kind in kinds:
                with socket.socket(socket.AF_INET, kind) as probe:
                    probe.bind(address)
        except OSError:
            continue
        GIVEN.add(address)
        return f"{address[0]}:{address[1]}"
    raise AssertionError("no free port")


def at(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)


class Authority:
    """The authority of a mesh: the whole directory, root and all."""

    def __init__(self, directory: Path, life=None, trust_domain=MESH):
        self.directory, self.trust_domain = Path(directory), trust_domain
        self.online = self.directory / "authority"
        arguments = ["--life", life] if life else []
        self.ca("init", "--trust-domain", trust_domain, *arguments)

    def ca(self, command, *arguments) -> str:
        return done("ca", command, *arguments, "--dir", self.directory)

    def token(self, node=None, region="us", **options) -> str:
        """The text of a token; `name_pattern="gpu-*", uses=3` instead of a name makes one for several."""
        arguments = ["--node", node] if node else []
        for name, value in options.items():
            arguments += ["--" + name.replace("_", "-"), value]
        said = json.loads(self.ca("token", "--region", region, *arguments, "--json"))
        return said["token"]

    def revoke(self, member: str):
        self.ca("revoke", member)

    def rotate(self) -> str:
        """Does the next step of changing the root and says which; nothing while it is too early."""
        result = isobar("ca", "rotate", "--dir", self.directory, "--json")
        if result.returncode == 0:
            return json.loads(result.stdout)["done"]
        assert result.returncode == 1 and "--now" in result.stderr, result.stderr
        return ""

    def audit(self, **wanted) -> list[dict]:
        """The lines of the records, of what was done and then of what was refused, that say `wanted`."""
        entries = [json.loads(line) for line in self.records().splitlines()]
        return [e for e in entries if all(e.get(k) == v for k, v in wanted.items())]

    def records(self) -> str:
        """What was done, then what was refused."""
        paths = [self.online / name for name in ("audit.log", "refused.log")]
        return "".join(path.read_text() for path in paths if path.exists())


class Site:
    """The place of a node: its directory, its configuration and its ports. It may or may not run there."""

    def __init__(self, directory: Path, name: str, region: str, trust_domain=MESH):
        self.directory, self.name, self.region = Path(directory), name, region
        self.trust_domain = trust_domain
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config = self.directory / "isobar.toml"
        self.state = self.directory / "state"
        self.identity = self.state / "identity"
        self.listen = {port: free_address() for port in PORTS}
        self.starts = 0
        self.members = {}

    def write(self, authority=None, engines=(), peers=(), seeds=(), plaintext=False):
        """The configuration; `authority` is held by this node, `seeds` are sites that hold one."""
        self.members = {
            "authority": authority, "engines": engines, "peers": peers, "seeds": seeds,
            "plaintext": plaintext,
        }
        if plaintext and "plaintext" not in self.listen:
            self.listen["plaintext"] = free_address()
        seeds = [seed.listen["gossip"] for seed in seeds]
        node = {"name": self.name, "region": self.region, "state_dir": str(self.state)}
        tables = [
            ("[node]", {**node, "drain_timeout": "5s"}),
            ("[listen]", self.listen),
            ("[mesh]", {"trust_domain": self.trust_domain, "seeds": seeds}),
            ("[authority]", {"dir": str(authority.online)} if authority else {}),
            ("[routing]", {"idempotent": ["isobar.test.v1.Kinds/Unary"]}),
        ]
        tables += [("[[mesh.peer]]", peer.as_peer()) for peer in peers]
        tables += [("[[engine]]", engine) for engine in engines]
        lines = []
        for head, keys in tables:
            lines += [head] + [f"{key} = {toml(value)}" for key, value in keys.items()]
        self.config.write_text("\n".join(lines) + "\n")
        return self

    def as_peer(self) -> dict:
        """How others list it."""
        own = {"name": self.name, "region": self.region}
        return {**own, "peers": self.listen["peers"], "gossip": self.listen["gossip"]}

    def join(self, token: str, *arguments, seed=None):
        """`isobar join` in this place; returns how it ended."""
        seed = [seed.listen["gossip"]] if seed else []
        places = ["--config", self.config, "--state-dir", self.state]
        return isobar("join", "--token", token, *seed, *places, *arguments, cwd=self.directory)

    def joined(self, token: str, *arguments, seed=None):
        """`isobar join` that has to work."""
        result = self.join(token, *arguments, seed=seed)
        assert result.returncode == 0, result.stderr
        return self

    def command(self) -> list:
        return [BINARY, "node", "-c", self.config, "--json", *DEV]

    def start_fails(self):
        """Starts a node that must end by itself, and returns how it ended."""
        return isobar(*self.command()[1:], cwd=self.directory)

    def certificate(self) -> x509.Certificate:
        """The certificate the node has on disk."""
        return x509.load_pem_x509_certificates((self.identity / "cert.pem").read_bytes())[0]

    def age(self) -> float:
        """Which part of the life of its certificate is over, counted from when it was asked for."""
        certificate = self.certificate()
        until = certificate.not_valid_after_utc
        # Certificates begin a quarter of their life early, for clocks that are behind.
        life = (until - certificate.not_valid_before_utc) * 4 / 5
        return 1 - (until - datetime.now(UTC)) / life


class MeshNode(Node):
    """`isobar node` at a site."""

    def __init__(self, site: Site):
        self.site, self.name, self.region = site, site.name, site.region
        site.starts += 1
        name = f"{site.name}-{site.starts}"
        options = {"env": environment(), "cwd": site.directory}
        Process.__init__(self, name, site.directory, site.command(), **options)
        # Process calls itself after its files; others know the node by its name.
        self.name = site.name
        try:
            self.info = json.loads(self.first_line())
        except BaseException:
            self.kill()
            raise
        listening = self.info["listen"]
        self.clients, self.peers = listening["clients"], listening["peers"]
        self.gossip, self.plaintext = listening["gossip"], listening.get("plaintext")
        self.metrics_address = listening["metrics"]
        self.ca = Path(self.info["ca"])

    def as_peer(self) -> dict:
        return self.site.as_peer()

    def lines(self, *parts: str) -> list[dict]:
        """The lines of its log in which all of `parts` occur, as objects; its errors and warnings are among them."""
        found = []
        for line in self.err.read_text(errors="replace").splitlines():
            if line.startswith("{") and all(part in line for part in parts):
                found.append(json.loads(line))
        return found

    def counts(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric by one label."""
        found = {}
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + "{"):
                value = re.search(label + '="([^"]*)"', line)
                found[value.group(1)] = float(line.rsplit(" ", 1)[1])
        return found

    def strangers(self, port: str) -> float:
        """Whom it turned away at `peers` or `gossip`."""
        return self.metric(f'isobar_strangers_refused_total{{port="{port}"}}')

    def enrolments(self, outcome: str) -> float:
        return self.metric(f'isobar_enrolments_total{{outcome="{outcome}"}}')

    def renewals(self, outcome="done") -> float:
        return self.metric(f'isobar_certificate_renewals_total{{outcome="{outcome}"}}')

    def alarm(self) -> bool:
        return self.metric("isobar_certificate_alarm") == 1

    def channel(self):
        """A channel to its port for clients, who believe what the mesh believes now."""
        options = [("grpc.ssl_target_name_override", "localhost")]
        credentials = grpc.ssl_channel_credentials(self.ca.read_bytes())
        return grpc.secure_channel(self.clients, credentials, options)


class Meshes:
    """Whatever a test starts, ended whatever happens."""

    def __init__(self, directory: Path):
        self.directory, self.started = Path(directory), []

    def keep(self, process):
        self.started.append(process)
        return process

    def authority(self, name="ca", life=None, trust_domain=MESH) -> Authority:
        return Authority(self.directory / name, life, trust_domain)

    def site(self, name: str, region: str, trust_domain=MESH) -> Site:
        return Site(self.directory / f"{region}-{name}", name, region, trust_domain)

    def service(self, name: str, **options) -> Service:
        return self.keep(Service(self.directory, name, **options))

    def engine(self, name: str, model: str, **options) -> SimEngine:
        return self.keep(SimEngine(self.directory, name, model, **options))

    def start(self, site: Site) -> MeshNode:
        return self.keep(MeshNode(site))

    def end(self):
        for process in reversed(self.started):
            process.kill()

    def outputs(self) -> str:
        """Everything every process wrote."""
        written = [*self.directory.rglob("*.out"), *self.directory.rglob("*.err")]
        return "\n".join(path.read_text(errors="replace") for path in written)


@pytest.fixture
def meshes(tmp_path):
    meshes = Meshes(tmp_path)
    yield meshes
    meshes.end()


def pair(meshes: Meshes, life=None):
    """Node a, which holds the authority, and node b, which joined and has the engine; both run, and a knows b."""
    authority = meshes.authority(life=life)
    service = meshes.service("service")
    a, b = meshes.site("a", "eu"), meshes.site("b", "us")
    a.write(authority, peers=[b])
    b.write(engines=[service.engine()], peers=[a], seeds=[a])
    running = meshes.start(a)
    b.joined(authority.token("b"), seed=a)
    return authority, running, meshes.start(b)


def call(node: MeshNode, timeout=LONG) -> str:
    """A unary call that has to work; returns who served it."""
    with node.channel() as channel:
        stub = kinds_pb2_grpc.KindsStub(channel)
        reply, ended = stub.Unary.with_call(pb.Request(text="hello"), timeout=timeout)
        assert reply.text == "hello"
        return dict(ended.initial_metadata())["x-isobar-served-by"]


def try_call(node: MeshNode, timeout=LONG):
    """A unary call that may fail: who served it, or its error."""
    try:
        return call(node, timeout)
    except grpc.RpcError as error:
        return error


def serves(node: MeshNode, by: str):
    """Waits until calls at `node` are served by `by`."""
    wait_for(f"calls from {node.name} to {by}", lambda: try_call(node, 5) == by)


def key_bodies(directory: Path) -> list[str]:
    """The lines of every private key below a directory: none of them may turn up in an output."""
    lines = []
    for path in [*directory.rglob("*.key"), *directory.rglob("key.pem")]:
        lines += [line for line in path.read_text().splitlines() if line and "-----" not in line]
    return lines


def pieces(token: str) -> list[str]:
    """Pieces of a token from which somebody could put it together."""
    body = token.split(".", 1)[1]
    return [body[i : i + 24] for i in range(0, len(body) - 24, 12)]


def assert_unseen(text: str, *tokens: str):
    """No piece of any token is in `text`."""
    for token in tokens:
        assert not [piece for piece in pieces(token) if piece in text], "a token was shown"


def copy(directory: Path, name: str) -> Path:
    """A copy of a directory as it is now, in a place of its own."""
    kept = Path(tempfile.mkdtemp(dir=directory.parent)) / name
    shutil.copytree(directory, kept)
    return kept
