"""The command line: exit codes, messages, certificates, and nodes that do not trust each other."""

import json
import re
import signal
import stat
import subprocess
import time

import grpc
import pytest
from nodes import BINARY, LONG, ROOT, Node, free_port

GOOD = '[node]\nname = "a"\n[listen]\nclients = "127.0.0.1:0"\npeers = "127.0.0.1:0"\ngossip = "127.0.0.1:0"\nmetrics = "127.0.0.1:0"\n'


def isobar(*arguments, cwd=None):
    return subprocess.run(
        [BINARY, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LONG,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin"},
    )


def configuration(directory, text):
    path = directory / "node.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[listen]\nclient = 1\n", ["node.toml:2: listen.client", "did you mean clients?"]),
        ("[node]\nregion = 7\n", ["node.toml:2: node.region", "allowed: "]),
        ('[[engine]]\nname = "e"\n', ["node.toml:1: engine[0]", "url is missing", "http://host:port"]),
        ("[node\n", ["node.toml:1", "not TOML"]),
    ],
)
def test_a_bad_configuration_ends_with_2_and_says_what_to_do(tmp_path, text, wanted):
    done = isobar("node", "-c", configuration(tmp_path, text), "--dev-ca", tmp_path / "ca")
    assert done.returncode == 2
    assert done.stdout == ""
    for part in wanted:
        assert part in done.stderr


def test_a_missing_file_or_option_ends_with_2(tmp_path):
    done = isobar("node", "-c", tmp_path / "nope.toml")
    assert done.returncode == 2 and "nope.toml" in done.stderr
    assert isobar("node").returncode == 2
    assert isobar("nod").returncode == 2
    assert isobar("ca", "dev", "--dir", tmp_path / "x", "--node", "nonsense").returncode == 2


def test_a_node_without_identity_says_how_to_get_one(tmp_path):
    done = isobar("node", "-c", configuration(tmp_path, GOOD), cwd=tmp_path)
    assert done.returncode == 2
    assert "--dev-ca" in done.stderr and ".isobar/identity" in done.stderr


def test_a_taken_port_ends_with_1_and_names_the_key(tmp_path):
    node = Node(tmp_path / "first", "a", "eu", tmp_path / "ca")
    try:
        text = GOOD.replace('clients = "127.0.0.1:0"', f'clients = "{node.clients}"')
        done = isobar("node", "-c", configuration(tmp_path, text), "--dev-ca", tmp_path / "other")
        assert done.returncode == 1
        assert "listen.clients" in done.stderr and node.clients in done.stderr
    finally:
        node.stop()


def test_check_starts_nothing(tmp_path):
    path = configuration(tmp_path, GOOD)
    done = isobar("node", "-c", path, "--dev-ca", tmp_path / "ca", "--check")
    assert done.returncode == 0 and "is good" in done.stdout
    done = isobar("node", "-c", path, "--dev-ca", tmp_path / "ca", "--check", "--json")
    assert json.loads(done.stdout)["ok"] is True
    assert json.loads(done.stdout)["access"].startswith("anonymous may call")


def test_the_schema_is_the_committed_one():
    done = isobar("schema")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads((ROOT / "config.schema.json").read_text())


def test_a_development_ca_is_made_once_and_keeps_its_keys_to_itself(tmp_path):
    directory = tmp_path / "ca"
    first = isobar("ca", "dev", "--dir", directory, "--trust-domain", "mesh.test", "--node", "eu/a", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["nodes"] == ["spiffe://mesh.test/node/eu/a"]
    certificate = (directory / "ca.pem").read_bytes()
    keys = [directory / "ca.key", directory / "nodes/eu/a/key.pem"]
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600

    again = isobar("ca", "dev", "--dir", directory, "--trust-domain", "mesh.test", "--node", "us/b")
    assert again.returncode == 0, again.stderr
    assert (directory / "ca.pem").read_bytes() == certificate
    assert (directory / "nodes/us/b/cert.pem").exists()

    other = isobar("ca", "dev", "--dir", directory, "--trust-domain", "other.test")
    assert other.returncode == 2
    assert "mesh.test" in other.stderr and "other.test" in other.stderr

    keys[0].chmod(0o644)
    loose = isobar("ca", "dev", "--dir", directory, "--trust-domain", "mesh.test")
    assert loose.returncode == 2 and "chmod 600" in loose.stderr


def call(node, method="/isobar.test.v1.Kinds/Unary", timeout=LONG):
    """A unary call with an empty message; returns its error, or None."""
    credentials = grpc.ssl_channel_credentials(node.ca.read_bytes())
    with grpc.secure_channel(node.clients, credentials) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=timeout)
        except grpc.RpcError as error:
            return error
    return None


