"""A machine becomes a node of a mesh with one token: what README says is all it takes, and a token that is not good gets
nobody in and says why."""

import re
import stat
import threading
import time

import grpc
import pytest
from meshes import (
    LONG, MESH, Site, assert_unseen, call, isobar, key_bodies, meshes, pair, serves, try_call,
)
from netns import Machines
from nodes import ROOT, wait_for
from strangers import (
    Credentials, Outcome, Token, enrol, gossip, hello, join_request, quic, refusal, renew_request, tcp,
)

__all__ = ["meshes"]
COUNTED = "isobar_enrolments_total"


def commands(part: str) -> str:
    """The commands of README behind a comment such as `<!-- join: first machine -->`."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- join: {part} -->\s*```sh\n(.*?)```", text, re.DOTALL)
    assert found, f"README has no commands behind <!-- join: {part} -->"
    return found.group(1)


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path)
    yield machines.machines
    machines.end()


def configure(machine, name: str, text: str):
    """What the operator of a machine adds to whatever configuration lies in its working directory."""
    directory = machine.home / "conf.d"
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)


def follow(machine, name: str, script: str, **variables):
    """Runs commands as a person types them, one after the other, and waits for what runs in the background then.

    At the first command that fails it ends; `$TOKEN` is kept for whoever carries it to the next machine.
    """
    script = f'set -e\n{script}\nprintf %s "$TOKEN" > ../token\necho followed\nwait\n'
    process = machine.start(name, "sh", "-c", script, **variables)

    def followed():
        process.died()
        return "followed" in process.out.read_text()

    wait_for(f"the commands of {name}", followed)
    return process


def is_ready(machine):
    """Waits until the node of a machine answers."""
    url = "http://127.0.0.1:9464/readyz"
    script = f"import urllib.request as u; u.urlopen('{url}', timeout=2)"
    wait_for("the node", lambda: machine.run("python3", "-c", script).returncode == 0)


def test_three_commands_join_a_second_machine_as_readme_says(machines):
    first, second = machines
    ports = ["--grpc", "127.0.0.1:8001", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    first.start("sim", "isobar", "sim", "engine", "--model", "sim", "--json", *ports)
    # What README leaves to the reader: a GPU server behind the first machine.
    engine = '[[engine]]\nname = "gpu-0"\nurl = "http://127.0.0.1:8001"\nmodels = ["sim"]\n'
    configure(first, "engine.toml", engine)
    processes = [follow(first, "first", commands("first machine"))]
    is_ready(first)
    token = (first.home.parent / "token").read_text()
    assert token.startswith("isobar-join-1.")
    processes.append(follow(second, "second", commands("second machine"), TOKEN=token))
    is_ready(second)
    authority, said = ".isobar/identity/ca.pem", '{"name": "sim"}'
    infer = ["inference.GRPCInferenceService/ModelReady", "-d", said, "--json"]

    def served():
        done = second.run("isobar", "call", "127.0.0.1:8443", "--ca", authority, *infer)
        return '"served_by":"' in done.stdout.replace(" ", "") and done.stdout

    answer = wait_for("a call from the second machine", served).replace(" ", "")
    assert re.search(r'"served_by":"[a-z0-9-]+\.[a-z0-9-]+/gpu-0"', answer), answer
    assert '"ready":true' in answer
    written = [path.read_text() for process in processes for path in (process.out, process.err)]
    for text in written:
        assert_unseen(text, token)


def cli_refuses(site: Site, token: str, sentence: str, *arguments, seed, code: int):
    """`isobar join` refuses with a sentence that matches, and shows nothing of the token."""
    result = site.join(token, *arguments, seed=seed)
    assert result.returncode == code, result.stderr + result.stdout
    assert re.search(sentence, result.stderr), result.stderr
    assert result.stdout == ""
    if token.startswith("isobar-join-1.") and len(token) > 100:
        assert_unseen(result.stderr, token)
    assert not site.identity.exists() or not any(site.identity.glob("*.pem"))


class Gate:
    """An authority whose refusals are watched from three sides: the answer, the audit log, and the metrics."""

    def __init__(self, meshes):
        self.meshes = meshes
        self.authority = meshes.authority()
        self.site = meshes.site("a", "eu").write(self.authority)
        self.node = meshes.start(self.site)
        self.tokens = []

    def token(self, *arguments, **options) -> str:
        token = self.authority.token(*arguments, **options)
        self.tokens.append(token)
        return token

    def refuses(self, word: str, act):
        """While `act` is done one enrolment is refused with `word`, with a line in both logs."""
        counted, written = self.node.enrolments(word), len(self.audited(word))
        said = len(self.node.lines("an enrolment was refused", f'"{word}"'))
        act()
        assert self.node.enrolments(word) == counted + 1
        entries = self.audited(word)
        assert len(entries) == written + 1 and entries[-1]["why"]
        assert len(self.node.lines("an enrolment was refused", f'"{word}"')) == said + 1

    def audited(self, word: str) -> list[dict]:
        return self.authority.audit(event="join", outcome=word)

    def answers(self, word: str, token: str, name="b", region="us"):
        """Whoever says that to the authority, without `isobar join`, is refused with `word`."""

        def act():
            assert refusal(self.node.gossip, join_request(token, name, region)) == word

        self.refuses(word, act)

    def shows_nothing(self):
        """No output and no audit line shows a token or a key."""
        text = self.meshes.outputs() + self.authority.records()
        assert_unseen(text, *self.tokens)
        for line in key_bodies(self.meshes.directory):
            assert line not in text


@pytest.fixture
def gate(meshes):
    gate = Gate(meshes)
    yield gate
    gate.shows_nothing()


def place(gate, name="b", region="us", trust_domain=MESH) -> Site:
    return gate.meshes.site(name, region, trust_domain).write(seeds=[gate.site])


def test_a_token_is_good_once(gate):
    token = gate.token("b")
    first = place(gate).joined(token, seed=gate.site)
    assert gate.node.enrolments("joined") == 1
    assert [entry["who"] for entry in gate.audited("done")] == [f"spiffe://{MESH}/node/us/b"]
    # The same machine with a certificate that is good is told so before it asks.
    again = first.join(token, seed=gate.site)
    assert again.returncode == 2 and "--replace" in again.stderr
    other = Site(gate.meshes.directory / "other", "b", "us").write(seeds=[gate.site])
    gate.refuses(
        "replayed",
        lambda: cli_refuses(other, token, "redeemed by `b`", seed=gate.site, code=1),
    )
    gate.answers("replayed", token)


def test_an_expired_token_is_refused_here_and_there(gate):
    token = gate.token("b", ttl="1s")
    ends = Token(token).payload.expires_at_s
    wait_for("the end of the token", lambda: time.time() > ends)
    cli_refuses(place(gate), token, "the token ended .* ago.*isobar ca token", seed=gate.site, code=2)
    gate.answers("expired", token)
    # A joiner whose clock is behind learns it from the authority; here the token claims a later end.
    changed = Token(token)
    changed.payload.expires_at_s += 3600
    gate.answers("tampered", changed.text())


def test_a_token_for_another_name_is_refused_here_and_there(gate):
    token = gate.token(name_pattern="gpu-*", uses=2)
    fitting = place(gate, "gpu-1")
    sentence = r"good for a node called gpu-\*, not for web-1"
    cli_refuses(fitting, token, sentence, "--name", "web-1", seed=gate.site, code=2)
    wrong = place(gate, "web-1")
    cli_refuses(wrong, token, r"gpu-\*", "--name", "web-1", seed=gate.site, code=2)
    # A configuration that somebody edited names another node than the token.
    cli_refuses(wrong, token, "web-1.*gpu-7", "--name", "gpu-7", seed=gate.site, code=2)
    gate.answers("wrong_name", token, name="web-1")
    gate.answers("wrong_name", gate.token("b"), name="c")


def test_a_token_for_another_region_is_refused_here_and_there(gate):
    token = gate.token("b", region="us")
    cli_refuses(place(gate, "b", "eu"), token, "region eu.*region us", seed=gate.site, code=2)
    gate.answers("wrong_region", token, region="eu")


def test_a_token_of_another_mesh_is_refused_and_not_even_sent(gate):
    other = gate.meshes.authority("other-ca", trust_domain="other.test")
    token = other.token("b")
    gate.tokens.append(token)
    site = place(gate, trust_domain="other.test")
    asked = len(gate.authority.audit(event="join"))
    # The joiner hangs up before it has said anything: nobody turned it away.
    cli_refuses(site, token, "not an authority of the mesh the token is for", seed=gate.site, code=1)
    assert len(gate.authority.audit(event="join")) == asked
    gate.answers("wrong_mesh", token)


def test_a_token_of_another_authority_of_the_mesh_is_refused(gate):
    other = gate.meshes.authority("second-ca")
    token = other.token("b")
    gate.tokens.append(token)
    cli_refuses(
        place(gate), token, "not an authority of the mesh the token is for", seed=gate.site, code=1
    )
    gate.answers("unknown", token)


def test_a_token_the_authority_does_not_keep_any_more_is_refused(gate):
    token = gate.token("b")
    (kept,) = (gate.authority.online / "tokens").glob("*.json")
    assert token not in kept.read_text() and stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.unlink()
    gate.refuses(
        "unknown",
        lambda: cli_refuses(place(gate), token, "did not issue", seed=gate.site, code=1),
    )


@pytest.mark.parametrize("what", ["names", "region", "secret", "expires_at_s", "seeds"])
def test_a_token_that_was_altered_is_refused(gate, what):
    changed = Token(gate.token("b"))
    altered = {
        "names": "c", "region": "eu", "secret": bytes(32), "expires_at_s": int(time.time()) + 10_000,
        "seeds": [gate.site.listen["gossip"]],
    }[what]
    if what == "seeds":
        changed.payload.seeds[:] = altered
    else:
        setattr(changed.payload, what, altered)
    name, region = changed.payload.names, changed.payload.region
    gate.tokens.append(changed.text())
    gate.refuses(
        "tampered",
        lambda: cli_refuses(
            place(gate, name, region), changed.text(), "damaged or was altered", seed=gate.site, code=1
        ),
    )


def test_a_text_that_is_no_token_is_refused_where_it_was_pasted(gate):
    token = gate.token("b")
    wrong = token[:60] + ("A" if token[60] != "A" else "B") + token[61:]
    for text, sentence in [
        ("let me in", "not a join token"),
        (token[: len(token) // 2], "cut short"),
        (wrong, "damaged"),
        (token.replace("-1.", "-9.", 1), "newer kind"),
    ]:
        result = place(gate).join(text, seed=gate.site)
        assert result.returncode == 2 and re.search(sentence, result.stderr), result.stderr
        assert_unseen(result.stderr, token)
        gate.answers("tampered", text)


def test_a_token_comes_from_a_file_or_standard_input_too(gate):
    token = gate.token(name_pattern="gpu-*", uses=2)
    for name in ("gpu-1", "gpu-2"):
        site = place(gate, name)
        paper = site.directory / "token"
        paper.write_text(token + "\n")
        source = paper if name == "gpu-1" else "-"
        options = ["--name", name, "--config", site.config, "--json"]
        done = isobar(
            "join", "--token-file", source, site.members["seeds"][0].listen["gossip"], *options,
            cwd=site.directory, text=token + "\n",
        )
        assert done.returncode == 0, done.stderr
        assert f'"spiffe://{MESH}/node/us/{name}"' in done.stdout
        assert_unseen(done.stdout + done.stderr, token)


def test_as_many_join_with_one_token_as_it_has_uses(gate):
    token = gate.token(name_pattern="gpu-*", uses=3)
    sites = [place(gate, f"gpu-{number}") for number in range(5)]
    ended = {}

    def join(site):
        ended[site.name] = site.join(token, "--name", site.name, seed=gate.site)

    threads = [threading.Thread(target=join, args=[site]) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    codes = sorted(result.returncode for result in ended.values())
    assert codes == [0, 0, 0, 1, 1], {name: done.stderr for name, done in ended.items()}
    for site in sites:
        result = ended[site.name]
        assert (site.identity / "cert.pem").exists() == (result.returncode == 0)
        assert result.returncode == 0 or "all 3 uses of the token are taken" in result.stderr
    assert gate.node.enrolments("joined") == 3 and gate.node.enrolments("used_up") == 2
    assert len(gate.audited("done")) == 3 and len(gate.audited("used_up")) == 2


def test_a_private_key_is_its_owners_alone(gate):
    site = place(gate).joined(gate.token("b"), seed=gate.site)
    key = site.identity / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for secret in gate.meshes.directory.rglob("*.key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600, secret
    key.chmod(0o644)
    ended = site.start_fails()
    assert ended.returncode == 2 and "chmod 600" in ended.stderr, ended.stderr
    assert ended.stdout == ""
    key.chmod(0o600)
    gate.meshes.start(site)


def test_a_node_that_expired_while_it_was_off_is_repaired_with_one_token(meshes):
    authority = meshes.authority(life="4s")
    service = meshes.service("service")
    a, b = meshes.site("a", "eu"), meshes.site("b", "us")
    a.write(authority, peers=[b])
    b.write(engines=[service.engine()], peers=[a], seeds=[a])
    running = meshes.start(a)
    b.joined(authority.token("b"), seed=a)
    ends = b.certificate().not_valid_after_utc.timestamp()
    wait_for("the end of the certificate", lambda: time.time() > ends)
    ended = b.start_fails()
    assert ended.returncode == 2
    for part in ("expired", "isobar ca token", "isobar join"):
        assert part in ended.stderr, ended.stderr
    # The old certificate is worth nothing by now, so no --replace is needed.
    b.joined(authority.token("b"), seed=a)
    meshes.start(b)
    serves(running, "b.us/service")


def three(meshes):
    """a holds the authority, b has the engine, and c has neither; all know each other, and c has called b."""
    authority, service = meshes.authority(), meshes.service("service")
    a, b, c = meshes.site("a", "eu"), meshes.site("b", "us"), meshes.site("c", "ap")
    a.write(authority, peers=[b, c])
    b.write(engines=[service.engine()], peers=[a, c], seeds=[a])
    c.write(peers=[a, b], seeds=[a])
    nodes = [meshes.start(a)]
    for site in (b, c):
        site.joined(authority.token(site.name, region=site.region), seed=a)
        nodes.append(meshes.start(site))
    for node in (nodes[0], nodes[2]):
        serves(node, "b.us/service")
    return authority, nodes


def is_cut_off(node) -> bool:
    """Whether no connection with the mesh is left at a node, or with it at others, for a moment."""
    return node.metric("isobar_mesh_connections") == 0


def said_revoked(node, member: str) -> bool:
    return bool(node.lines("a connection ends: its certificate was revoked", f"{MESH}/node/{member}"))


def test_a_revoked_node_is_cut_off_within_two_seconds(meshes):
    authority, (a, b, c) = three(meshes)
    stolen = Credentials.read(b.site.identity)
    refused = {node.name: node.strangers("gossip") for node in (a, c)}
    assert b.metric("isobar_mesh_connections") > 0
    before = time.monotonic()
    authority.revoke("us/b")
    wait_for("a's connections to end", lambda: said_revoked(a, "us/b"))
    wait_for("c's connections to end", lambda: said_revoked(c, "us/b"))
    wait_for("b's connections to end", lambda: is_cut_off(b))
    took = time.monotonic() - before
    assert took < 2, f"it took {took:.1f} s"
    version = a.metric("isobar_revocations_version")
    assert version > 0 and c.metric("isobar_revocations_version") == version
    # It dials again and again, and is turned away again and again.
    for node in (a, c):
        more = refused[node.name] + 2
        wait_for("refusals", lambda: node.strangers("gossip") >= more)
        assert node.lines("a stranger was turned away", "was revoked")
        error = try_call(node)
        assert isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE
    for node in (a, c):
        stays_out(node, stolen)
    renewal = enrol(a.gossip, renew_request(), stolen)
    assert isinstance(renewal, Outcome) and not renewal.entered, renewal
    assert authority.audit(event="revoke")[-1]["who"] == f"spiffe://{MESH}/node/us/b"


def stays_out(node, credentials):
    """Whoever shows these is refused at every port for nodes, and counted."""
    for port, attempt in [
        ("peers", lambda: tcp(node.peers, credentials)),
        ("peers", lambda: quic(node.peers, credentials)),
        ("gossip", lambda: gossip(node.gossip, credentials, hello("b", "us"))),
    ]:
        counted = node.strangers(port)
        outcome = attempt()
        assert not outcome.entered
        wait_for("the count", lambda: node.strangers(port) > counted)


def test_a_revoked_node_stays_out_after_restarts_until_it_gets_a_new_token(meshes):
    authority, (a, b, c) = three(meshes)
    stolen = Credentials.read(b.site.identity)
    b.stop()
    authority.revoke("us/b")
    version = wait_for("the list at c", lambda: c.metric("isobar_revocations_version"))
    # With no authority about, c still knows, from its own disk.
    a.stop()
    c.stop()
    assert (c.site.identity / "revocations.pb").exists()
    c = meshes.start(c.site)
    assert c.metric("isobar_revocations_version") == version
    stays_out(c, stolen)
    a = meshes.start(a.site)
    b.site.joined(authority.token("b"), "--replace", seed=a.site)
    meshes.start(b.site)
    for node in (a, c):
        serves(node, "b.us/service")
    stays_out(a, stolen)
    stays_out(c, stolen)


def test_a_joined_node_is_served_and_serves(meshes):
    _, a, b = pair(meshes)
    serves(a, "b.us/service")
    assert call(b) == "b.us/service"
    # What it was certified for by the address it was seen at, and by the names clients use.
    assert a.metric("isobar_mesh_connections") > 0
    assert b.metric("isobar_strangers_refused_total{port=\"peers\"}") == 0
