"""`isobar ca`: what an operator does with the authority of a mesh, as the shell sees it."""

import json
import shutil
import stat
import subprocess

import pytest
from nodes import BINARY, LONG


def isobar(directory, *arguments):
    return subprocess.run(
        [BINARY, "ca", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LONG,
        cwd=directory,
        env={"PATH": "/usr/bin:/bin"},
    )


def done(directory, *arguments):
    result = isobar(directory, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def answer(directory, *arguments):
    """Exactly one JSON object."""
    return json.loads(done(directory, *arguments, "--json").stdout)


@pytest.fixture
def mesh(tmp_path):
    done(tmp_path, "init", "--trust-domain", "mesh.example")
    return tmp_path


def test_an_authority_says_where_its_parts_are_and_keeps_its_keys_private(tmp_path):
    made = answer(tmp_path, "init", "--trust-domain", "mesh.example", "--dir", "x", "--life", "2h")
    assert made["authority"] == str(tmp_path / "x/authority") and made["life_s"] == 7200
    for key in [made["root_key"], f"{made['authority']}/issuer.key"]:
        assert stat.S_IMODE((tmp_path / key).stat().st_mode) == 0o600
    again = isobar(tmp_path, "init", "--trust-domain", "mesh.example", "--dir", "x")
    assert again.returncode == 2 and "there already" in again.stderr


def test_a_token_is_alone_on_standard_output(mesh):
    result = done(mesh, "token", "--node", "a", "--region", "eu", "--seed", "127.0.0.1:7440")
    (token,) = result.stdout.splitlines()
    assert token.startswith("isobar-join-1.") and token not in result.stderr
    assert "isobar join" in result.stderr
    group = answer(mesh, "token", "--name-pattern", "gpu-*", "--uses", 50, "--region", "eu", "--ttl", "1h")
    assert group["names"] == "gpu-*" and group["uses"] == 50
    shown = answer(mesh, "show")
    assert [one["names"] for one in shown["tokens"]] == ["a", "gpu-*"]
    assert token not in json.dumps(shown)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--node", "a"], "--region"),
        (["--region", "eu"], "--node"),
        (["--region", "eu", "--node", "a", "--name-pattern", "a*"], "cannot be used with"),
        (["--region", "eu", "--node", "a", "--uses", "2"], "one use"),
        (["--region", "eu", "--node", "a", "--ttl", "8d"], "7d"),
        (["--region", "eu", "--node", "a", "--role", "authority"], "issuing key"),
        (["--region", "eu", "--node", "a", "--role", "operator"], "isobar ca issue"),
        (["--region", "eu", "--node", "a", "--seed", "nowhere"], "HOST:PORT"),
        (["--region", "eu", "--node", "a", "--dir", "elsewhere"], "isobar ca init"),
    ],
)
def test_a_token_that_is_not_made_ends_with_2_and_says_why(mesh, arguments, wanted):
    result = isobar(mesh, "token", *arguments)
    assert result.returncode == 2 and wanted in result.stderr
    assert result.stdout == ""


def test_a_revoked_node_is_shown(mesh):
    first = answer(mesh, "revoke", "a", "--region", "eu")
    assert first["revoked"] == "spiffe://mesh.example/node/eu/a"
    second = answer(mesh, "revoke", "us/b", "--dir", "ca/authority")
    assert second["version"] > first["version"]
    shown = answer(mesh, "show")["revocations"]
    assert [one["id"] for one in shown["entries"]] == [first["revoked"], second["revoked"]]
    assert isobar(mesh, "revoke", "a").returncode == 2
    assert isobar(mesh, "revoke", "eu/a", "--region", "eu").returncode == 2


def test_revoking_says_what_it_cannot_do_and_doubts_names_that_are_unknown(mesh):
    unknown = done(mesh, "revoke", "eu/gpu-l")
    assert "only a new issuing certificate and root" in unknown.stdout
    assert "eu/gpu-l: nothing was ever issued to it here: is the name right?" in unknown.stderr
    (entry,) = answer(mesh, "show")["revocations"]["entries"]
    assert entry["id"] == "spiffe://mesh.example/node/eu/gpu-l"
    done(mesh, "token", "--node", "gpu-1", "--region", "eu")
    assert done(mesh, "revoke", "eu/gpu-1").stderr == ""
    who = ["--role", "client", "--region", "eu"]
    done(mesh, "issue", *who, "--name", "search", "--out", "search")
    assert done(mesh, "revoke", "search", *who).stderr == ""


