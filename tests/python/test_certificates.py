"""Certificates that somebody else keeps: files replaced under a running node, an issuer of a company's own, and what the admin
port says of it all and to whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from meshes import MESH, PORTS, Authority, done, meshes, pair, serves
from netns import Machines
from nodes import pem_of, toml, wait_for
from pki import Authority as Company
from pki import PEM, member, put
from traffic import Traffic, failures

__all__ = ["meshes"]
# Files are looked at every two seconds.
SOON = 5
BEHIND_B = "b.us/service"
GET_IDENTITY = "isobar.admin.v1.Admin/GetIdentity"


def shown(address: str) -> x509.Certificate:
    """The certificate a handshake shows."""
    return x509.load_pem_x509_certificate(pem_of(address).encode())


def shows(address: str, certified, within=SOON):
    wait_for("the newer certificate", lambda: shown(address).serial_number == certified.serial, within)


def add(site, table: str, **keys):
    """Adds a table to a configuration that is written."""
    lines = [f"[{table}]", *(f"{k} = {toml(str(v))}" for k, v in keys.items())]
    site.config.write_text(site.config.read_text() + "\n".join(lines) + "\n")


class Files:
    """Files that are replaced one by one, each at one moment."""

    def __init__(self, directory: Path):
        self.ca, self.cert, self.key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))

    def write(self, root, certified):
        put(self.ca, root.pem())
        put(self.key, certified.key_pem(), secret=True)
        put(self.cert, certified.pem())


class Volume:
    """A secret as Kubernetes mounts it: files are links into a directory, and a link to that directory is replaced."""

    def __init__(self, directory: Path):
        self.directory, self.versions = directory, 0
        self.ca, self.cert, self.key = (directory / name for name in ("ca.crt", "tls.crt", "tls.key"))
        directory.mkdir()

    def write(self, root, certified):
        self.versions += 1
        current = self.directory / f"..v{self.versions}"
        put(current / "ca.crt", root.pem())
        put(current / "tls.crt", certified.pem())
        put(current / "tls.key", certified.key_pem(), secret=True)
        link = self.directory / "..data_tmp"
        link.symlink_to(current.name)
        os.rename(link, self.directory / "..data")
        for path in (self.ca, self.cert, self.key):
            if not path.is_symlink():
                path.symlink_to(f"..data/{path.name}")


class Kept:
    """Nodes a and b whose certificates a company keeps in files; behind b is the service."""

    def __init__(self, meshes, directory, kind):
        self.root = Company("company root")
        self.issuer = Company("issuer", above=self.root, depth=0)
        service = meshes.service("service")
        sites = [meshes.site("a", "eu"), meshes.site("b", "us")]
        a, b = sites
        a.write(peers=[b], plaintext=True)
        b.write(engines=[service.engine()], peers=[a])
        self.files = []
        for site in sites:
            files = kind(directory / f"files-{site.name}")
            files.write(self.root, self.issue(site.name, site.region))
            add(site, "identity", source="files", ca=files.ca, cert=files.cert, key=files.key)
            self.files.append(files)
        self.a, self.b = (meshes.start(site) for site in sites)
        serves(self.a, BEHIND_B)

    def issue(self, name, region):
        return self.issuer.issue(member(name, region), hosts=("localhost", name))


@pytest.mark.parametrize("kind", [Files, Volume])
def test_replaced_files_are_taken_in_under_traffic(meshes, tmp_path, kind):
    kept = Kept(meshes, tmp_path, kind)
    flows = [
        {"kind": "unary", "target": kept.a.plaintext, "rate": 50},
        {"kind": "stream", "target": kept.a.plaintext, "rate": 2},
    ]
    traffic = meshes.keep(Traffic(tmp_path, flows)).begun()
    for _ in range(2):
        for node, files in zip((kept.a, kept.b), kept.files, strict=True):
            newer = kept.issue(node.name, node.region)
            files.write(kept.root, newer)
            shows(node.clients, newer)
    calls = traffic.finish()
    assert len(calls) > 100 and not failures(calls), failures(calls)[:5]
    assert kept.a.renewals() == 2 and not kept.a.alarm()
    assert len([call for call in calls if call.kind == "stream"]) == 2


def test_broken_files_leave_the_earlier_identity_in_use(meshes, tmp_path):
    kept = Kept(meshes, tmp_path, Files)
    files = kept.files[0]
    before = shown(kept.a.clients).serial_number
    newer = kept.issue("a", "eu")
    # The certificate came, and the key is another's.
    put(files.cert, newer.pem())
    wait_for("the failure to be counted", lambda: kept.a.renewals("failed") > 0, SOON)
    assert kept.a.lines("WARN", "the earlier identity stays in use", str(files.key))
    assert shown(kept.a.clients).serial_number == before
    serves(kept.a, BEHIND_B)
    put(files.key, newer.key_pem(), secret=True)
    shows(kept.a.clients, newer)
    # Then no certificate at all.
    put(files.cert, b"half a certif")
    wait_for("the next failure", lambda: kept.a.lines("WARN", "no readable PEM certificate"), SOON)
    assert shown(kept.a.clients).serial_number == newer.serial
    serves(kept.a, BEHIND_B)


def test_files_of_another_node_are_refused_once_and_counted(meshes, tmp_path):
    kept = Kept(meshes, tmp_path, Files)
    before = shown(kept.a.clients).serial_number
    kept.files[0].write(kept.root, kept.issue("z", "eu"))
    wait_for("the failure to be counted", lambda: kept.a.renewals("failed") > 0, 2 * SOON)
    assert shown(kept.a.clients).serial_number == before
    assert len(kept.a.lines("node/eu/z")) == 1


def test_the_certificate_for_clients_is_taken_in(meshes, tmp_path):
    public = Company("public root")
    files = Files(tmp_path / "public")
    files.write(public, public.issue(hosts=("a.example",)))
    authority = meshes.authority()
    site = meshes.site("a", "eu").write(authority)
    add(site, "tls", cert=files.cert, key=files.key)
    node = meshes.start(site)
    of_mesh = shown(node.peers).serial_number
    for _ in range(2):
        newer = public.issue(hosts=("a.example",))
        files.write(public, newer)
        shows(node.clients, newer)
    # One that cannot be used changes nothing, and is said.
    put(files.key, public.issue().key_pem(), secret=True)
    put(files.cert, public.issue(hosts=("b.example",)).pem())
    wait_for("the warning", lambda: node.lines("WARN", "the earlier one stays in use"), SOON)
    assert shown(node.clients).serial_number == newer.serial
    assert shown(node.peers).serial_number == of_mesh and node.popen.poll() is None


class Imported(Authority):
    """An authority that signs with an intermediate of a company's own root."""

    def __init__(self, directory: Path):
        self.directory, self.trust_domain = directory / "ca", MESH
        self.online = self.directory / "authority"
        self.root = Company("company root", depth=2)
        between = Company("company region", above=self.root, depth=1)
        issuer = Company("mesh issuer", above=between, depth=0)
        paths = {name: directory / f"{name}.pem" for name in ("intermediate", "key", "roots")}
        put(paths["intermediate"], b"".join(one.public_bytes(PEM) for one in issuer.below_root()))
        put(paths["key"], issuer.key_pem(), secret=True)
        put(paths["roots"], self.root.pem())
        options = [part for name, path in paths.items() for part in (f"--{name}", path)]
        self.ca("init", "--trust-domain", MESH, *options)


