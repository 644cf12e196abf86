"""Things break under load: what callers see, who is ejected and who is not, and how everything comes back."""

import signal
import time

import grpc
from isobar.test.v1 import kinds_pb2 as pb
from isobar.test.v1 import kinds_pb2_grpc
from load import OK, Load, failed, shares
from nodes import LONG, free_port, wait_for, wait_for_peers

QUICK = {"interval": "500ms", "timeout": "300ms", "failures": 3, "successes": 2}


def three_nodes(mesh):
    """a has no engine; b and c have one each, with room for all calls."""
    first, second = mesh.service("first"), mesh.service("second")
    b = mesh.node("b", "us", engines=[first.engine(slots=64)])
    c = mesh.node("c", "us", engines=[second.engine(slots=64)])
    a = mesh.node("a", "eu", peers=[b, c])
    wait_for_peers(a, b, c)
    return a, b, c, (first, second)


def starts(services, calls):
    """How often each call that may run only once reached an engine."""
    counts = {}
    for service in services:
        with grpc.insecure_channel(service.address) as channel:
            stub = kinds_pb2_grpc.KindsStub(channel)
            for call in calls:
                if call.kind == "once":
                    seen = stub.Seen(pb.SeenRequest(call_id=call.name), timeout=LONG)
                    counts[call.name] = counts.get(call.name, 0) + seen.starts
    return counts


def check_starts(services, calls):
    """Nothing that may run only once began twice, and what ended well began once."""
    counts = starts(services, calls)
    assert max(counts.values()) == 1
    for call in calls:
        if call.kind == "once" and call.code == OK:
            assert counts[call.name] == 1, call


def check_deadlines(calls, load):
    for call in calls:
        if call.kind != "stream":
            assert call.took < load.deadline + 1, f"{call.kind} took {call.took} s"


def served_since(load, since, node):
    return any(
        c.at > since and c.code == OK and c.served_by.startswith(node) for c in list(load.calls)
    )


def test_kill_of_the_owning_node(mesh):
    a, b, c, services = three_nodes(mesh)
    load = Load([a], unary=150, once=50, streams_open=20, delay_ms=30).start()
    wait_for("calls through b", lambda: served_since(load, 1.0, "b"))
    b.kill()
    killed = load.now()
    time.sleep(4)
    b = mesh.again(b)
    back = load.now()
    wait_for("traffic of the restarted node", lambda: served_since(load, back, "b"), 5)
    calls = load.stop()
    assert len(calls) > 1000
    assert failed(calls, "unary") == []
    check_deadlines(calls, load)
    check_starts(services, calls)
    # Those that may run only once and were running there fail; nobody else does.
    assert len(failed(calls, "once")) < 10, failed(calls, "once")
    for call in calls:
        if call.kind == "once" and call.code != OK:
            assert call.code == grpc.StatusCode.UNAVAILABLE, call
            assert killed - 0.5 < call.at < killed + 2, call
    cut = [c for c in calls if c.kind == "stream" and c.served_by.startswith("b") and c.at < killed]
    cut = [c for c in cut if c.at + c.took > killed]
    assert cut and all(c.code == grpc.StatusCode.UNAVAILABLE for c in cut), cut
    whole = [c for c in calls if c.kind == "stream" and c.code == OK]
    assert whole and all(c.messages == load.stream_messages for c in whole)


def test_pause_of_the_owning_node(mesh):
    a, b, c, services = three_nodes(mesh)
    load = Load([a], unary=100, once=30, delay_ms=30).start()
    wait_for("calls through b", lambda: served_since(load, 1.0, "b"))
    b.popen.send_signal(signal.SIGSTOP)
    time.sleep(10)
    b.popen.send_signal(signal.SIGCONT)
    back = load.now()
    wait_for("traffic of the resumed node", lambda: served_since(load, back, "b"), 10)
    calls = load.stop()
    assert failed(calls, "unary") == []
    check_deadlines(calls, load)
    check_starts(services, calls)
    settled = [c for c in calls if back - 6 < c.at < back - 1]
    assert failed(settled, "once") == [], "two seconds after the pause began nobody is sent there"


def two_engines(mesh, **options):
    """A node with an engine behind a relay that can break, and one that does not."""
    first, second = mesh.service("first"), mesh.service("second")
    relay = mesh.relay(first)
    fragile = first.engine(slots=32, health=QUICK) | {"url": f"http://{relay.address}"}
    node = mesh.node("a", "eu", engines=[fragile, second.engine(slots=32, health=QUICK)])
    return node, relay, (first, second)


def healthy(node, engine):
    return node.metric(f'isobar_engine_healthy{{engine="{engine}"}}')


def test_an_engine_that_hangs_leaves_and_returns_by_itself(mesh):
    node, relay, _ = two_engines(mesh)
    load = Load([node], unary=60, delay_ms=10, deadline=3).start()
    wait_for("calls at the first", lambda: served_since(load, 0.5, "a.eu/first"))
    relay.hang(True)
    wait_for("the engine to leave", lambda: healthy(node, "first") == 0, 10)
    left = load.now()
    time.sleep(4)
    relay.hang(False)
    wait_for("the engine to return", lambda: healthy(node, "first") == 1, 10)
    back = load.now()
    wait_for("its traffic", lambda: served_since(load, back, "a.eu/first"), 15)
    calls = load.stop()
    check_deadlines(calls, load)
    assert failed([c for c in calls if left < c.at < back], "unary") == []
    late = {c.code for c in calls if c.code != OK}
    assert late <= {grpc.StatusCode.DEADLINE_EXCEEDED}, late


