"""Whoever is no node of the mesh is refused at every port, written down and counted, while healthy calls beside it neither
fail nor wait."""

import ssl
import time
from datetime import timedelta

import pytest
from meshes import MESH, Authority, Meshes, assert_unseen, pair, serves
from nodes import wait_for
from strangers import (
    HOUR, Credentials, Idlers, Issuer, Outcome, enrol, flood, gossip, hello, join_request, quic,
    refusal, renew_request, request, self_signed, tcp,
)
from traffic import Traffic, failures, p99

MINUTE = timedelta(minutes=1)
# Who may be slow for a moment on a machine that does ten thousand handshakes beside.
SLOWEST_P99_S = 1.0
ATTEMPTS = 10_000


class Target:
    """A pair of nodes under attack: a holds the authority, b has joined and has the engine, and calls at a cross to b."""

    def __init__(self, directory):
        self.meshes = Meshes(directory)
        try:
            self.begin(directory)
        except BaseException:
            self.meshes.end()
            raise

    def begin(self, directory):
        self.authority, self.a, self.b = pair(self.meshes)
        self.issuer = Issuer.of(self.authority)
        serves(self.a, "b.us/service")
        flow = {"kind": "unary", "target": self.a.clients, "ca": self.a.ca, "rate": 40}
        streams = {"kind": "stream", "target": self.a.clients, "ca": self.a.ca, "rate": 5}
        self.traffic = self.meshes.keep(Traffic(directory, [flow, streams])).begun()

    def nodes(self):
        return {"a": self.a, "b": self.b}

    def finish(self):
        try:
            ended = self.traffic.finish()
        finally:
            self.meshes.end()
        assert failures(ended) == []
        streams = [call for call in ended if call.kind == "stream"]
        assert len(streams) == 5, "a stream was cut and begun again"
        assert all(call.messages > 1 for call in streams)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    target = Target(tmp_path_factory.mktemp("attacks"))
    yield target
    target.finish()


@pytest.fixture(autouse=True)
def healthy(target):
    """Whatever a test does, the calls beside it go on."""
    began = time.monotonic()
    yield
    target.traffic.died()
    wait_for("healthy calls", lambda: len(target.traffic.calls(began, "unary")) >= 8)
    calls = target.traffic.calls(began)
    assert failures(calls) == []
    assert p99(calls) < SLOWEST_P99_S
    assert {call.served_by for call in calls} == {"b.us/service"}


WAYS = {
    "peers over TCP": ("peers", lambda node, who: tcp(node.peers, who)),
    "peers over QUIC": ("peers", lambda node, who: quic(node.peers, who)),
    "gossip": ("gossip", lambda node, who: gossip(node.gossip, who, hello("visitor", "us"))),
}
ways = pytest.mark.parametrize("way", WAYS)
each_node = pytest.mark.parametrize("name", ["a", "b"])


def refuses(node, port: str, attempt, sentence: str) -> Outcome:
    """The attempt gets nowhere; the port counts one more, and the log says why with `sentence`."""
    counted, said = node.strangers(port), len(written(node, port, sentence))
    outcome = attempt()
    assert not outcome.entered, "it was let in"
    wait_for("the count", lambda: node.strangers(port) > counted)
    # Nobody else is turned away meanwhile.
    assert node.strangers(port) == counted + 1
    wait_for(f"a line that says {sentence}", lambda: len(written(node, port, sentence)) > said, 5)
    return outcome


def written(node, port: str, sentence: str) -> list[dict]:
    lines = node.lines("a stranger was turned away", f'"port":"{port}"')
    return [line for line in lines if sentence in line["fields"]["why"] and line["fields"]["remote"]]


@each_node
@ways
def test_a_node_of_the_mesh_gets_in(target, name, way):
    """What makes the refusals below mean something: the same attempts, with a certificate that is good."""
    port, attempt = WAYS[way]
    node = target.nodes()[name]
    counted = node.strangers(port)
    assert attempt(node, target.issuer.issue("node/us/visitor")).entered
    assert node.strangers(port) == counted


