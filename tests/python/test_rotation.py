"""Certificates end and roots change while calls go on: nobody notices, unless no authority answers for too long."""

import re
import signal
import time
from datetime import UTC, datetime

import grpc
import pytest
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc
from meshes import call, copy, key_bodies, meshes, serves
from nodes import wait_for, wait_for_peers
from strangers import HOUR, Credentials, Issuer, gossip, hello, quic, tcp
from traffic import Traffic, failures

__all__ = ["meshes"]
LIFE_S = 20
SOAK_S = 120
# A step of a rotation has to wait for a life of certificates; the first is done when traffic flows.
FIRST_STEP_S = 12
STREAMS = 8


class Three:
    """Three nodes with plaintext ports for those who call: a holds the authority and a model, b and c have the service."""

    def __init__(self, meshes):
        self.meshes = meshes
        self.authority = meshes.authority(life=f"{LIFE_S}s")
        self.service_b = meshes.service("service-b", reflection=True)
        self.service_c = meshes.service("service-c", reflection=True)
        self.sim = meshes.engine("sim", "sim", slots=64)
        a, b, c = meshes.site("a", "eu"), meshes.site("b", "us"), meshes.site("c", "ap")
        a.write(self.authority, [self.sim.engine()], [b, c], plaintext=True)
        b.write(None, [self.service_b.engine()], [a, c], [a], plaintext=True)
        c.write(None, [self.service_c.engine()], [a, b], [a], plaintext=True)
        self.a = meshes.start(a)
        for site in (b, c):
            site.joined(self.authority.token(site.name, region=site.region), seed=a)
        self.b, self.c = meshes.start(b), meshes.start(c)
        self.nodes = [self.a, self.b, self.c]
        wait_for_peers(self.a, self.b, self.c)
        wait_for_peers(self.b, self.a, self.c)
        wait_for_peers(self.c, self.a, self.b)

    def traffic(self) -> Traffic:
        """200 calls a second that cross: from a to b and c, and from b and c to the model at a."""
        flows = [
            {"kind": "unary", "target": self.a.plaintext, "rate": 100},
            {"kind": "infer", "target": self.b.plaintext, "rate": 50, "model": "sim"},
            {"kind": "infer", "target": self.c.plaintext, "rate": 50, "model": "sim"},
            {"kind": "stream", "target": self.a.plaintext, "rate": STREAMS},
        ]
        directory = self.meshes.directory
        return self.meshes.keep(Traffic(directory, flows)).begun()


class Serials:
    """Which certificates each node was seen to show, and which it had on disk."""

    def __init__(self, nodes):
        self.nodes = nodes
        self.shown = {node.name: set() for node in nodes}
        self.kept = {node.name: set() for node in nodes}

    def look(self):
        for node in self.nodes:
            served = node.counts("isobar_certificate_served_expiry_timestamp_seconds", "serial")
            self.shown[node.name] |= set(served)
            self.kept[node.name].add(node.site.certificate().serial_number)
            for expiry in served.values():
                assert expiry > time.time(), f"{node.name} showed a certificate that has ended"


@pytest.mark.timeout(SOAK_S + 80)
def test_certificates_and_the_root_change_under_traffic(meshes):
    three = Three(meshes)
    serials = Serials(three.nodes)
    old = Issuer.of(three.authority)
    # A node of the mesh as good as any, for an hour: under the root that is to go.
    ghost = old.issue("node/us/ghost", ends=HOUR)
    stolen = copy(three.b.site.identity, "identity")
    assert every_port(three.nodes, ghost) == {"in"}
    traffic = three.traffic()
    began = time.monotonic()
    steps, due = [], began + FIRST_STEP_S
    while time.monotonic() - began < SOAK_S:
        serials.look()
        if time.monotonic() > due:
            fresh_clients(three)
            step = three.authority.rotate() if len(steps) < 3 else ""
            steps += [step] if step else []
            due += 3
        traffic.died()
        time.sleep(1)
    assert steps == ["root_added", "issuer_replaced", "root_removed"]
    ended = traffic.finish()
    assert failures(ended, began) == []
    check_kinds(ended)
    for node in three.nodes:
        assert len(serials.kept[node.name]) >= 8, serials.kept
        assert len(serials.shown[node.name]) >= 8, serials.shown
        assert node.renewals() >= 8 and node.renewals("failed") == 0
        assert not node.alarm() and not node.lines('"ERROR"')
        assert node.strangers("gossip") == 0, "nodes of the mesh were taken for strangers"
    # Whoever held on to the old root is nobody now, however long their certificate has to live.
    assert every_port(three.nodes, ghost) == {"out"}
    assert every_port(three.nodes, Credentials.read(stolen)) == {"out"}
    assert every_port(three.nodes, Issuer.of(three.authority).issue("node/us/ghost")) == {"in"}
    for node in three.nodes:
        assert node.lines("a stranger was turned away", "UnknownIssuer")
    no_key_is_shown(meshes)