def test_nodes_of_two_authorities_are_no_peers(tmp_path):
    b = Node(tmp_path / "b", "b", "us", tmp_path / "ca-b")
    try:
        a = Node(tmp_path / "a", "a", "eu", tmp_path / "ca-a", peers=[b])
        try:
            started = time.monotonic()
            error = call(a)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "peer b (us)" in error.details() and "certificate" in error.details()
            assert time.monotonic() - started < LONG
        finally:
            a.stop()
    finally:
        b.stop()


def test_a_peer_must_be_who_it_is_listed_as(tmp_path):
    b = Node(tmp_path / "b", "b", "us", tmp_path / "ca")
    try:
        listed = {"name": "c", "region": "us", "peers": b.peers}
        a = Node(tmp_path / "a", "a", "eu", tmp_path / "ca", peers=[listed])
        try:
            error = call(a)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "spiffe://mesh.test/node/us/b" in error.details()
        finally:
            a.stop()
    finally:
        b.stop()


def test_without_engine_and_peer_a_call_is_refused_with_who_and_why(tmp_path):
    node = Node(tmp_path, "lonely", "eu", tmp_path / "ca")
    try:
        error = call(node)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert error.details().startswith("isobar node lonely (eu): no engine")
        assert "grpc-status-details-bin" in dict(error.trailing_metadata())
    finally:
        node.stop()


def test_an_unreachable_peer_is_named(tmp_path):
    peer = {"name": "gone", "region": "us", "peers": f"127.0.0.1:{free_port()}"}
    node = Node(tmp_path, "a", "eu", tmp_path / "ca", peers=[peer])
    try:
        error = call(node)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "peer gone (us)" in error.details()
    finally:
        node.stop()


def test_an_unreachable_engine_is_named(tmp_path):
    engine = {"name": "gone", "url": f"http://127.0.0.1:{free_port()}", "protocol": "grpc"}
    node = Node(tmp_path, "a", "eu", tmp_path / "ca", engines=[engine])
    try:
        error = call(node)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "engine gone" in error.details()
    finally:
        node.stop()


def test_a_call_sent_in_a_circle_is_refused(tmp_path):
    """Node b's engine is node a's own plaintext port."""
    plaintext = f"127.0.0.1:{free_port()}"
    # Checked by a connection: a call of the check would go round in the circle too.
    health = {"kind": "tcp"}
    engine = {"name": "circle", "url": f"http://{plaintext}", "protocol": "grpc", "health": health}
    b = Node(tmp_path / "b", "b", "us", tmp_path / "ca", engines=[engine])
    try:
        a = Node(tmp_path / "a", "a", "eu", tmp_path / "ca", peers=[b], plaintext=plaintext)
        try:
            error = call(a)
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "a.eu.mesh.test, b.us.mesh.test" in error.details()
            # Once in, once back: never a third time.
            ingress = 'isobar_calls_total{side="ingress",code="FAILED_PRECONDITION"}'
            assert a.metric(ingress) == 2
        finally:
            a.stop()
    finally:
        b.stop()


def test_a_node_that_is_its_own_engine_refuses(tmp_path):
    plaintext = f"127.0.0.1:{free_port()}"
    engine = {"name": "self", "url": f"http://{plaintext}", "protocol": "grpc"}
    node = Node(tmp_path, "a", "eu", tmp_path / "ca", engines=[engine], plaintext=plaintext)
    try:
        assert call(node).code() == grpc.StatusCode.FAILED_PRECONDITION
    finally:
        node.stop()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_node_cleanly(tmp_path, sig):
    node = Node(tmp_path, "a", "eu", tmp_path / "ca")
    assert node.get("/livez") == (200, "ok\n")
    assert node.get("/readyz") == (200, "ok\n")
    assert node.get("/nope")[0] == 404
    assert node.stop(sig) == 0


def test_the_human_output_says_where_and_how(tmp_path):
    path = configuration(tmp_path, GOOD)
    with subprocess.Popen(
        [BINARY, "node", "-c", str(path), "--dev-ca", str(tmp_path / "ca")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    ) as process:
        try:
            lines = [process.stdout.readline() for _ in range(8)]
        finally:
            process.terminate()
    text = "".join(lines)
    assert "isobar node a (region default) of mesh.internal is ready" in text
    assert re.search(r"clients +127\.0\.0\.1:\d+", text)
    assert str(tmp_path / "ca" / "ca.pem") in text
    assert "tritonclient" in text