STRANGERS = {
    "self-signed": "UnknownIssuer",
    "under another authority": "UnknownIssuer",
    "of another trust domain": f"is not of the trust domain `{MESH}`",
    "a client": "is not a node",
    "an operator": "is not a node",
    "an authority": "is not a node",
    "expired": "expired",
    "not yet valid": "not valid yet",
    "revoked": "was revoked",
}


@pytest.fixture(scope="module")
def strangers(target, tmp_path_factory):
    """A certificate of every wrong kind."""
    other = Authority(tmp_path_factory.mktemp("other") / "ca")
    issue = target.issuer.issue
    revoked = issue("node/us/outcast")
    target.authority.revoke("us/outcast")
    for node in target.nodes().values():
        wait_for("the revocation", lambda: node.metric("isobar_revocations_version") > 0)
    return {
        "self-signed": self_signed("node/us/visitor"),
        "under another authority": Issuer.of(other).issue("node/us/visitor"),
        "of another trust domain": issue("node/us/visitor", mesh="other.test"),
        "a client": issue("client/us/visitor"),
        "an operator": issue("operator/us/visitor"),
        "an authority": issue("authority/us/visitor"),
        "expired": issue("node/us/visitor", begins=-2 * HOUR, ends=-MINUTE),
        "not yet valid": issue("node/us/visitor", begins=HOUR, ends=2 * HOUR),
        "revoked": revoked,
    }


@each_node
@ways
@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_refused(target, strangers, name, way, who):
    port, attempt = WAYS[way]
    node = target.nodes()[name]
    refuses(node, port, lambda: attempt(node, strangers[who]), STRANGERS[who])


@each_node
@ways
def test_whoever_shows_no_certificate_is_refused(target, name, way):
    port, attempt = WAYS[way]
    node = target.nodes()[name]
    # Where the authority is the handshake succeeds, for those who join; it is refused there by what it speaks.
    refuses(node, port, lambda: attempt(node, None), "certificate")


def test_a_certificate_that_the_authority_issued_to_a_client_makes_no_node(target, tmp_path):
    out = tmp_path / "client"
    names = ["--role", "client", "--name", "search", "--region", "eu", "--out", out]
    target.authority.ca("issue", *names)
    client = Credentials.read(out)
    for port, attempt in WAYS.values():
        for node in target.nodes().values():
            refuses(node, port, lambda: attempt(node, client), "is not a node")
    # Nor does it renew itself into one.
    refuses_renewal(target, client, "is not a node")


def refuses_renewal(target, credentials, sentence: str):
    def attempt():
        reply = enrol(target.a.gossip, renew_request(), credentials)
        assert isinstance(reply, Outcome), "the authority answered"
        return reply

    refuses(target.a, "gossip", attempt, sentence)


@pytest.mark.parametrize("who", ["self-signed", "under another authority", "expired", "revoked"])
def test_a_stranger_gets_no_certificate_for_one_that_is_not_good(target, strangers, who):
    refuses_renewal(target, strangers[who], STRANGERS[who])


@each_node
@pytest.mark.parametrize(
    ("node", "region", "mesh"), [("b", "us", MESH), ("visitor", "eu", MESH), ("visitor", "us", "x.test")]
)
def test_a_node_speaks_for_itself_alone(target, name, node, region, mesh):
    """A good certificate, and a hello that says somebody else."""
    at = target.nodes()[name]
    visitor = target.issuer.issue("node/us/visitor")
    said = hello(node, region, mesh)
    outcome = refuses(at, "gossip", lambda: gossip(at.gossip, visitor, said), "says that it is")
    assert "says that it is" in outcome.why


@each_node
def test_whoever_begins_with_something_else_is_refused(target, name):
    node = target.nodes()[name]
    visitor = target.issuer.issue("node/us/visitor")
    refuses(node, "gossip", lambda: gossip(node.gossip, visitor, b"\xff" * 100), "not a frame")


