"""A node with a good certificate lies: nobody crashes, nobody grows, nobody honest is thought dead, calls go on, and whoever
can be shown to have lied is named by those it lied to."""

import itertools
import os
import time

import pytest
from byzantine import (
    ALIVE, DOWN, GOSSIP_KIND, PING, RELAYS, SUSPECT, Double, Pair, announce, bogus, frame, gossip, node_id,
    packet, sign, swim,
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

    def double(self, region="eu", nodes="abc", **options) -> Double:
        """Another node of the mesh, linked with some of the three."""
        name = f"double-{next(NUMBERS)}"
        credentials = self.issuer.issue(f"node/{region}/{name}")
        double = Double(credentials, name, region, **options)
        self.doubles.append(double)
        double.dial(*(self.nodes[node] for node in nodes))
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

    def names(self, double: Double, why=""):
        """Whoever it is linked with says that it lied, and how."""

        def named():
            found = [self.status(name).quarantined().get(double.name) for name in double.lines]
            return all(one and why in one for one in found)

        wait_for(f"{double.name} to be named: {why}", named, 15)
        wait_for("it to be out", lambda: not double.is_heard(), 15)

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


def digest(double, region, free, node=None):
    candidate = mesh_pb.Candidate(node=node or double.name, peers="127.0.0.1:9", free=free, slots=free)
    offer = mesh_pb.Offer(protocol="grpc", free=free, slots=free, candidates=[candidate])
    double.sequence += 1
    return frame(digest=mesh_pb.Digest(
        region=region, epoch=double.epoch, sequence=double.sequence, age_ms=1, offers=[offer],
        part=0, parts=1,
    ))


PROVABLE = [
    load_of_another_process, packet_of_another, forged_card,
    packet_of_the_one_it_is_sent_to, packet_of_another_process, digest_of_another_region,
]


@pytest.mark.parametrize("lie", PROVABLE, ids=lambda lie: lie.__name__)
def test_whoever_can_be_shown_to_lie_is_out_and_named(honest, lie):
    double = honest.double()
    tell(double, lambda line, others: lie(double, line, others))
    honest.names(double)


def test_a_card_that_is_not_believed_changes_nothing(honest):
    """Whoever hands it on is not named for one: it may be under a root that is new, and not known here yet."""
    double = honest.double()
    tell(double, lambda line, others: card_of_nobody(double, line, others))
    honest.watch(LIES_LAST_S)
    assert not any(honest.status(name).quarantined().get(double.name) for name in "abc")


def insist(double, make, gap_s=0.2, most_s=45):
    """Says the same again and again, until nobody listens."""
    end = time.monotonic() + most_s
    while double.is_heard() and time.monotonic() < end:
        tell(double, make, gap_s=gap_s)


def test_nobody_dies_of_being_called_dead(honest):
    """Others are said to be down, as they are."""
    double = honest.double(nodes="ab")

    def downs(line, others):
        updates = [(other.pair, count, DOWN) for other in others for count in (0, 1)]
        return gossip(double.pair, line.pair, updates)

    insist(double, downs)
    honest.names(double, "calls others down that live")
    honest.watch(LIES_LAST_S)


def test_nobody_is_another_process_because_somebody_says_so(honest):
    """Others are said to have died as processes that are to come: whoever says so has no such cards. It counts once in
    five seconds for each of them, and here is only one."""
    double = honest.double(nodes="ab")

    def later(line, others):
        return gossip(double.pair, line.pair, [(Pair(other.pair.id, HUGE), 0, DOWN) for other in others])

    before = {name: status_epochs(honest, name) for name in "abc"}
    insist(double, later)
    honest.names(double, "later cards of other nodes, which it does not have")
    assert {name: status_epochs(honest, name) for name in "abc"} == before


@pytest.mark.parametrize("state", [ALIVE, SUSPECT, DOWN])
def test_nobody_believes_of_itself_that_there_is_another(honest, state):
    """Each is told that it lives, or has died, as a later process, and on a later card."""
    double = honest.double(nodes="ab")

    def about_you(line, _others):
        others = [Pair(line.pair.id, HUGE), Pair(line.pair.id, line.pair.epoch, 60_000)]
        return gossip(double.pair, line.pair, [(other, 0, state) for other in others])

    before = {name: status_epochs(honest, name) for name in "abc"}
    insist(double, about_you)
    honest.names(double, "a later card of this node, which it does not have")
    assert {name: status_epochs(honest, name) for name in "abc"} == before


def test_nobody_dies_of_being_told_so(honest):
    """Each is told that it is down, whatever card it takes."""
    double = honest.double(nodes="ab")
    before = {name: status_epochs(honest, name) for name in "abc"}
    insist(double, lambda line, _: gossip(double.pair, line.pair, [(line.pair, 0, DOWN)]))
    honest.names(double, "calls this node down again and again")
    honest.watch(LIES_LAST_S)
    assert {name: status_epochs(honest, name) for name in "abc"} == before


def status_epochs(honest, name):
    """The processes of the honest, as one of them sees them."""
    members = honest.status(name).members
    return {other: members[other].epoch for other in set("abc") - {name}}


def test_an_incarnation_nobody_can_beat_is_not_believed(honest):
    double = honest.double(nodes="ab")

    def highest(line, others):
        updates = [(other.pair, 65_535, state) for other in others for state in (SUSPECT, DOWN)]
        return gossip(double.pair, line.pair, updates, incarnation=65_535)

    insist(double, highest)
    honest.names(double, "an incarnation nobody can have")
    honest.watch(LIES_LAST_S + 2)


def test_members_that_do_not_exist_are_nowhere_to_be_seen(honest):
    double = honest.double(nodes="ab")
    nobody = bogus(1400)
    states = [(pair, 0, state) for state in (ALIVE, SUSPECT, DOWN) for pair in nobody]
    tell(double, lambda line, _: gossip(double.pair, line.pair, states[:1400]))
    tell(double, lambda line, _: gossip(double.pair, line.pair, states[1400:]))
    honest.watch(LIES_LAST_S)
    for name in "abc":
        assert len(honest.status(name).members) < 60
    honest.names(double, "many nodes whose cards it does not have")


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
    honest.names(double, "a frame is longer than 65536 bytes")


def test_a_flood_of_good_frames_is_not_listened_to(honest):
    """Three thousand a second: each of them is one a node might say."""
    double = honest.double(nodes="b")
    flood = lambda line, _: [swim(packet(PING, double.pair, line.pair, number=1))] * 100
    insist(double, flood, gap_s=0.02)
    honest.names(double, "more than it may send")
    honest.watch(LIES_LAST_S)


def test_who_shuns_one_and_answers_another_turns_neither_against_the_other(honest):
    """a cannot reach it, and says to b that it is down; b hears it all the time."""
    double = honest.double(nodes="b")
    ping = lambda line, _: [swim(packet(PING, double.pair, line.pair, number=1))]
    tell(double, ping, times=100, gap_s=0.2)
    honest.watch(1)
    assert not any(name in honest.status(other).quarantined() for name in "abc" for other in "abc")


def test_an_absurd_capacity_is_held_against_who_claims_it(honest):
    """An engine with two thousand million free slots, at an address where nobody is."""
    engine = mesh_pb.Engine(name="gpu", protocol="grpc", slots=1 << 31)
    since = time.monotonic()
    double = honest.double(engines=[engine], free=1 << 31)
    honest.names(double, "more slots than any can have")
    honest.watch(LIES_LAST_S)
    served = {call.served_by for call in honest.traffic.calls(since) if call.code == "OK"}
    assert served <= {"b.eu/service-b", "c.us/service-c"}


def test_a_capacity_beyond_the_descriptor_is_held_against_who_claims_it(honest):
    """An engine with four slots, of which two thousand million are free."""
    engine = mesh_pb.Engine(name="gpu", protocol="grpc", slots=4)
    since = time.monotonic()
    double = honest.double(nodes="ab", engines=[engine], free=1 << 31)
    insist(double, lambda *_: [double.load()])
    honest.names(double, "many more slots than its descriptor says")
    served = {call.served_by for call in honest.traffic.calls(since) if call.code == "OK"}
    assert served <= {"b.eu/service-b", "c.us/service-c"}


def test_a_capacity_that_nobody_has_draws_no_call_that_fails(honest):
    """An engine that says it has as many free slots as the largest might have. Nobody is named: what it can do only calls
    show, and those that fail go elsewhere."""
    engine = mesh_pb.Engine(name="gpu", protocol="grpc", slots=1 << 20)
    double = honest.double(engines=[engine], free=1 << 20)
    wait_for("it to be known", lambda: double.name in honest.alive("a"), 10)
    since = time.monotonic()
    tell(double, lambda *_: [double.load()], times=40, gap_s=0.2)
    served = {call.served_by for call in honest.traffic.calls(since) if call.code == "OK"}
    assert served <= {"b.eu/service-b", "c.us/service-c"}
    honest.watch(1)


def test_a_relay_that_lies_about_itself_is_named_and_draws_no_call_that_fails(honest):
    """A million free slots in us, all its own, and no engine by its descriptor: for a while its card may be late."""
    double = honest.double(region="us")
    since = time.monotonic()
    insist(double, lambda *_: [digest(double, "us", 1_000_000)], gap_s=0.5)
    honest.names(double, "gives itself more slots than its descriptor does")
    calls = honest.traffic.calls(since)
    served = {call.served_by for call in calls if call.code == "OK"}
    assert "b.eu/service-b" in served, "what is near is not forgotten for what is promised"


def sum_of_less(double):
    """A candidate with more than the whole region."""
    said = mesh_pb.Frame.FromString(digest(double, "us", 10))
    said.digest.offers[0].free = 5
    return said.SerializeToString()


def more_free_than_there_are(double):
    said = mesh_pb.Frame.FromString(digest(double, "us", 10))
    said.digest.offers[0].slots = 5
    return said.SerializeToString()


def handed_on_from_elsewhere(double):
    """To another region, where a relay says only what is its own."""
    said = mesh_pb.Frame.FromString(digest(double, "us", 10))
    said.digest.relay = node_id("c", "us")
    return said.SerializeToString()


CONTRADICTIONS = [sum_of_less, more_free_than_there_are, handed_on_from_elsewhere]


@pytest.mark.parametrize("lie", CONTRADICTIONS, ids=lambda lie: lie.__name__)
def test_a_relay_whose_digests_cannot_be_is_named(honest, lie):
    double = honest.double(region="us", nodes="ab")
    insist(double, lambda *_: [lie(double)])
    honest.names(double)


def test_a_relay_that_lies_about_others_draws_no_call_that_fails(honest):
    """A million free slots in us, to be had from somebody else at an address where nobody is. The relay is not named: what
    others have it knows from them, and one of them may have lied to it alone."""
    double = honest.double(region="us")

    def free_in_us(name):
        models = [region["models"] for region in honest.status(name).said["regions"] if region["region"] == "us"]
        return {model["free"] for model in itertools.chain(*models)}

    def is_heard():
        enter = lambda line, _: [swim(announce(double.pair, line.pair), RELAYS), digest(double, "us", 4, node="c")]
        tell(double, enter, gap_s=0.3)
        return any(4 in free_in_us(name) for name in "ab")

    wait_for("what it says to count", is_heard, 30)
    since = time.monotonic()
    tell(double, lambda *_: [digest(double, "us", 1_000_000, node="c")], times=16, gap_s=0.5)
    assert not any(1_000_000 in free_in_us(name) for name in "ab")
    calls = honest.traffic.calls(since)
    served = {call.served_by for call in calls if call.code == "OK"}
    assert "b.eu/service-b" in served, "what is near is not forgotten for what is promised"
    assert not any(honest.status(name).quarantined().get(double.name) for name in "abc")
    honest.watch(1)