def test_a_company_brings_its_own_intermediate(meshes, tmp_path):
    authority = Imported(tmp_path)
    assert not (authority.directory / "root.key").exists()
    service = meshes.service("service")
    a, b = meshes.site("a", "eu"), meshes.site("b", "us")
    a.write(authority, peers=[b])
    b.write(engines=[service.engine()], peers=[a], seeds=[a])
    running = meshes.start(a)
    b.joined(authority.token("b"), seed=a)
    assert (b.identity / "ca.pem").read_bytes() == authority.root.pem()
    chain = x509.load_pem_x509_certificates((b.identity / "cert.pem").read_bytes())
    assert [one.subject.rfc4514_string() for one in chain[1:]] == ["CN=mesh issuer", "CN=company region"]
    meshes.start(b)
    serves(running, BEHIND_B)


def identity(*how) -> dict:
    """What the admin port says of a node's identity."""
    said = json.loads(done("call", *how, GET_IDENTITY, "--json"))
    return said["calls"][0]["messages"][0]


def test_the_admin_port_says_what_a_handshake_shows(meshes):
    _, a, b = pair(meshes)
    serves(a, BEHIND_B)
    for node in (a, b):
        seen = shown(node.peers)
        told = identity(f"http://{node.info['listen']['admin']}")
        assert told["id"] == member(node.name, node.region)
        for certificate in (told["current"], told["served"]):
            assert int(certificate["serial"], 16) == seen.serial_number
            ends = int(certificate["notAfterS"])
            assert ends == seen.not_valid_after_utc.timestamp()
    assert identity(f"http://{a.info['listen']['admin']}")["isAuthority"] is True


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path / "machines")
    yield machines.machines
    machines.end()