@each_node
def test_whoever_says_nothing_is_let_go(target, name):
    node = target.nodes()[name]
    visitor = target.issuer.issue("node/us/visitor")
    refuses(node, "gossip", lambda: gossip(node.gossip, visitor, None), "no hello in time")


@each_node
def test_an_older_tls_is_refused(target, name):
    node = target.nodes()[name]
    visitor = target.issuer.issue("node/us/visitor")
    older = ssl.TLSVersion.TLSv1_2
    outcome = refuses(node, "peers", lambda: tcp(node.peers, visitor, older), "incompatible")
    assert "version" in outcome.why.lower(), outcome.why


def test_a_node_without_an_authority_answers_nobody_who_wants_to_join(target):
    token = target.authority.token("newcomer")

    def attempt():
        return enrol(target.b.gossip, join_request(token, "newcomer", "us"))

    refuses(target.b, "gossip", attempt, "protocol")


def refuses_to_enrol(target, word: str, asked: bytes, credentials=None):
    """The authority answers with `word`, counts it, and writes down why."""
    counted, said = target.a.enrolments(word), len(enrolments(target, word))
    assert refusal(target.a.gossip, asked, credentials) == word
    assert target.a.enrolments(word) == counted + 1
    lines = enrolments(target, word)
    assert len(lines) == said + 1 and lines[-1]["fields"]["why"]


def enrolments(target, word: str) -> list[dict]:
    return target.a.lines("an enrolment was refused", f'"reason":"{word}"')


def test_a_stolen_token_is_worth_nothing_once_it_was_used(target):
    token = target.authority.token("owner")
    join = join_request(token, "owner", "us")
    assert enrol(target.a.gossip, join).HasField("issued")
    # Under its name, under another, and word for word.
    refuses_to_enrol(target, "replayed", join_request(token, "owner", "us"))
    refuses_to_enrol(target, "wrong_name", join_request(token, "thief", "us"))
    refuses_to_enrol(target, "replayed", join)
    audited = target.authority.audit(event="join", outcome="replayed")
    assert audited[-1]["who"] == f"spiffe://{MESH}/node/us/owner" and audited[-1]["remote"] == "127.0.0.1"
    assert_unseen(target.meshes.outputs(), token)
    assert_unseen(target.authority.records(), token)


def test_a_token_for_another_region_is_worth_nothing(target):
    token = target.authority.token("newcomer", region="us")
    refuses_to_enrol(target, "wrong_region", join_request(token, "newcomer", "eu"))
    site = target.meshes.site("newcomer", "eu")
    # Somebody edited the configuration: nothing is asked, nothing is spent.
    site.write(seeds=[target.a.site])
    result = site.join(token, seed=target.a.site)
    assert result.returncode == 2 and "region" in result.stderr
    assert enrol(target.a.gossip, join_request(token, "newcomer", "us")).HasField("issued")


def test_an_oversized_request_is_refused(target):
    token = target.authority.token("newcomer")
    csr = request(padding=9 * 1024)
    assert 8 * 1024 < len(csr) < 15 * 1024
    refuses_to_enrol(target, "csr_too_long", join_request(token, "newcomer", "us", csr))
    refuses_to_enrol(target, "csr_too_long", renew_request(csr), target.issuer.issue("node/us/visitor"))
    # The token is as good as before.
    assert enrol(target.a.gossip, join_request(token, "newcomer", "us")).HasField("issued")