def test_a_copy_of_an_authority_does_not_have_its_tokens(mesh):
    done(mesh, "token", "--node", "a", "--region", "eu")
    shutil.copytree(mesh / "ca/authority", mesh / "second")
    assert answer(mesh, "show", "--dir", "second")["tokens"] == []
    assert len(answer(mesh, "show")["tokens"]) == 1
    (mesh / "ca/authority").rename(mesh / "moved")
    assert len(answer(mesh, "show", "--dir", "moved")["tokens"]) == 1


def test_a_certificate_issued_again_has_a_new_key_unless_the_old_one_is_wanted(mesh):
    def issue(*options):
        done(mesh, "issue", "--role", "client", "--name", "c", "--region", "eu", "--out", "c", *options)
        return tuple((mesh / "c" / name).read_text() for name in ("key.pem", "cert.pem"))

    (first, _), (second, before) = issue(), issue()
    kept, after = issue("--keep-key")
    assert first != second and kept == second and before != after
    log = [json.loads(line) for line in (mesh / "ca/authority/audit.log").read_text().splitlines()]
    assert [(e["event"], e["who"]) for e in log] == [("issue", "spiffe://mesh.example/client/eu/c")] * 3
    nothing = isobar(mesh, "issue", "--role", "client", "--name", "c", "--region", "eu", "--out", "d", "--keep-key")
    assert nothing.returncode == 2 and "--keep-key" in nothing.stderr and not (mesh / "d").exists()


def test_a_rotation_reminds_of_the_copies_of_the_authority(mesh):
    for when in ["before the next step", "before the next step", "before the next rotation"]:
        said = done(mesh, "rotate", "--now").stdout
        assert f"other copies of authority/ must be brought up to date {when}" in said


def test_a_certificate_by_hand_is_three_files(mesh):
    made = answer(mesh, "issue", "--role", "operator", "--name", "me", "--region", "eu", "--out", "me")
    assert made["id"] == "spiffe://mesh.example/operator/eu/me"
    assert {path.name for path in (mesh / "me").iterdir()} == {"cert.pem", "key.pem", "ca.pem"}
    assert stat.S_IMODE((mesh / "me/key.pem").stat().st_mode) == 0o600
    refused = isobar(mesh, "issue", "--role", "authority", "--name", "x", "--region", "eu", "--out", "x")
    assert refused.returncode == 2 and not (mesh / "x").exists()


def test_the_root_changes_in_three_steps_and_not_too_early(mesh):
    before = answer(mesh, "show")["roots"]
    assert answer(mesh, "rotate")["done"] == "root_added"
    assert len(answer(mesh, "show")["roots"]) == 2
    early = isobar(mesh, "rotate")
    assert early.returncode == 1 and "--now" in early.stderr
    assert answer(mesh, "rotate", "--now")["done"] == "issuer_replaced"
    assert answer(mesh, "rotate", "--now")["done"] == "root_removed"
    (after,) = answer(mesh, "show")["roots"]
    assert after not in before
    issuer = answer(mesh, "show")["issuer"]
    answer(mesh, "rotate", "--issuer")
    assert answer(mesh, "show")["issuer"] != issuer


def test_an_intermediate_of_somebody_else_makes_an_authority(mesh):
    parts = ["ca/authority/issuer.pem", "ca/authority/issuer.key", "ca/authority/roots.pem"]
    options = [x for pair in zip(["--intermediate", "--key", "--roots"], parts, strict=True) for x in pair]
    made = answer(mesh, "init", "--trust-domain", "mesh.example", "--dir", "own", *options)
    assert made["root_key"] is None and not (mesh / "own/root.key").exists()
    assert answer(mesh, "show", "--dir", "own")["roots"] == answer(mesh, "show")["roots"]
    other = isobar(mesh, "init", "--trust-domain", "other.example", "--dir", "other", *options)
    assert other.returncode == 2 and "mesh.example" in other.stderr
    assert isobar(mesh, "init", "--trust-domain", "m", "--dir", "y", *options[:2]).returncode == 2
