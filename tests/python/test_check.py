"""`isobar check`: what it finds, and that it finds nothing where nothing is wrong."""

import datetime
import ipaddress
import json
import re
import socket
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faults import Relay
from nodes import BINARY, LONG, ROOT, Node, free_port, toml

LEVELS = {"ok", "note", "warning", "error"}
PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()


def run(*arguments, cwd=None):
    return subprocess.run(
        [BINARY, "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LONG,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin"},
    )


class Report:
    """What a check of a configuration found."""

    def __init__(self, config, *arguments):
        done = run("-c", config, "--json", "--timeout", "1500ms", *arguments)
        assert done.returncode in (0, 1), done.stderr
        self.code = done.returncode
        told = json.loads(done.stdout)
        self.ok, self.findings = told["ok"], told["findings"]
        assert self.ok == (self.code == 0)
        assert "PRIVATE KEY" not in done.stdout + done.stderr
        for finding in self.findings:
            assert set(finding) == {"level", "check", "subject", "what", "remedy", "see"}
            assert finding["level"] in LEVELS and finding["remedy"] and finding["what"]

    def of(self, check, level=None):
        """The findings of one check that are not ok, or of one level."""
        return [
            f
            for f in self.findings
            if f["check"] == check
            and (f["level"] == level if level else f["level"] != "ok")
        ]

    def one(self, check, level):
        found = self.of(check, level)
        assert len(found) == 1, self.findings
        return found[0]

    def errors(self):
        return [f for f in self.findings if f["level"] == "error"]


def configuration(
    directory, name, listen=None, peers=(), engines=(), region="eu", tls=None, seeds=(), tables=None, **keys
):
    ports = {a: "127.0.0.1:0" for a in ("clients", "peers", "gossip", "metrics", "admin")}
    ports.update(listen or {})
    lines = ["[node]", f'name = "{name}"', f'region = "{region}"']
    lines += [f"{k} = {toml(str(v))}" for k, v in keys.items()]
    lines += ["[listen]"] + [f"{k} = {toml(v)}" for k, v in ports.items() if v]
    if tls:
        lines += ["[tls]"] + [f"{k} = {toml(str(v))}" for k, v in tls.items()]
    for table, entries in (tables or {}).items():
        lines += [f"[{table}]"] + [f"{k} = {toml(v)}" for k, v in entries.items()]
    lines += ["[mesh]", 'trust_domain = "mesh.test"', f"seeds = {toml(list(seeds))}"]
    for key, entries in (("mesh.peer", peers), ("engine", engines)):
        for entry in entries:
            lines += [f"[[{key}]]"] + [f"{k} = {toml(v)}" for k, v in entry.items()]
    path = directory / f"{name}-check.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def certified(ca, directory, name, left, life):
    """A certificate of node eu/`name` with its key and roots in `directory`, as an authority of long ago made it."""
    directory.mkdir(parents=True)
    root = x509.load_pem_x509_certificate((ca / "ca.pem").read_bytes())
    signer = serialization.load_pem_private_key((ca / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    until = datetime.datetime.now(datetime.timezone.utc) + left
    uses = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    names = [x509.UniformResourceIdentifier(f"spiffe://mesh.test/node/eu/{name}")]
    names += [x509.DNSName(host) for host in ("localhost", name)]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(until - life)
        .not_valid_after(until)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes((ca / "ca.pem").read_bytes())
    (directory / "cert.pem").write_bytes(certificate.public_bytes(PEM))
    key_path = directory / "key.pem"
    key_path.touch(0o600)
    key_path.write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))


def dev_ca(directory, *names):
    nodes = [part for name in names for part in ("--node", f"eu/{name}")]
    subprocess.run(
        [BINARY, "ca", "dev", "--dir", directory, "--trust-domain", "mesh.test", *nodes],
        check=True,
        capture_output=True,
        timeout=LONG,
    )
    return directory


@pytest.fixture
def pair(tmp_path):
    """Two running nodes that list each other's like, and the configuration with the ports of the first."""
    ca = tmp_path / "ca"
    b = Node(tmp_path / "b", "b", "us", ca)
    try:
        a = Node(tmp_path / "a", "a", "eu", ca, peers=[b])
        try:
            yield a, b
        finally:
            a.stop()
    finally:
        b.stop()


def listening(node):
    return {k: v for k, v in node.info["listen"].items() if v}