def test_elsewhere_the_admin_port_is_for_operators_only(meshes, machines, tmp_path):
    here, there = machines
    authority = meshes.authority()
    site = meshes.site("a", "eu")
    site.listen = {port: f"10.0.0.1:{8443 + n}" for n, port in enumerate(PORTS)}
    site.write(authority)
    node = here.start("node", *site.command())
    listen = json.loads(node.first_line())["listen"]
    ask = Asking(there, listen["admin"])

    for role in ("operator", "node", "client"):
        authority.ca("issue", "--role", role, "--name", "o", "--region", "eu", "--out", tmp_path / role)
    let_in = ask(tmp_path / "operator")
    assert let_in.returncode == 0, let_in.stderr
    assert member("a", "eu") in let_in.stdout

    directory = tmp_path / "operator"
    own = ["--ca", directory / "ca.pem", "--cert", directory / "cert.pem", "--key", directory / "key.pem"]
    at = ["--admin", listen["admin"], "--server-name", "localhost", "--json"]
    status = there.run("isobar", "status", *at, *own)
    assert json.loads(status.stdout)["node"]["id"] == member("a", "eu"), status.stderr

    assert refused(there, listen) == 0
    for role in ("node", "client"):
        assert ask(tmp_path / role).returncode != 0, f"{role} was let in"
    assert refused(there, listen) >= 2
    # Neither is whoever shows nothing, an operator of another mesh, or who speaks without TLS; on this machine nobody is.
    known = refused(there, listen)
    assert ask(None, tmp_path / "operator").returncode != 0
    stranger = Authority(tmp_path / "other", trust_domain="other.test")
    stranger.ca("issue", "--role", "operator", "--name", "o", "--region", "eu", "--out", tmp_path / "foreign")
    assert ask(tmp_path / "foreign", tmp_path / "operator").returncode != 0
    assert there.run("isobar", "call", f"http://{listen['admin']}", GET_IDENTITY).returncode != 0
    assert Asking(here, listen["admin"])(tmp_path / "client").returncode != 0
    assert refused(there, listen) >= known + 3
    # A certificate that was revoked is none.
    authority.ca("revoke", "eu/o", "--role", "operator")
    wait_for("the revocation", lambda: ask(tmp_path / "operator").returncode != 0)


class Asking:
    """Asks an admin port from a machine with the certificate in a directory."""

    def __init__(self, machine, address: str):
        self.machine, self.address = machine, address

    def __call__(self, directory, believes=None) -> subprocess.CompletedProcess:
        options = ["--ca", (believes or directory) / "ca.pem", "--server-name", "localhost"]
        if directory:
            options += ["--cert", directory / "cert.pem", "--key", directory / "key.pem"]
        return self.machine.run("isobar", "call", self.address, GET_IDENTITY, *options)


def refused(machine, listen) -> float:
    """Whom the admin port turned away."""
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"
    page = machine.run(sys.executable, "-c", script, f"http://{listen['metrics']}/metrics").stdout
    name = 'isobar_strangers_refused_total{port="admin"}'
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))