def check_kinds(ended):
    """Enough of everything, and every stream lived from the first moment to the last."""
    for kind, served_by, count in [
        ("unary", {"b.us/service-b", "c.ap/service-c"}, 0.9 * 100 * SOAK_S),
        ("infer", {"a.eu/sim"}, 0.9 * 100 * SOAK_S),
    ]:
        calls = [call for call in ended if call.kind == kind]
        assert {call.served_by for call in calls} == served_by
        assert len(calls) > count
    streams = [call for call in ended if call.kind == "stream"]
    assert len(streams) == STREAMS, "a stream was cut and begun again"
    assert min(call.took for call in streams) > SOAK_S
    assert min(call.messages for call in streams) > SOAK_S


def fresh_clients(three):
    """A client that comes only now believes what it is shown: what `ca.pem` of the node says at this moment."""
    for node in three.nodes:
        call(node, timeout=5)


def every_port(nodes, credentials) -> set[str]:
    """How far somebody gets at all ports for nodes."""
    said = hello("ghost", "us")
    outcomes = []
    for node in nodes:
        outcomes += [tcp(node.peers, credentials), quic(node.peers, credentials)]
        outcomes.append(gossip(node.gossip, credentials, said))
    return {"in" if outcome.entered else "out" for outcome in outcomes}


def no_key_is_shown(meshes):
    written = meshes.outputs()
    for line in key_bodies(meshes.directory):
        assert line not in written


def renewed_since(node, serial) -> bool:
    return node.site.certificate().serial_number != serial


@pytest.mark.timeout(120)
def test_an_authority_may_be_away_for_a_while_and_not_for_ever(meshes):
    three = Three(meshes)
    authority_away_for_eleven_twenty_fourths(three)
    authority_away_for_longer(three)


def authority_away_for_eleven_twenty_fourths(three):
    """Nobody notices: no alarm, no call that fails. The outage begins before the time to renew and lasts beyond it."""
    others = [three.b, three.c]
    flow = {"kind": "unary", "target": three.b.plaintext, "rate": 50}
    streams = {"kind": "stream", "target": three.c.plaintext, "rate": 4}
    directory = three.meshes.directory
    traffic = three.meshes.keep(Traffic(directory, [flow, streams], "away")).begun()
    wait_for(
        "certificates in the third of their life", lambda: all(0.3 < n.site.age() < 0.42 for n in others)
    )
    serials = {node.name: node.site.certificate().serial_number for node in others}
    three.a.popen.send_signal(signal.SIGSTOP)
    back = time.monotonic() + LIFE_S * 11 / 24
    try:
        while time.monotonic() < back:
            assert not any(node.alarm() for node in others)
            time.sleep(0.1)
        for node in others:
            assert node.site.age() > 0.6 and not renewed_since(node, serials[node.name])
            assert node.renewals("failed") > 0, "it did not even try"
    finally:
        three.a.popen.send_signal(signal.SIGCONT)
    for node in others:
        wait_for("the renewal", lambda: renewed_since(node, serials[node.name]), LIFE_S)
        assert not node.alarm() and not node.lines('"ERROR"')
    assert failures(traffic.finish()) == []


def authority_away_for_longer(three):
    """First the alarm, then refusals that say why; then, after the authority is back, one token for each repairs it."""
    b, c = three.b, three.c
    assert three.a.stop() == 0
    # b has no engine any more: its calls cross to c.
    three.service_b.kill()
    wait_for("calls from b to c", lambda: plain_call(b) == "c.ap/service-c")
    alarmed, deadline = {}, time.monotonic() + 2 * LIFE_S
    while isinstance(answer := plain_call(b), str):
        assert time.monotonic() < deadline, "the calls still work"
        for node in (b, c):
            if node.name not in alarmed and node.alarm():
                alarmed[node.name] = datetime.now(UTC)
        time.sleep(0.05)
    refused = datetime.now(UTC)
    assert answer.code() == grpc.StatusCode.UNAVAILABLE
    assert re.search("certificate .*(expired|ended)", answer.details()), answer.details()
    assert set(alarmed) == {"b", "c"}
    for node in (b, c):
        check_alarm(node, refused)
    # A certificate is good for the whole of its last second.
    wait_for("the very end", lambda: all(node.site.age() > 1.06 for node in (b, c)))
    a = three.meshes.start(three.a.site)
    for node in (b, c):
        node.stop()
        assert node.site.start_fails().returncode == 2
        token = three.authority.token(node.name, region=node.region)
        node.site.joined(token, seed=a.site)
    b, c = three.meshes.start(b.site), three.meshes.start(c.site)
    serves(b, "c.ap/service-c")
    assert not b.alarm() and not c.alarm()


def check_alarm(node, refused):
    """The log said it before anybody was refused; and when it was too late, how to repair it."""
    (line,) = node.lines("ERROR", "this node's certificate ends soon and cannot be renewed")
    assert line["fields"]["why"]
    assert datetime.fromisoformat(line["timestamp"]) < refused
    wait_for("the end", lambda: node.lines("ERROR", "this node's certificate has ended"))
    (line,) = node.lines("ERROR", "this node's certificate has ended")
    for part in ("isobar ca token", "isobar join"):
        assert part in line["fields"]["message"]


def plain_call(node):
    """A call without TLS: who served it, or its error."""
    with grpc.insecure_channel(node.plaintext) as channel:
        try:
            method = kinds_pb2_grpc.KindsStub(channel).Unary
            _, ended = method.with_call(pb.Request(text="hello"), timeout=5)
        except grpc.RpcError as error:
            return error
        return dict(ended.initial_metadata())["x-isobar-served-by"]
