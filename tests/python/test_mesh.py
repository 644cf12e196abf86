"""Nodes find each other from one seed, and hold together when machines die, pause, move and lose each other: real processes
on machines of their own (network namespaces), in two regions that are 20 ms apart."""

import os
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from lan import Lan, LanNode, callers, sim_engine
from nodes import DEMO_BINARY, LONG, Process, Service, wait_for
from status import ALIVE
from traffic import failures

# ISOBAR_LONG=1: UDP is dropped for ten minutes, and streams last for one.
IS_LONG = os.environ.get("ISOBAR_LONG") == "1"
NO_UDP_S = 600 if IS_LONG else 45
STREAM_S = 60 if IS_LONG else 15

# What a crash may cost, in seconds.
NO_NEW_CALL_AFTER_S = 1.5
DOWN_IN_REGION_S, DOWN_ELSEWHERE_S = 7, 15
# Everybody sees everybody again so long after the network is whole.
CONVERGED_S = 30
LOAD_AGE_P99_MS = 400
EU, US = "eu", "us"
REGIONS = {EU: 1, US: 2}


class Town:
    """Six nodes: a to d in eu, of which one is no relay, e and f in us. a and e have no engine and take the calls of clients
    of their region; the others have the model `sim`, and f alone has `far`. a is the one seed everybody knows.
    """

    HOMES = {"a": EU, "b": EU, "c": EU, "d": EU, "e": US, "f": US}

    def __init__(self, directory):
        self.directory, self.kept = directory, []
        self.lan = Lan(regions=2)
        self.nodes, self.hosts = {}, {}
        try:
            for name, region in self.HOMES.items():
                self.begin(name, region)
            for node in self.nodes.values():
                node.is_ready()
            self.traffic = self.begin_traffic()
        except BaseException:
            self.end()
            raise

    def begin(self, name: str, region: str):
        host = self.hosts[name] = self.lan.host(REGIONS[region])
        models = {"a": [], "e": [], "f": ["sim", "far"]}.get(name, ["sim"])
        engines = []
        for model in models:
            place, size = self.directory / f"engines-{name}", {"slots": 32, "step": "40ms"}
            engine = self.keep(sim_engine(host, place, model, model, **size))
            engines.append(engine.engine(slots=32))
        seed = None if name == "a" else f"{self.hosts['a'].address}:8445"
        node = LanNode(host, self.directory, name, region, seed, engines=engines)
        self.nodes[name] = self.keep(node)

    def keep(self, process):
        self.kept.append(process)
        return process

    def begin_traffic(self):
        """Calls from both regions, all along; clients sit beside the node they call, so that no rule touches them."""
        found = []
        for name, rate in (("a", 40), ("e", 20)):
            node = self.nodes[name]
            flow = {"target": node.clients, "ca": node.ca, "kind": "infer"}
            far = {**flow, "model": "far", "rate": 5, "label": "far"}
            flows = [{**flow, "model": "sim", "rate": rate}, far]
            found.append(self.keep(callers(node.host, self.directory, f"traffic-{name}", flows)))
        for traffic in found:
            wait_for("the first calls", lambda: any(c.code == "OK" for c in traffic.calls()))
        return dict(zip(("a", "e"), found, strict=True))

    def restart(self, name: str, host=None) -> LanNode:
        node = self.nodes[name].again(host)
        self.nodes[name] = self.keep(node)
        return node.is_ready()

    def others(self, *names: str) -> list[LanNode]:
        return [node for name, node in self.nodes.items() if name not in names]

    def missing(self) -> dict[str, set[str]]:
        """Whom each node ought to see alive and does not: its region, and if it is a relay the relays of the other."""
        seen, found = statuses(self.nodes.values()), {}
        for name, status in seen.items():
            region = self.HOMES[name]
            own = {other for other, home in self.HOMES.items() if home == region} - {name}
            if status.is_relay():
                own |= {n for n, s in seen.items() if self.HOMES[n] != region and s.is_relay()}
            if own - status.alive():
                found[name] = own - status.alive()
        return found

    def mend(self):
        """Heals the network, and starts whom a test that failed has left dead or paused."""
        self.lan.heal()
        for name, node in list(self.nodes.items()):
            if node.popen.poll() is not None:
                self.restart(name)
            node.popen.send_signal(signal.SIGCONT)

    def whole(self, timeout=CONVERGED_S):
        """Waits until the mesh is whole."""
        seen = {}

        def look():
            seen["missing"] = self.missing()
            return not seen["missing"]

        try:
            wait_for("a whole mesh", look, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; not seen alive: {seen['missing']}") from None

    def served(self, at: str, since: float) -> set[str]:
        """Which nodes served the calls for `sim` that clients began at a node."""
        calls = self.traffic[at].calls(since, "infer")
        return {call.served_by.split(".")[0] for call in calls if call.code == "OK"}

    def check_calls(self, since: float, *kinds: str):
        """Every call there was, in either region, was answered."""
        for name, traffic in self.traffic.items():
            traffic.died()
            calls = traffic.calls(since, *kinds)
            assert failures(calls, since) == [], f"calls at {name}"
            assert len(calls) > 5 * (time.monotonic() - since), f"few calls at {name}: {len(calls)}"

    def end(self):
        for process in reversed(self.kept):
            process.kill()
        self.lan.end()


def statuses(nodes) -> dict:
    """What each of `nodes` says of the mesh, asked at once."""
    nodes = list(nodes)
    with ThreadPoolExecutor(len(nodes)) as pool:
        found = pool.map(lambda node: node.status(), nodes)
        return {node.name: status for node, status in zip(nodes, found, strict=True)}


class Watch:
    """Looks at some nodes again and again while something goes on, and keeps what they said."""

    def __init__(self, nodes, every_s=0.5):
        self.nodes, self.every_s, self.seen = list(nodes), every_s, []

    def look(self):
        at = time.monotonic()
        self.seen.append((at, statuses(self.nodes)))
        return self.seen[-1][1]

    def until(self, end: float):
        """Looks until a moment has come."""
        while time.monotonic() < end:
            due = time.monotonic() + self.every_s
            self.look()
            time.sleep(max(0.0, min(due, end) - time.monotonic()))

    def downs(self) -> set[tuple[str, str]]:
        """Who ever called whom down."""
        return {
            (by, name)
            for _, found in self.seen
            for by, status in found.items()
            for name in status.down()
        }

    def ages(self, *of: str) -> list[float]:
        """How old the loads of some nodes were, each time anybody was asked who subscribes to them, unless they were idle."""
        return [
            member.load_age_ms
            for _, found in self.seen
            for status in found.values()
            for name, member in status.members.items()
            if name in of and member.subscribed and member.load_age_ms is not None and member.in_flight
        ]

    def first(self, by: str, check) -> float | None:
        """When what a node says first passed a check."""
        return next((at for at, found in self.seen if check(found[by])), None)


def present(node) -> int:
    """How many others a node knows to take calls, by its metrics: asking for its status takes a process each time."""
    lines = node.get("/metrics")[1].splitlines()
    return sum(line.startswith("isobar_peer_present{") and line.endswith(" 1.0") for line in lines)


def p99_of(values) -> float:
    return sorted(values)[len(values) * 99 // 100]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    town = Town(tmp_path_factory.mktemp("town"))
    yield town
    town.end()


@pytest.fixture
def town(made):
    """The town, whole: whatever the test before has done to it is over."""
    made.mend()
    made.whole(60)
    yield made
    made.mend()


def test_nodes_find_each_other_from_one_seed(made):
    made.whole()

    def relays():
        return {name for name, status in statuses(made.nodes.values()).items() if status.is_relay()}

    # Whoever is to be one waits a little, for others may come.
    wait_for("three relays, and two", lambda: len(relays() & set("abcd")) == 3 and set("ef") <= relays(), 15)
    found = statuses(made.nodes.values())
    assert all(set(status.linked().values()) == {"quic"} for status in found.values())
    since = time.monotonic()
    wait_for("calls at both regions", lambda: {"b", "c", "d", "f"} <= made.served("a", since), 20)
    # A model that one region has is served to the clients of the other, whoever they ask.
    wait_for("calls for it", lambda: made.traffic["a"].calls(since, "far"), 20)
    assert {call.served_by for call in made.traffic["a"].calls(since, "far")} == {"f.us/far"}
    wait_for("calls from us to eu", lambda: made.served("e", since) & set("bcd"), 20)
    time.sleep(1)
    made.check_calls(since)


def test_nobody_is_called_down_while_a_tenth_of_all_packets_is_lost(town):
    watch = Watch(town.nodes.values(), 1.0)
    since = time.monotonic()
    town.lan.lose(10)
    watch.until(since + 30)
    town.lan.heal()
    assert watch.downs() == set()
    for node in town.nodes.values():
        node.died()
    town.check_calls(since, "infer")


def test_a_node_that_is_killed_gets_no_call_any_more_and_is_soon_down_everywhere(town):
    victim = town.nodes["b"]
    watchers = town.others("b")
    since = time.monotonic()
    time.sleep(1)
    victim.kill()
    killed = time.monotonic()
    time.sleep(NO_NEW_CALL_AFTER_S)
    linked = {node.name for node in watchers if "b" in node.status().linked()}
    assert linked == set(), "somebody may still be sent there"
    # What is under way there is given up sooner or later; nothing else may come to that.
    under_way = {name: town.nodes[name].metric('isobar_peer_calls_in_flight{peer="b",region="eu"}') for name in ("a", "e")}
    broken = {name: town.nodes[name].broken_attempts() + under_way[name] for name in ("a", "e")}
    watch, noticed = Watch(watchers, 0.25), {}
    while len(noticed) < len(watchers) and time.monotonic() < killed + DOWN_ELSEWHERE_S:
        watch.until(time.monotonic() + 0.5)
        noticed = {node.name: watch.first(node.name, is_gone("b")) for node in watchers}
        noticed = {name: at - killed for name, at in noticed.items() if at}
    time.sleep(max(0.0, killed + 6 - time.monotonic()))
    for name in ("a", "e"):
        assert town.nodes[name].broken_attempts() <= broken[name], "somebody was sent to the dead"
    print("noticed after", {name: round(after, 1) for name, after in noticed.items()})
    assert noticed.keys() == {node.name for node in watchers}, "the others have not noticed"
    for node in watchers:
        limit = DOWN_IN_REGION_S if node.region == EU else DOWN_ELSEWHERE_S
        assert noticed[node.name] < limit, noticed
    others = {(by, name) for by, name in watch.downs() if name != "b"}
    assert others == set(), "nobody else is down"
    town.restart("b")
    town.whole()
    back = time.monotonic()
    wait_for("calls to the node that is back", lambda: "b" in town.served("a", back), 10)
    town.check_calls(since, "infer")


def is_gone(name: str):
    """Whether a node is no longer thought to live."""
    return lambda status: status.state(name) not in (ALIVE, "suspect")


def test_a_node_that_was_paused_returns_by_itself(town):
    victim = town.nodes["c"]
    since = time.monotonic()
    victim.popen.send_signal(signal.SIGSTOP)
    try:
        watch = Watch(town.others("c"))
        watch.until(since + 10)
    finally:
        victim.popen.send_signal(signal.SIGCONT)
    # Relays of the other region may only now give up the process of b that the test before has killed.
    assert {name for _, name in watch.downs()} <= {"b", "c"}, "nobody else is down"
    back = time.monotonic()
    town.whole()
    wait_for("calls to the node that is back", lambda: "c" in town.served("a", back), 10)
    victim.died()
    town.check_calls(since, "infer")


def test_halves_that_lose_each_other_go_on_and_find_each_other_again(town):
    """a and b on one side, c and d on the other, with us."""
    since = time.monotonic()
    town.lan.split([town.hosts["a"], town.hosts["b"]])
    time.sleep(DOWN_ELSEWHERE_S + 1)
    found = statuses(town.nodes.values())
    assert "b" in found["a"].alive() and not found["a"].alive() & set("cdef"), found["a"].said
    assert found["c"].alive() >= {"d"} and not found["c"].alive() & set("ab"), found["c"].said
    settled = time.monotonic()
    time.sleep(2)
    assert town.served("a", settled) == {"b"}
    assert not town.served("e", settled) & set("ab")
    town.lan.heal()
    town.whole(CONVERGED_S)
    healed = time.monotonic()
    wait_for("calls to all", lambda: {"b", "c", "d", "f"} <= town.served("a", healed), 10)
    # The model that only the other side had could not be served meanwhile; and b alone bears in the first moments what four did.
    town.check_calls(since + 3, "infer")


def test_nobody_is_down_whom_one_other_alone_does_not_hear(town):
    b, c = town.hosts["b"], town.hosts["c"]
    since = time.monotonic()
    b.deaf_to(c)
    watch = Watch(town.nodes.values())
    watch.until(since + 12)
    town.lan.heal()
    downs = {(by, name) for by, name in watch.downs() if by not in "bc"}
    assert downs == set(), "those who hear both know better"
    town.whole()
    town.check_calls(since, "infer")


def test_a_region_that_was_cut_off_is_back_in_half_a_minute(town):
    since = time.monotonic()
    town.lan.cut_off(REGIONS[US])
    wait_for("eu to notice", lambda: not us_seen(town), DOWN_ELSEWHERE_S)
    time.sleep(max(0.0, since + 20 - time.monotonic()))
    settled = time.monotonic()
    time.sleep(2)
    assert town.served("e", settled) == {"f"}, town.traffic["e"].calls(settled)[:3]
    assert town.served("a", settled) <= set("bcd")
    town.lan.heal()
    healed = time.monotonic()
    town.whole(CONVERGED_S)
    wait_for("calls across", lambda: "f" in town.served("a", healed), CONVERGED_S)
    assert time.monotonic() - healed < CONVERGED_S
    town.check_calls(since, "infer")


def us_seen(town) -> set[str]:
    """Which nodes of us anybody in eu sees alive."""
    found = statuses(town.nodes[name] for name in "abcd")
    return set().union(*(status.alive() for status in found.values())) & set("ef")


def test_a_node_that_comes_back_with_another_address_is_found_there(town):
    host = town.hosts["d"]
    since = time.monotonic()
    town.nodes["d"].kill()
    old = host.address
    host.move(77)
    node = town.restart("d")
    assert node.gossip.startswith(host.address) and host.address != old

    def found():
        seen = statuses(town.nodes[name] for name in "abc")
        return all(s.state("d") == ALIVE and s.members["d"].gossip == node.gossip for s in seen.values())

    wait_for("the others to find it", found, 15)
    back = time.monotonic()
    wait_for("calls to it", lambda: "d" in town.served("a", back), 10)
    town.check_calls(since)


def test_of_two_nodes_with_one_name_the_later_stays_and_the_earlier_says_why_it_stops(town):
    earlier, host = town.nodes["c"], town.lan.host(REGIONS[EU])
    since = time.monotonic()
    later = town.keep(earlier.again(host, state="state-of-another-machine")).is_ready()
    town.nodes["c"], town.hosts["c"] = later, host
    wait_for("the earlier one to stop", lambda: earlier.popen.poll() is not None, 20)
    assert earlier.popen.returncode == 1
    said = earlier.err.read_text()[-4000:]
    assert "another process is spiffe://mesh.test/node/eu/c too" in said, said
    later.died()
    town.whole()
    later.died()

    def found():
        seen = statuses(town.nodes[name] for name in "abd")
        return all(s.state("c") == ALIVE and s.members["c"].gossip == later.gossip for s in seen.values())

    wait_for("the others to know the later one", found, 15)
    town.check_calls(since, "infer")


@pytest.mark.timeout(NO_UDP_S + 200)
def test_without_udp_links_go_over_tcp_and_nobody_is_called_down(town):
    since = time.monotonic()
    town.lan.no_udp()
    watch = Watch(town.nodes.values(), 1.0 if IS_LONG else 0.5)

    def links():
        return [set(status.linked().values()) for status in watch.look().values()]

    wait_for("links over TCP", lambda: all(found == {"tcp"} for found in links()), 15)
    settled = Watch(town.nodes.values(), watch.every_s)
    settled.until(since + NO_UDP_S)
    town.lan.heal()
    assert watch.downs() | settled.downs() == set()
    # Those who are called all along: the others have nothing to say more than once a second.
    ages = settled.ages("b", "c", "d", "f")
    assert len(ages) > 100
    print(f"load age over TCP: p50 {statistics.median(ages):.0f} ms, p99 {p99_of(ages):.0f} ms of {len(ages)}")
    assert p99_of(ages) <= LOAD_AGE_P99_MS
    for status in settled.seen[-1][1].values():
        assert set(status.linked().values()) == {"tcp"}
    back = Watch(town.nodes.values())

    def over_quic():
        return all(set(s.linked().values()) == {"quic"} for s in back.look().values())

    wait_for("links over QUIC again", over_quic, 90)
    assert back.downs() == set()
    # In the first moments calls are under way over QUIC, and a model that one node has can be had nowhere else.
    town.check_calls(since + 5)


def test_a_node_whose_data_plane_is_busy_does_not_look_dead(town):
    """A client on its machine asks d for more than a core can do."""
    busy = town.nodes["d"]
    # A model nobody has: the node refuses at once, so that it is busy and no engine is.
    calls = ["inference.GRPCInferenceService/ModelReady", "-d", '{"name": "none"}']
    load = ["--concurrency", "256", "--duration", "15s", "--json"]
    trust = ["--ca", busy.ca, "--server-name", "localhost"]
    command = busy.host.enter(DEMO_BINARY, "bench", busy.clients, *trust, *calls, *load)
    client = town.keep(Process("flood", town.directory, command))
    began, used = time.monotonic(), busy.cpu_s()
    watch = Watch(town.others("d"), 0.5)
    watch.until(began + 15)
    share = (busy.cpu_s() - used) / (time.monotonic() - began)
    assert client.stop(timeout=LONG) in (0, 1), client.err.read_text()
    print(f"the busy node used {share:.2f} of a core")
    assert share > 0.2, "it was not busy"
    assert watch.downs() == set()
    suspected = [at for at, found in watch.seen for s in found.values() if s.state("d") == "suspect"]
    assert not suspected


@pytest.mark.timeout(4 * STREAM_S + 120)
def test_a_rolling_restart_cuts_no_stream_and_an_engine_with_two_owners_stays_reachable(tmp_path):
    """a and b front one engine, c has none; clients know all three."""
    kept, lan = [], Lan(regions=1)
    try:
        home = lan.host(1)
        service = Service(tmp_path, "shared", host=home.address, enter=home.enter)
        kept.append(service)
        engine = service.engine(id="gpu-1", slots=64)
        nodes = {}
        for name in "abc":
            seed = f"{nodes['a'].host.address}:8445" if nodes else None
            engines = [engine] if name in "ab" else []
            node = LanNode(
                lan.host(1), tmp_path, name, EU, seed, engines=engines,
                drain_timeout=f"{STREAM_S + 30}s",
            )
            kept.append(node)
            nodes[name] = node.is_ready()
        wait_for("c to know both", lambda: nodes["c"].status().alive() == {"a", "b"})
        # Whoever is new to an engine begins with one slot.
        shares = lambda: [nodes["c"].status().members[name].slots for name in "ab"]
        wait_for("both to have their share", lambda: shares() == [32, 32])
        target = ",".join(node.clients for node in nodes.values())
        flow = {"target": target, "ca": nodes["a"].ca}
        # So many that one owner's share bears all of them while the other ends its own.
        streams = {"kind": "answer", "rate": 12, "messages": STREAM_S * 10, "delay_ms": 100}
        flows = [{**flow, "kind": "unary", "rate": 50}, {**flow, **streams}]
        traffic = callers(home, tmp_path, "traffic", flows)
        kept.append(traffic)
        traffic.begun()
        time.sleep(2)
        for name in "abc":
            assert nodes[name].stop(timeout=STREAM_S + 40) == 0
            nodes[name] = nodes[name].again().is_ready()
            kept.append(nodes[name])
            rest = set("abc") - {name}
            wait_for("it to be back", lambda: nodes[name].status().alive() >= rest)
            wait_for("others to see it", lambda: all(name in nodes[o].status().alive() for o in rest))
        calls = traffic.finish(STREAM_S + LONG)
        assert failures(calls) == []
        answers = [call for call in calls if call.kind == "answer"]
        assert len(answers) >= 12
        assert all(call.messages == STREAM_S * 10 for call in answers)
        good = sorted(call.at + call.took for call in calls if call.kind == "unary")
        gaps = [later - earlier for earlier, later in zip(good, good[1:], strict=False)]
        assert max(gaps) < 5, f"nobody reached the engine for {max(gaps):.1f} s"
        served = {call.served_by for call in calls if call.code == "OK"}
        assert served == {"a.eu/shared", "b.eu/shared"}
        wait_for("both to have their share", lambda: shares() == [32, 32])
        one_dies_and_the_other_takes_over(lan.host(1), tmp_path, nodes, kept)
    finally:
        for process in reversed(kept):
            process.kill()
        lan.end()


def one_dies_and_the_other_takes_over(host, directory, nodes, kept):
    """b is killed while c sends calls to both."""
    flow = {"kind": "unary", "rate": 50, "target": nodes["c"].clients, "ca": nodes["a"].ca}
    traffic = callers(host, directory, "death", [flow])
    kept.append(traffic)
    traffic.begun()
    time.sleep(1)
    nodes["b"].kill()
    killed = time.monotonic()
    wait_for("a to have it all", lambda: nodes["c"].status().members["a"].slots == 64, DOWN_IN_REGION_S)
    print(f"the other owner has all slots after {time.monotonic() - killed:.1f} s")
    time.sleep(1)
    calls = traffic.finish()
    assert failures(calls) == []
    good = sorted(call.at + call.took for call in calls)
    gaps = [later - earlier for earlier, later in zip(good, good[1:], strict=False)]
    assert max(gaps) < 5, f"nobody reached the engine for {max(gaps):.1f} s"


@pytest.fixture
def pair(tmp_path, request):
    """a has an engine; b has none, is of the region that is asked for, and finds a by its seed."""
    kept, lan = [], Lan(regions=2)
    region = getattr(request, "param", EU)

    def keep(process):
        kept.append(process)
        return process

    try:
        hosts = [lan.host(1), lan.host(REGIONS[region])]
        # Room for all calls that wait at once.
        engine = keep(sim_engine(hosts[0], tmp_path, "sim", "sim", slots=256))
        a = keep(LanNode(hosts[0], tmp_path, "a", EU, engines=[engine.engine(slots=256)]))
        b = keep(LanNode(hosts[1], tmp_path, "b", region, f"{hosts[0].address}:8445"))
        a.is_ready()
        b.is_ready()
        yield SimpleNamespace(a=a, b=b, keep=keep, directory=tmp_path)
    finally:
        for process in reversed(kept):
            process.kill()
        lan.end()


def reached_while_it_started(pair, node: LanNode, start) -> list:
    """The calls that reached a node from its start until it was ready: clients have tried all along, each anew."""
    flow = {"target": node.clients, "ca": pair.a.ca, "kind": "fresh", "model": "sim", "rate": 40}
    traffic = callers(node.host, pair.directory, "traffic", [flow])
    pair.keep(traffic)
    wait_for("calls", lambda: len(traffic.calls()) > 10)
    started = pair.keep(start()).is_ready()
    wait_for("it to be ready", lambda: started.get("/readyz") == (200, "ok\n"), 5)
    ready = time.monotonic()
    wait_for("a call after that", lambda: traffic.calls(ready))
    calls = traffic.finish()
    return [c for c in calls if c.at < ready and "failed to connect" not in c.details]


@pytest.mark.parametrize("pair", [EU, US], indirect=True)
@pytest.mark.parametrize("finds_by", ["its seed", "cards it kept"])
def test_a_node_that_has_just_started_refuses_nobody_for_not_knowing_the_others(pair, finds_by):
    """In us it is alone, and hears of what eu has only when it has become a relay."""
    wait_for("b to know a", lambda: "a" in pair.b.status().alive())
    assert pair.b.stop() == 0
    start = lambda: pair.b.again(**({} if finds_by == "its seed" else {"seed": None}))
    calls = reached_while_it_started(pair, pair.b, start)
    assert failures(calls) == []
    assert len(calls) > 3


def test_a_node_whose_seed_does_not_answer_goes_on_alone_after_a_while(pair):
    assert pair.b.stop() == 0
    assert pair.a.stop() == 0

    def start():
        node = pair.b.again().is_ready()
        assert node.get("/readyz") == (503, "starting\n")
        return node

    calls = reached_while_it_started(pair, pair.b, start)
    assert {call.code for call in calls} == {"NOT_FOUND"}
    assert max(call.took for call in calls) > 1, "nobody waited"


@pytest.mark.timeout(180)
def test_a_node_with_fifty_peers_costs_next_to_nothing_while_nobody_calls(tmp_path):
    """Fifty-one nodes on one machine, each with an engine: everybody subscribes to everybody."""
    kept, lan = [], Lan(regions=1)
    try:
        host = lan.host(1)
        service = Service(tmp_path, "shared", host=host.address, enter=host.enter)
        kept.append(service)
        seed = f"{host.address}:20000"
        engine = service.engine(health={"kind": "tcp"})
        nodes = []
        for number in range(51):
            listen = {"gossip": f"{host.address}:{20000 + number}"}
            listen |= {port: f"{host.address}:0" for port in ("clients", "peers")}
            listen |= {port: "127.0.0.1:0" for port in ("metrics", "admin")}
            name = f"n{number}"
            node = LanNode(
                host, tmp_path, name, EU, seed if number else None, engines=[engine], listen=listen
            )
            kept.append(node)
            nodes.append(node)
            if number == 0:
                # It makes the authority all the others use.
                node.is_ready()
        for node in nodes:
            node.is_ready()
        some = nodes[::10]
        wait_for("all to know all", lambda: all(present(n) == 50 for n in some), 60)
        time.sleep(5)
        before = [node.cpu_s() for node in nodes]
        time.sleep(20)
        shares = [(node.cpu_s() - used) / 20 for node, used in zip(nodes, before, strict=True)]
        memory = [node.memory_bytes() / 1e6 for node in nodes]
        print(f"of a core: median {statistics.median(shares):.4f}, most {max(shares):.4f}")
        print(f"memory: median {statistics.median(memory):.1f} MB, most {max(memory):.1f} MB")
        assert max(shares) < 0.02
        assert max(memory) < 40
        for node in nodes:
            node.died()
    finally:
        for process in reversed(kept):
            process.kill()
        lan.end()
