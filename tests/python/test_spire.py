"""A SPIRE agent as the source of identity: nodes meet, take in what it hands out, and go on while it is away."""

import time

import pytest
from cryptography import x509
from meshes import isobar, meshes, serves
from nodes import pem_of, toml, wait_for
from pki import Authority, member
from spire import Agent, Svid
from test_check import Report
from traffic import Traffic, failures

__all__ = ["meshes"]
# An agent that was away is asked again within a few seconds.
SOON = 10


class Fleet:
    """Nodes a and b, each asking the agent; behind b is the service."""

    def __init__(self, meshes, directory):
        self.meshes = meshes
        self.root = Authority("first root")
        self.agent = meshes.keep(Agent(directory / "agent.sock").start())
        service = meshes.service("service")
        self.sites = [meshes.site("a", "eu"), meshes.site("b", "us")]
        a, b = self.sites
        a.write(peers=[b], plaintext=True)
        b.write(engines=[service.engine()], peers=[a])
        for site in self.sites:
            asks(site, self.agent)

    def give(self, root=None, bundle=None):
        """Newer certificates for both nodes, and their serial numbers."""
        root = root or self.root
        ids = [member(site.name, site.region) for site in self.sites]
        given = [Svid(id, root.issue(id), bundle or [root]) for id in ids]
        self.agent.give(*given)
        return [svid.certified.serial for svid in given]

    def start(self):
        self.serials = self.give()
        self.a, self.b = (self.meshes.start(site) for site in self.sites)
        serves(self.a, "b.us/service")
        return self

    def shown(self, serials):
        """Waits until both nodes show certificates of these numbers, and say so."""
        for node, serial in zip((self.a, self.b), serials, strict=True):
            shows(node, serial)


def asks(site, agent):
    keys = {"source": "spire", "socket": agent.address}
    lines = ["[identity]", *(f"{k} = {toml(v)}" for k, v in keys.items())]
    site.config.write_text(site.config.read_text() + "\n".join(lines) + "\n")


def serial(pem: str) -> int:
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def shows(node, wanted: int, within=SOON):
    """Waits until a handshake shows the certificate of this number; the metric must tell the same."""
    wait_for("the newer certificate", lambda: serial(pem_of(node.clients)) == wanted, within)
    told = node.counts("isobar_certificate_served_expiry_timestamp_seconds", "serial")
    assert [int(number, 16) for number in told] == [wanted]
    pem = x509.load_pem_x509_certificate(pem_of(node.clients).encode())
    assert list(told.values()) == [pem.not_valid_after_utc.timestamp()]


@pytest.fixture
def fleet(meshes, tmp_path):
    return Fleet(meshes, tmp_path)


def test_two_nodes_meet_and_a_call_crosses(fleet):
    fleet.start()
    fleet.shown(fleet.serials)
    assert fleet.agent.unmarked == 0
    # The key and the certificate stay in memory; the roots lie there for clients.
    assert [path.name for path in fleet.sites[0].identity.iterdir()] == ["ca.pem"]


def test_newer_certificates_and_roots_are_taken_in_under_traffic(fleet, tmp_path):
    fleet.start()
    flows = [
        {"kind": "unary", "target": fleet.a.plaintext, "rate": 50},
        {"kind": "stream", "target": fleet.a.plaintext, "rate": 2},
    ]
    traffic = fleet.meshes.keep(Traffic(tmp_path, flows)).begun()
    second = Authority("second root")
    # First both roots are believed, then the new one signs, then the old one goes.
    for root, bundle in [
        (fleet.root, [fleet.root]),
        (fleet.root, [fleet.root, second]),
        (second, [fleet.root, second]),
        (second, [second]),
    ]:
        fleet.shown(fleet.give(root, bundle))
        time.sleep(1)
    calls = traffic.finish()
    assert len(calls) > 100 and not failures(calls), failures(calls)[:5]
    streams = [call for call in calls if call.kind == "stream"]
    assert len(streams) == 2 and all(stream.messages > 10 for stream in streams)
    for node in (fleet.a, fleet.b):
        assert node.renewals() == 4 and node.renewals("failed") == 0
        assert node.popen.poll() is None


def test_newer_roots_are_written_down_for_clients(fleet):
    fleet.start()
    assert fleet.a.ca.read_bytes() == fleet.root.pem()
    second = Authority("second root")
    fleet.shown(fleet.give(second, [second]))
    wait_for("the new root on disk", lambda: fleet.a.ca.read_bytes() == second.pem(), SOON)


def test_a_node_goes_on_without_its_agent(fleet):
    fleet.start()
    fleet.agent.stop()
    for _ in range(5):
        serves(fleet.a, "b.us/service")
        time.sleep(0.4)
    wait_for("the failure to be counted", lambda: fleet.a.renewals("failed") > 0, SOON)
    fleet.shown(fleet.serials)
    serials = fleet.give()
    fleet.agent.start()
    fleet.shown(serials)
    serves(fleet.a, "b.us/service")
    assert not fleet.a.alarm()


def test_another_id_is_refused_at_the_start(fleet):
    stranger = member("z", "eu")
    fleet.agent.give(Svid(stranger, fleet.root.issue(stranger), [fleet.root]))
    ended = fleet.sites[0].start_fails()
    assert ended.returncode == 2
    assert stranger in ended.stderr and member("a", "eu") in ended.stderr


def test_another_id_later_leaves_the_earlier_one_in_use(fleet):
    fleet.start()
    stranger = member("z", "eu")
    fleet.agent.give(Svid(stranger, fleet.root.issue(stranger), [fleet.root]))
    wait_for("the failure to be counted", lambda: fleet.a.renewals("failed") > 0, SOON)
    fleet.shown(fleet.serials)
    serves(fleet.a, "b.us/service")


def test_an_agent_that_is_not_there_or_knows_nobody_is_named(fleet):
    fleet.agent.give()
    site = fleet.sites[0]
    # Whoever asks before the agent knows it is told so.
    ended = site.start_fails()
    assert ended.returncode == 2 and "identity.socket" in ended.stderr
    fleet.agent.stop()
    ended = site.start_fails()
    assert ended.returncode == 2 and "identity.socket" in ended.stderr


def test_a_check_asks_the_agent(fleet):
    config = fleet.sites[0].config
    fleet.give()
    report = Report(config)
    assert report.of("spire.agent", "ok") and not report.of("certificate.missing")
    assert report.of("certificate.expiring", "ok")
    fleet.agent.stop()
    assert Report(config).one("spire.agent", "error")["subject"] == "identity.socket"
    assert isobar("check", "-c", config, "--timeout", "1s").returncode == 1
