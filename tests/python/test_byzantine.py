"""A node with a good certificate lies: nobody crashes, nobody grows, nobody honest is thought dead, calls go on, and whoever
can be shown to have lied is named by those it lied to."""

import itertools
import os
import time

import pytest
from byzantine import (
    ALIVE, DOWN, GOSSIP_KIND, PING, RELAYS, SUSPECT, Double, Pair, bogus, frame, gossip, packet,
    sign, swim,
)
from meshes import Meshes, done
from nodes import wait_for
from status import Status
from strangers import Issuer, mesh_pb, self_signed
from traffic import Traffic, failures, p99

SLOWEST_P99_S = 2.0
GROWTH_BYTES = 20 * 1024 * 1024
# Longer than it takes to think somebody dead.
LIES_LAST_S = 5
HUGE = 1 << 62
NUMBERS = itertools.count(1)


class Honest:
    """a and b in eu, c in us. a holds the authority and takes the calls, b and c have the engines."""

    def __init__(self, directory):
        self.meshes, self.doubles = Meshes(directory), []
        try:
            self.begin(directory)
        except BaseException:
            self.meshes.end()
            raise

    def begin(self, directory):
        meshes, authority = self.meshes, self.meshes.authority()
        self.issuer = Issuer.of(authority)
        sites = {name: meshes.site(name, region) for name, region in (("a", "eu"), ("b", "eu"), ("c", "us"))}
        sites["a"].write(authority)
        for name in "bc":
            service = meshes.service(f"service-{name}")
            sites[name].write(engines=[service.engine(slots=64)], seeds=[sites["a"]])
        self.nodes = {"a": meshes.start(sites["a"])}
        for name in "bc":
            token = authority.token(name, region=sites[name].region)
            sites[name].joined(token, seed=sites["a"])
            self.nodes[name] = meshes.start(sites[name])
        wait_for("a mesh", lambda: all(self.alive(name) >= set("abc") - {name} for name in "abc"))
        a = self.nodes["a"]
        flow = {"kind": "unary", "target": a.clients, "ca": a.ca, "rate": 40}
        self.traffic = meshes.keep(Traffic(directory, [flow])).begun()
        time.sleep(2)
        self.memory = {name: node.memory_bytes() for name, node in self.nodes.items()}

    def status(self, name: str) -> Status:
        admin = self.nodes[name].site.listen["admin"]
        return Status(done("status", "--json", "--admin", admin))

    def alive(self, name: str) -> set[str]:
        return self.status(name).alive()

    def double(self, region="eu", **options) -> Double:
        """Another node of the mesh, linked with all three."""
        name = f"double-{next(NUMBERS)}"
        credentials = self.issuer.issue(f"node/{region}/{name}")
        double = Double(credentials, name, region, **options)
        self.doubles.append(double)
        double.dial(*self.nodes.values())
        return double

    def watch(self, seconds: float):
        """For so long each of the three sees the others alive."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for name in "abc":
                self.nodes[name].died()
                status = self.status(name)
                for other in set("abc") - {name}:
                    # Who is in another region and is no relay need not be known; nobody is called dead.
                    expected = {"alive"} if (name == "c") == (other == "c") else {"alive", "unknown"}
                    assert status.state(other) in expected, f"{other} at {name}: {status.said}"
            time.sleep(0.2)

    def names(self, double: Double):
        """Whoever it is linked with says that it lied, and how."""

        def named():
            found = [self.status(name).quarantined() for name in double.lines]
            return all(double.name in one and one[double.name] for one in found)

        wait_for(f"{double.name} to be named", named, 15)
        wait_for("it to be out", lambda: all(map(double.is_out, double.lines.values())), 15)

    def end(self):
        try:
            ended = self.traffic.finish()
        finally:
            self.meshes.end()
        assert failures(ended) == []


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    honest = Honest(tmp_path_factory.mktemp("honest"))
    yield honest
    honest.end()


@pytest.fixture(autouse=True)
def unharmed(honest):
    """Whatever a test says, the nodes stay as they were and calls go on."""
    began = time.monotonic()
    yield
    for double in honest.doubles:
        double.end()
    honest.doubles = []
    for name, node in honest.nodes.items():
        node.died()
        assert "panicked" not in node.err.read_text(errors="replace")
        grown = node.memory_bytes() - honest.memory[name]
        print(f"{name} has grown by {grown / 1e6:.1f} MB")
        assert grown < GROWTH_BYTES, f"{name} has grown by {grown} bytes"
    honest.watch(1)
    honest.traffic.died()
    wait_for("healthy calls", lambda: len(honest.traffic.calls(began, "unary")) >= 8)
    calls = honest.traffic.calls(began)
    assert failures(calls) == []
    assert p99(calls) < SLOWEST_P99_S


def tell(double, make, times=1, gap_s=0.0):
    """Says to each node what `make(line, lines of the others)` makes for it."""
    for _ in range(times):
        for name, line in double.lines.items():
            others = [other for at, other in double.lines.items() if at != name]
            double.whisper(line, *make(line, others))
        time.sleep(gap_s)


def test_a_double_that_does_not_lie_is_a_node_like_others(honest):
    """What makes the rest mean something."""
    double = honest.double()
    wait_for("it to be known", lambda: double.name in honest.alive("a") & honest.alive("b"), 10)
    honest.watch(LIES_LAST_S)
    assert all(double.name in honest.alive(name) for name in "ab"), "it answers, so it lives"
    assert not any(honest.status(name).quarantined().get(double.name) for name in "abc")


def forged_card(double, line, others):
    """A card of another node, as that would sign it, but with our key."""
    other = others[0]
    card = double.card(epoch=HUGE)
    signed = sign(card, double.credentials, chain=list(other.hello.card.certificates))
    return [frame(cards=mesh_pb.Cards(pool=mesh_pb.POOL_REGION, cards=[signed]))]


def card_of_nobody(double, line, others):
    """A card under a certificate that no authority has signed."""
    stranger = self_signed("node/eu/nobody")
    signed = sign(double.card(), stranger)
    return [frame(cards=mesh_pb.Cards(pool=mesh_pb.POOL_REGION, cards=[signed]))]


def load_of_another_process(double, line, others):
    return [double.load(epoch=double.epoch + 1)]


def packet_of_another(double, line, others):
    """A ping that another node is said to have sent."""
    return [swim(packet(PING, others[0].pair, line.pair, number=7))]


def packet_of_the_one_it_is_sent_to(double, line, others):
    return [swim(packet(GOSSIP_KIND, line.pair, line.pair, [(line.pair, 1, DOWN)]))]


def packet_of_another_process(double, line, others):
    other = Pair(double.pair.id, double.epoch + 5)
    return [swim(packet(PING, other, line.pair, number=7))]


def digest_of_another_region(double, line, others):
    elsewhere = "us" if double.region == "eu" else "eu"
    return [digest(double, elsewhere, 10)]


def digest(double, region, free):
    candidate = mesh_pb.Candidate(node=double.name, peers="127.0.0.1:9", free=free, slots=free)
    offer = mesh_pb.Offer(protocol="grpc", free=free, slots=free, candidates=[candidate])
    double.sequence += 1
    return frame(digest=mesh_pb.Digest(
        region=region, epoch=double.epoch, sequence=double.sequence, age_ms=1, offers=[offer],
        part=0, parts=1,
    ))


PROVABLE = [
    load_of_another_process, packet_of_another,
    packet_of_the_one_it_is_sent_to, packet_of_another_process, digest_of_another_region,
]


@pytest.mark.parametrize("lie", PROVABLE, ids=lambda lie: lie.__name__)
def test_whoever_can_be_shown_to_lie_is_out_and_named(honest, lie):
    double = honest.double()
    tell(double, lambda line, others: lie(double, line, others))
    honest.names(double)


@pytest.mark.parametrize("lie", [forged_card, card_of_nobody], ids=lambda lie: lie.__name__)
def test_a_card_that_is_not_believed_changes_nothing(honest, lie):
    """Whoever hands it on may not know better: it may be under a root that is new."""
    double = honest.double()
    tell(double, lambda line, others: lie(double, line, others))
    honest.watch(LIES_LAST_S)


def test_nobody_dies_of_being_called_dead(honest):
    """Others are said to be down: at an epoch of their own that is to come, and as they are."""
    double = honest.double()

    def downs(line, others):
        updates = []
        for other in others:
            later = Pair(other.pair.id, HUGE)
            updates += [(later, 0, DOWN), (later, 0, SUSPECT), (other.pair, 0, DOWN), (other.pair, 1, DOWN)]
        return gossip(double.pair, line.pair, updates)

    tell(double, downs, times=20, gap_s=0.1)
    honest.watch(LIES_LAST_S)


def test_nobody_believes_of_itself_what_others_say(honest):
    """Each is told that it is down, and that it lives under another pair."""
    double = honest.double()

    def about_you(line, _others):
        other = [Pair(line.pair.id, HUGE), Pair(line.pair.id, line.pair.epoch, 60_000)]
        updates = [(pair, count, state) for pair in (*other, line.pair)
                   for count in (0, 65_535) for state in (ALIVE, SUSPECT, DOWN)]
        return gossip(double.pair, line.pair, updates)

    before = {name: status_epochs(honest, name) for name in "abc"}
    tell(double, about_you, times=20, gap_s=0.1)
    honest.watch(LIES_LAST_S)
    assert {name: status_epochs(honest, name) for name in "abc"} == before


def status_epochs(honest, name):
    """The processes of the honest, as one of them sees them."""
    members = honest.status(name).members
    return {other: members[other].epoch for other in set("abc") - {name}}


def test_an_incarnation_nobody_can_beat_is_not_believed(honest):
    double = honest.double()

    def highest(line, others):
        updates = [(other.pair, 65_535, state) for other in others for state in (SUSPECT, DOWN)]
        return gossip(double.pair, line.pair, updates, incarnation=65_535)

    tell(double, highest, times=20, gap_s=0.1)
    honest.watch(LIES_LAST_S + 2)


def test_members_that_do_not_exist_are_nowhere_to_be_seen(honest):
    double = honest.double()
    nobody = bogus(1400)
    states = [(pair, 0, state) for state in (ALIVE, SUSPECT, DOWN) for pair in nobody]
    tell(double, lambda line, _: gossip(double.pair, line.pair, states[:1400]))
    tell(double, lambda line, _: gossip(double.pair, line.pair, states[1400:]))
    honest.watch(LIES_LAST_S)
    for name in "abc":
        assert len(honest.status(name).members) < 40


def test_garbage_is_answered_with_silence(honest):
    double = honest.double()
    sizes = [0, 1, 2, 57, 100, 1000, 1149]
    tell(double, lambda *_: [os.urandom(size) for size in sizes], times=5, gap_s=0.05)
    kinds = [bytes([kind]) + os.urandom(200) for kind in range(12)]
    tell(double, lambda *_: [swim(kind) for kind in kinds], times=2, gap_s=0.05)
    tell(double, lambda *_: [swim(os.urandom(1134), RELAYS)], times=5, gap_s=0.05)
    honest.names(double)


def test_a_frame_of_a_megabyte_is_not_read(honest):
    double = honest.double()
    for line in double.lines.values():
        double.say(line, *[os.urandom(1 << 20) for _ in range(8)])
    wait_for("it to be out", lambda: all(map(double.is_out, double.lines.values())), 15)


def test_a_flood_of_good_frames_is_not_listened_to(honest):
    """Three thousand a second: each of them is one a node might say."""
    double = honest.double()
    end = time.monotonic() + 6
    while time.monotonic() < end and not all(map(double.is_out, double.lines.values())):
        for line in double.lines.values():
            ping = swim(packet(PING, double.pair, line.pair, number=1))
            double.whisper(line, *([ping] * 100))
        time.sleep(0.03)
    honest.watch(LIES_LAST_S)


def test_an_absurd_capacity_draws_no_call_that_fails(honest):
    """An engine with two thousand million free slots, at an address where nobody is."""
    engine = mesh_pb.Engine(name="gpu", protocol="grpc", slots=1 << 31)
    double = honest.double(engines=[engine], free=1 << 31)
    wait_for("it to be known", lambda: double.name in honest.alive("a"), 10)
    since = time.monotonic()
    tell(double, lambda *_: [double.load()], times=40, gap_s=0.2)
    served = {call.served_by for call in honest.traffic.calls(since) if call.code == "OK"}
    assert served <= {"b.eu/service-b", "c.us/service-c"}
    honest.watch(1)


def test_a_relay_that_lies_about_its_region_draws_no_call_that_fails(honest):
    """A million free slots in us, to be had from nobody at an address where nobody is."""
    double = honest.double(region="us")
    since = time.monotonic()
    tell(double, lambda *_: [digest(double, "us", 1_000_000)], times=16, gap_s=0.5)
    calls = honest.traffic.calls(since)
    served = {call.served_by for call in calls if call.code == "OK"}
    assert "b.eu/service-b" in served, "what is near is not forgotten for what is promised"
    honest.watch(1)