def test_a_healthy_pair_is_good(tmp_path, pair):
    a, b = pair
    config = configuration(tmp_path, "a", listening(a), [b.as_peer()])
    report = Report(config, "--dev-ca", tmp_path / "ca")
    assert report.code == 0, report.errors()
    for check in ("peer.udp", "peer.tcp", "peer.gossip", "peer.expiring", "clock.skew"):
        assert report.one(check, "ok")["subject"] == "peer b (us)"
    # TCP and QUIC for clients and peers, QUIC for gossip.
    assert len(report.of("served.differs", "ok")) == 5
    assert len(report.of("listen.taken", "ok")) == 5
    assert not report.of("peer.udp") and not report.of("listen.taken")
    # The question for the time was refused, and reached no engine.
    assert b.metric('isobar_calls_total{side="egress",code="UNKNOWN"}') == 1
    assert a.popen.poll() is None and b.popen.poll() is None

    text = run("-c", config, "--dev-ca", tmp_path / "ca")
    assert text.returncode == 0
    assert re.fullmatch(r"0 errors, \d+ warnings", text.stdout.splitlines()[-1])


def test_every_anchor_is_a_section(tmp_path, pair):
    a, b = pair
    report = Report(configuration(tmp_path, "a", listening(a), [b.as_peer()]), "--dev-ca", tmp_path / "ca")
    for finding in report.findings:
        file, anchor = finding["see"].split("#")
        assert f"\n### {anchor}\n" in (ROOT / file).read_text()


