"""`isobar status` and the exit codes of scripts that ask it."""

import json
import os
import subprocess
import time

from nodes import BINARY, LONG, free_port, wait_for_peers


def status(*arguments, cwd=None):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ISOBAR_")}
    command = [BINARY, "status", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LONG, cwd=cwd, env=variables
    )


def test_a_node_says_who_it_is_and_what_its_mesh_looks_like(world, tmp_path):
    wait_for_peers(world.a, world.b)
    admin = world.a.info["listen"]["admin"]
    done = status("--admin", admin, "--json")
    assert done.returncode == 0, done.stderr
    mesh = json.loads(done.stdout)
    own = mesh["node"]
    assert (own["node"], own["region"], own["draining"]) == ("a", "eu", False)
    assert own["id"] == "spiffe://mesh.test/node/eu/a"
    assert own["certificate_not_after_s"] > time.time()
    assert own["load"]["engines"] == 0
    for part in ("members", "regions", "relays", "suspicions", "quarantined", "attempts"):
        assert isinstance(mesh[part], list), part
    # The same by its configuration, for people.
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\nname = "a"\nregion = "eu"\n[listen]\nadmin = "{admin}"\n')
    done = status("--config", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a (eu): release ")
    assert "other members: " in done.stdout and "suspected: " in done.stdout


def test_attempts_are_told_by_the_region_they_came_from(world):
    import grpc
    from isobar.test.v1 import kinds_pb2 as pb
    from isobar.test.v1 import kinds_pb2_grpc

    def attempts():
        done = status("--admin", world.b.info["listen"]["admin"], "--json")
        return {a["region"]: a["attempts"] for a in json.loads(done.stdout)["attempts"]}

    before = attempts().get("eu", 0)
    credentials = grpc.ssl_channel_credentials(world.a.ca.read_bytes())
    with grpc.secure_channel(world.a.clients, credentials) as channel:
        stub = kinds_pb2_grpc.KindsStub(channel)
        for _ in range(5):
            assert stub.Unary(pb.Request(text="x"), timeout=LONG).text == "x"
    assert attempts() == {"eu": before + 5}


def test_a_node_that_does_not_answer_is_failure_and_what_cannot_be_meant_is_usage(world, tmp_path):
    nobody = status("--admin", f"127.0.0.1:{free_port()}", "--json")
    assert nobody.returncode == 1 and not nobody.stdout
    assert "no node answers" in nobody.stderr and "listen.admin" in nobody.stderr
    other = status("--admin", world.service.address)
    assert other.returncode == 1 and "not an admin port" in other.stderr
    for arguments, hint in [
        (["--admin", "127.0.0.1"], "HOST:PORT"),
        (["--admin", "10.0.0.1:9090"], "operator"),
        (["--admin", "127.0.0.1:1", "--ca", "ca.pem"], "without TLS"),
        (["--config", tmp_path / "none.toml"], "none.toml"),
    ]:
        done = status(*arguments)
        assert done.returncode == 2 and hint in done.stderr, (arguments, done.stderr)