def test_a_request_without_end_is_not_even_read(target):
    """A mebibyte where 16 KiB are enough: whichever way it is refused, that is counted and written down."""
    token = target.authority.token("newcomer")
    asked = join_request(token, "newcomer", "us", bytes(1024 * 1024))
    memory, counted, said = target.a.memory_bytes(), refused_in_all(target), len(target.a.lines("WARN"))
    reply = enrol(target.a.gossip, asked)
    assert isinstance(reply, Outcome) or reply.HasField("refused"), "a certificate was issued"
    wait_for("the count", lambda: refused_in_all(target) > counted, 5)
    wait_for("a line", lambda: len(target.a.lines("WARN")) > said, 5)
    assert target.a.memory_bytes() < memory + 16 * 1024 * 1024
    assert enrol(target.a.gossip, join_request(token, "newcomer", "us")).HasField("issued")


def refused_in_all(target) -> float:
    """Everybody the authority's gossip port turned away, before or after they asked."""
    enrolments = target.a.counts("isobar_enrolments_total", "outcome")
    refused = sum(count for word, count in enrolments.items() if word not in ("joined", "renewed"))
    return refused + target.a.strangers("gossip")


def test_a_request_that_makes_no_sense_is_refused(target):
    visitor = target.issuer.issue("node/us/visitor")
    token = target.authority.token("newcomer")
    for asked, credentials in [
        (b"", None),
        (b"\xff" * 64, None),
        (renew_request(), None),
        (join_request(token, "newcomer", "us"), visitor),
        (join_request(token, "New Comer", "us"), None),
    ]:
        refuses_to_enrol(target, "malformed", asked, credentials)
    refuses_to_enrol(target, "csr_invalid", join_request(token, "newcomer", "us", b"\x30\x03abc"))


def test_those_who_ask_for_nothing_keep_nobody_from_renewing(target):
    """More connections than an authority serves at once, of nobody in particular, each open for as long as it is let."""
    visitor = target.issuer.issue("node/us/visitor")
    with Idlers(target.a.gossip, 64) as idlers:
        wait_for("the idlers", lambda: idlers.opened >= 64)
        for _ in range(5):
            reply = enrol(target.a.gossip, renew_request(), visitor)
            assert not isinstance(reply, Outcome), reply.why
            assert reply.HasField("issued"), reply


@pytest.mark.timeout(200)
def test_ten_thousand_attempts_to_join_do_no_harm(target):
    """The last test here: whoever comes from this address next has to wait."""
    token = target.authority.token("flood")
    assert enrol(target.a.gossip, join_request(token, "flood", "us")).HasField("issued")
    memory, began = target.a.memory_bytes(), time.monotonic()
    before = target.a.counts("isobar_enrolments_total", "outcome")
    lines = len(target.a.err.read_text().splitlines())
    ended = flood(target.a.gossip, join_request(token, "flood", "us"), ATTEMPTS, 24, 120)
    took = time.monotonic() - began
    calls = target.traffic.calls(began, "unary")
    print(f"{took:.0f} s: {dict(ended)}; p99 of {len(calls)} healthy calls: {p99(calls) * 1000:.0f} ms")
    assert sum(ended.values()) == ATTEMPTS and "issued" not in ended
    assert ended["rate_limited"] > 0.9 * ATTEMPTS, ended
    # What the bucket lets through is refused for what it is.
    assert 0 < ended["replayed"] < 60 + 3 * took, ended
    after = target.a.counts("isobar_enrolments_total", "outcome")
    for word in ("rate_limited", "replayed"):
        assert after[word] - before.get(word, 0) == ended[word]
    # The log says so without being drowned.
    written = len(target.a.err.read_text().splitlines()) - lines
    assert target.a.lines("an enrolment was refused", "rate_limited")
    assert written < 20 + 30 * took, f"{written} lines"
    assert target.a.memory_bytes() < memory + 64 * 1024 * 1024
    assert failures(calls) == [] and p99(calls) < SLOWEST_P99_S
    assert len(calls) > 0.9 * 40 * took, "the calls were held up"


def test_the_authority_serves_again_after_the_flood(target):
    token = target.authority.token("late")
    site = target.meshes.site("late", "us").write(seeds=[target.a.site])

    def joined():
        return site.join(token, seed=target.a.site).returncode == 0

    wait_for("a join", joined)