def test_a_node_that_does_not_run_has_its_ports_free(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    keys = ("clients", "peers", "gossip", "metrics", "admin")
    ports = {key: f"127.0.0.1:{free_port()}" for key in keys}
    report = Report(configuration(tmp_path, "a", ports), "--dev-ca", ca)
    assert report.code == 0
    assert len(report.of("listen.taken", "ok")) == 5
    assert not report.of("served.differs", "ok")
    assert report.one("clock.unmeasured", "note")


def test_checking_makes_nothing(tmp_path):
    report = Report(configuration(tmp_path, "a"), "--dev-ca", tmp_path / "ca")
    assert report.code == 0 and report.one("certificate.missing", "note")
    assert not (tmp_path / "ca").exists()


def test_an_unreadable_configuration_ends_with_2(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("[listen]\nclient = 1\n")
    done = run("-c", bad)
    assert done.returncode == 2 and "did you mean clients?" in done.stderr
    assert run("-c", tmp_path / "nope.toml").returncode == 2
    assert run().returncode == 2


def test_a_dead_peer_is_an_error_that_names_the_port(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    port = free_port()
    peer = {"name": "gone", "region": "us", "peers": f"127.0.0.1:{port}", "gossip": f"127.0.0.1:{free_port()}"}
    report = Report(configuration(tmp_path, "a", peers=[peer]), "--dev-ca", ca)
    assert report.code == 1
    found = report.one("peer.unreachable", "error")
    assert str(port) in found["what"] and "refused" in found["what"]
    assert report.one("peer.gossip", "warning")


def test_a_peer_of_another_name_is_found_out(tmp_path, pair):
    a, b = pair
    config = configuration(tmp_path, "a", listening(a), [{**b.as_peer(), "name": "c"}])
    report = Report(config, "--dev-ca", tmp_path / "ca")
    assert report.code == 1
    assert "spiffe://mesh.test/node/us/b" in report.one("peer.identity", "error")["what"]


def test_nodes_of_two_authorities_are_told_apart(tmp_path):
    b = Node(tmp_path / "b", "b", "us", tmp_path / "ca-b")
    try:
        ca = dev_ca(tmp_path / "ca", "a")
        report = Report(configuration(tmp_path, "a", peers=[b.as_peer()]), "--dev-ca", ca)
        assert report.code == 1
        assert "do not vouch" in report.one("peer.identity", "error")["what"]
        assert report.one("peer.refuses", "error")
    finally:
        b.stop()


def test_a_peer_behind_a_wall_for_udp_is_a_warning(tmp_path, pair):
    a, b = pair
    relay = Relay(b.peers)
    try:
        peer = {**b.as_peer(), "peers": relay.address}
        report = Report(configuration(tmp_path, "a", listening(a), [peer]), "--dev-ca", tmp_path / "ca")
        assert report.code == 0, report.errors()
        found = report.one("peer.udp", "warning")
        assert relay.address.rsplit(":", 1)[1] in found["remedy"] and "UDP" in found["remedy"]
        assert report.one("peer.tcp", "ok")
    finally:
        relay.stop()


def test_a_silent_udp_port_is_told_from_a_closed_one(tmp_path, pair):
    a, b = pair
    relay = Relay(b.peers)
    host, port = relay.address.rsplit(":", 1)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hole:
            hole.bind((host, int(port)))
            peer = {**b.as_peer(), "peers": relay.address}
            config = configuration(tmp_path, "a", listening(a), [peer])
            report = Report(config, "--dev-ca", tmp_path / "ca")
        assert "no answer within 1.5s" in report.one("peer.udp", "warning")["what"]
    finally:
        relay.stop()


DAY = datetime.timedelta(days=1)
HOUR = datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("left", "life", "level"),
    [
        (-DAY, 365 * DAY, "error"),
        (6 * DAY, 365 * DAY, "error"),
        (20 * DAY, 365 * DAY, "warning"),
        (50 * DAY, 365 * DAY, "note"),
        (100 * DAY, 365 * DAY, "ok"),
        (10 * HOUR, DAY, "warning"),
        (20 * HOUR, DAY, "ok"),
        (HOUR / 2, DAY, "error"),
        (20 * DAY, 10 * DAY, "error"),
    ],
)
def test_the_time_left_is_judged(tmp_path, left, life, level):
    ca = dev_ca(tmp_path / "ca")
    identity = tmp_path / "state/identity"
    certified(ca, identity, "a", left, life)
    tls = {"cert": identity / "cert.pem", "key": identity / "key.pem"}
    tables = {"identity": {"source": "files"}}
    report = Report(configuration(tmp_path, "a", tls=tls, tables=tables, state_dir=tmp_path / "state"))
    found = report.of("certificate.expiring", level)
    # The node's own, and the one for clients, which is the same here.
    assert len(found) == 2, report.findings
    assert report.code == (1 if level == "error" else 0)
    if left < 0 * DAY:
        assert "expired" in found[0]["what"]
    if level != "ok" and left < life:
        # The node's own is told before the one for clients.
        assert "what renews the files" in found[0]["remedy"]


def test_a_peer_whose_certificate_ends_is_a_warning(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    # The authority leaves a certificate alone that has more than a week.
    certified(ca, ca / "nodes/eu/b", "b", 20 * DAY, 365 * DAY)
    b = Node(tmp_path / "b", "b", "eu", ca)
    try:
        report = Report(configuration(tmp_path, "a", peers=[b.as_peer()]), "--dev-ca", ca)
        assert report.code == 0, report.errors()
        assert "19 days" in report.one("peer.expiring", "warning")["what"]
    finally:
        b.stop()


def test_a_key_that_others_can_read_is_an_error(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    key = ca / "nodes/eu/a/key.pem"
    key.chmod(0o644)
    report = Report(configuration(tmp_path, "a"), "--dev-ca", ca)
    assert report.code == 1
    found = report.one("certificate.key-exposed", "error")
    assert f"chmod 600 {key}" in found["remedy"] and "644" in found["what"]
    key.chmod(0o600)
    (ca / "ca.key").chmod(0o640)
    report = Report(configuration(tmp_path, "a"), "--dev-ca", ca)
    assert report.one("certificate.key-exposed", "error")["subject"] == str(ca / "ca.key")


def test_a_key_of_another_certificate_is_an_error(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a", "b")
    (ca / "nodes/eu/a/key.pem").write_bytes((ca / "nodes/eu/b/key.pem").read_bytes())
    report = Report(configuration(tmp_path, "a"), "--dev-ca", ca)
    assert report.code == 1 and report.one("certificate.key-mismatch", "error")


def test_a_certificate_of_another_node_or_authority_is_an_error(tmp_path):
    ca, other = dev_ca(tmp_path / "ca", "a", "b"), dev_ca(tmp_path / "other", "a")
    nodes = ca / "nodes/eu"
    state = tmp_path / "state"
    identity = state / "identity"
    identity.mkdir(parents=True)
    for file in ("cert.pem", "key.pem"):
        (identity / file).touch(0o600)
        (identity / file).write_bytes((nodes / "b" / file).read_bytes())
    (identity / "ca.pem").write_bytes((ca / "ca.pem").read_bytes())
    tls = {"cert": identity / "cert.pem", "key": identity / "key.pem"}
    config = configuration(tmp_path, "a", tls=tls, state_dir=state)
    found = Report(config).one("certificate.wrong-id", "error")
    assert "node/eu/b" in found["what"] and "node/eu/a" in found["what"]

    (identity / "ca.pem").write_bytes((other / "ca.pem").read_bytes())
    assert Report(config).one("certificate.untrusted", "error")

    (identity / "cert.pem").write_text("half a certif")
    report = Report(config)
    assert report.of("certificate.unreadable", "error") and report.code == 1


def test_a_certificate_on_disk_that_is_not_served_is_a_warning(tmp_path, pair):
    a, _ = pair
    ca = tmp_path / "ca"
    # As if it had been renewed behind the node's back.
    (ca / "nodes/eu/a/cert.pem").unlink()
    dev_ca(ca, "a")
    report = Report(configuration(tmp_path, "a", listening(a)), "--dev-ca", ca)
    assert report.code == 0, report.errors()
    found = report.of("served.differs", "warning")
    assert {f["subject"] for f in found} == {"listen.clients", "listen.peers", "listen.gossip"}
    assert "restart" in found[0]["remedy"]


def test_a_port_of_somebody_else_is_an_error(tmp_path, pair):
    a, b = pair
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        address = "127.0.0.1:%d" % held.getsockname()[1]
        ca = dev_ca(tmp_path / "other", "a")
        report = Report(configuration(tmp_path, "a", {"metrics": address}), "--dev-ca", ca)
        assert report.code == 1
        assert address in report.one("listen.taken", "error")["what"]
    # So is who took the port that the configuration gives this node since it started.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        listen = {**listening(a), "clients": "127.0.0.1:%d" % held.getsockname()[1]}
        report = Report(configuration(tmp_path, "a", listen), "--dev-ca", tmp_path / "ca")
        assert report.one("listen.taken", "error")["subject"] == "listen.clients"
    # Another node is somebody else too.
    report = Report(configuration(tmp_path, "a", {"peers": b.peers}), "--dev-ca", tmp_path / "ca")
    assert len(report.of("listen.taken", "error")) == 2


def test_open_and_foreign_addresses_are_named(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    listen = {
        "plaintext": f"0.0.0.0:{free_port()}",
        "metrics": f"0.0.0.0:{free_port()}",
        "admin": f"0.0.0.0:{free_port()}",
        "clients": f"192.0.2.1:{free_port()}",
    }
    peer = {"name": "b", "region": "us", "peers": "b.invalid:8444"}
    report = Report(configuration(tmp_path, "a", listen, [peer]), "--dev-ca", ca)
    assert report.one("listen.plaintext", "warning")
    assert report.one("listen.metrics", "note")
    assert "operator" in report.one("listen.admin", "note")["what"]
    assert report.of("listen.not-here", "error")
    # The peer is elsewhere, and nobody reaches a loopback address from there.
    assert len(report.of("listen.loopback", "warning")) == 2


def test_a_name_without_an_address_is_an_error(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    peer = {"name": "b", "region": "us", "peers": "b.invalid:8444", "gossip": "b.invalid:8445"}
    report = Report(configuration(tmp_path, "a", peers=[peer]), "--dev-ca", ca)
    assert report.code == 1
    assert "b.invalid" in report.one("dns.unresolved", "error")["what"]


def test_engines_and_traps_are_looked_at(tmp_path):
    ca = dev_ca(tmp_path / "ca", "a")
    own = f"127.0.0.1:{free_port()}"
    engines = [
        {"name": "gone", "url": f"http://127.0.0.1:{free_port()}", "health": {"interval": "1s", "timeout": "2s"}},
        {"name": "circle", "url": f"http://{own}"},
    ]
    report = Report(configuration(tmp_path, "a", {"clients": own}, engines=engines), "--dev-ca", ca)
    assert report.code == 1
    assert {f["subject"] for f in report.of("engine.unreachable", "warning")} == {"engine gone", "engine circle"}
    assert report.one("trap.engine-loop", "error")["subject"] == "engine circle"
    assert report.one("trap.health-interval", "warning")["subject"] == "engine gone"


def test_a_node_without_an_identity_is_an_error(tmp_path):
    config = configuration(tmp_path, "a", state_dir=tmp_path / "state")
    report = Report(config)
    missing = report.one("certificate.missing", "error")
    assert missing["subject"] == str(tmp_path / "state/identity/ca.pem")
    assert "isobar join --token TOKEN" in missing["remedy"]
    # Clients would be shown the node's own certificate.
    assert "localhost" in report.one("certificate.names", "note")["what"]
    files = {"source": "files", "cert": str(tmp_path / "gone.pem")}
    tables = {"identity": {**files, "ca": str(ROOT / "README.md"), "key": str(ROOT / "README.md")}}
    report = Report(configuration(tmp_path, "a", tables=tables, state_dir=tmp_path / "state"))
    missing = report.one("certificate.missing", "error")
    assert missing["subject"] == files["cert"] and "what puts the files there" in missing["remedy"]


def test_who_may_call_is_looked_at(tmp_path):
    report = Report(configuration(tmp_path, "a", state_dir=tmp_path))
    assert "--dev" in report.one("access.nobody", "warning")["remedy"]
    tenant = {"name": "lab", "api_key_sha256": "a" * 64}
    tables = {"[tenant]": tenant, "[allow]": {"tenant": "lab"}}
    report = Report(configuration(tmp_path, "a", state_dir=tmp_path, tables=tables))
    assert "lab may call" in report.one("access.nobody", "ok")["what"]
    gone = tmp_path / "gone.pem"
    tables = {"tls": {"client_ca": str(gone)}}
    report = Report(configuration(tmp_path, "a", state_dir=tmp_path, tables=tables))
    assert str(gone) in report.one("access.unusable", "error")["what"]