def test_an_engine_that_resets_in_mid_stream(mesh):
    node, relay, _ = two_engines(mesh)
    load = Load([node], unary=100, streams_open=20, delay_ms=30, stream_messages=50).start()
    wait_for("streams", lambda: node.metric('isobar_engine_calls_in_flight{engine="first"}') > 5)
    time.sleep(1)
    for _ in range(5):
        relay.reset()
        time.sleep(0.5)
    end = load.now()
    wait_for("traffic afterwards", lambda: served_since(load, end, "a.eu/first"), LONG)
    calls = load.stop()
    assert failed(calls, "unary") == [], "they are tried again at the other engine"
    streams = [c for c in calls if c.kind == "stream"]
    cut = [c for c in streams if c.code != OK]
    assert cut and all(c.code == grpc.StatusCode.UNAVAILABLE for c in cut), failed(calls, "stream")
    assert all(c.messages == load.stream_messages for c in streams if c.code == OK)


def test_a_busy_engine_is_never_ejected_and_gets_its_share_back(mesh):
    node, _, (first, _) = two_engines(mesh)
    load = Load([node], unary=60, delay_ms=50).start()
    wait_for("calls at the first", lambda: served_since(load, 1, "a.eu/first"))
    first.popen.send_signal(signal.SIGUSR1)
    busy = load.now()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert healthy(node, "first") == 1
        assert node.metric('isobar_engine_ejected{engine="first"}') == 0
        time.sleep(0.5)
    asked = node.metric('isobar_attempts_failed_total{to="engine",outcome="busy"}')
    first.popen.send_signal(signal.SIGUSR2)
    free = load.now()
    wait_for("its traffic", lambda: served_since(load, free, "a.eu/first"), 10)
    time.sleep(5)
    calls = load.stop()
    assert failed(calls, "unary") == []
    elsewhere = shares([c for c in calls if busy + 1 < c.at < free])
    assert elsewhere["a.eu/second"] > 0.99, elsewhere
    # It is asked now and then, and no more.
    assert asked < 60, asked
    after = shares([c for c in calls if c.at > load.now() - 4])
    assert after["a.eu/first"] > 0.3, after


def test_an_engine_that_is_twenty_times_slower_gets_little(mesh):
    slow, quick = mesh.service("slow", factor=20.0), mesh.service("quick")
    engines = [service.engine(slots=8) for service in (slow, quick)]
    node = mesh.node("a", "eu", engines=engines)
    load = Load([node], unary=100, delay_ms=20, deadline=10).start()
    time.sleep(10)
    calls = [c for c in load.stop() if c.at > 1]
    assert failed(calls, "unary") == []
    share = shares(calls)
    assert share["a.eu/slow"] < 0.15, share
    took = sorted(c.took for c in calls)
    assert took[len(took) // 2] < 0.2, "half of the calls do not notice"


def test_shares_follow_slots_at_full_load(mesh):
    services = {name: mesh.service(name) for name in ("one", "two", "three")}
    slots = {"b.us/one": 6, "b.us/two": 10, "c.us/three": 32}
    engines = {name: services[name].engine(slots=slots[f"{node}.us/{name}"])
               for node, name in (("b", "one"), ("b", "two"), ("c", "three"))}
    b = mesh.node("b", "us", engines=[engines["one"], engines["two"]])
    c = mesh.node("c", "us", engines=[engines["three"]])
    a = mesh.node("a", "eu", peers=[b, c])
    wait_for_peers(a, b, c)
    load = Load([a], closed=sum(slots.values()), delay_ms=250, deadline=10).start()
    time.sleep(15)
    calls = [call for call in load.stop() if call.at > 3]
    share = shares(calls)
    for engine, count in slots.items():
        want = count / sum(slots.values())
        assert abs(share[engine] - want) < 0.1 * want, share
    refused = [c for c in calls if c.code != OK]
    assert {c.code for c in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    print(f"{len(refused)} of {len(calls)} refused")
    assert len(refused) < 0.1 * len(calls), f"{len(refused)} of {len(calls)}"


def test_rolling_restart_of_three_nodes_loses_nothing(mesh):
    services = [mesh.service(name) for name in ("one", "two", "three")]
    nodes = []
    names = ("a", "b", "c")
    # Each lists the two others, whose ports must be known before they run.
    listens = {
        name: {
            port: f"127.0.0.1:{free_port()}" for port in ("clients", "peers", "gossip", "metrics")
        }
        for name in names
    }
    for name, service in zip(names, services):
        peers = [
            {"name": other, "region": "eu", "peers": at["peers"], "gossip": at["gossip"]}
            for other, at in listens.items()
            if other != name
        ]
        nodes.append(mesh.node(
            name, "eu", engines=[service.engine(slots=100)], peers=peers, listen=listens[name],
            drain_timeout="60s",
        ))
    load = Load(nodes, unary=200, streams_open=50, delay_ms=10, stream_messages=60).start()
    time.sleep(3)
    for index, node in enumerate(nodes):
        assert node.stop() == 0
        nodes[index] = mesh.again(node)
        time.sleep(2)
    load.streams_open = 0
    calls = load.stop()
    assert failed(calls, "unary", "stream") == []
    assert len([c for c in calls if c.kind == "unary"]) > 2000
    assert len([c for c in calls if c.kind == "stream"]) >= 100
