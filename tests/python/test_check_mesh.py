"""`isobar check` in a mesh with an authority: who renews a node's certificate, what an authority has to keep, and who was
revoked."""


import pytest
from meshes import meshes, pair
from nodes import wait_for
from pki import member
from test_certificates import Imported
from test_check import Report

__all__ = ["meshes"]


@pytest.fixture
def joined(meshes):
    """The authority's directory, node a that holds it, and node b that joined."""
    return pair(meshes)


def test_a_node_that_an_authority_renews_is_good(joined):
    _, a, b = joined
    report = Report(b.site.config)
    assert report.code == 0, report.errors()
    seed = report.one("seed.authority", "ok")
    assert member("a", "eu", role="authority") in seed["what"]
    assert seed["subject"] == f"seed {a.gossip}"
    # All its ports are its own, and it shows what lies on disk.
    assert len(report.of("listen.taken", "ok")) == 5
    assert not report.of("served.differs", "warning") and len(report.of("served.differs", "ok")) == 5
    assert "localhost" in report.one("certificate.names", "note")["what"]
    assert report.of("peer.tcp", "ok")
    assert a.popen.poll() is None and b.popen.poll() is None


def test_seeds_that_renew_nothing_are_an_error(meshes, joined):
    authority, a, b = joined
    c = meshes.site("c", "us").write(seeds=[a.site])
    c.joined(authority.token("c"), seed=a.site)
    assert Report(c.write(seeds=[b.site, a.site]).config).code == 0

    report = Report(c.write(seeds=[b.site]).config)
    assert report.code == 1
    assert "no authority" in report.one("seed.gossip", "ok")["what"]
    assert "nobody can renew" in report.one("seed.authority", "error")["what"]
    assert "no seeds" in Report(c.write().config).one("seed.authority", "error")["what"]

    gone = meshes.site("gone", "us")
    report = Report(c.write(seeds=[gone, a.site]).config)
    assert report.code == 0, report.errors()
    found = report.one("seed.gossip", "warning")
    assert "refused" in found["what"] and "start that node" in found["remedy"]

    other = meshes.authority("other", trust_domain="other.test")
    stranger = meshes.site("x", "eu", trust_domain="other.test")
    meshes.start(stranger.write(other))
    report = Report(c.write(seeds=[stranger]).config)
    assert "other.test" in report.one("seed.identity", "error")["what"]
    assert report.one("seed.authority", "error")


def test_the_directory_of_an_authority_is_looked_at_and_left_alone(joined):
    authority, a, _ = joined
    config = a.site.config

    def state():
        files = [path for path in authority.directory.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = state()
    report = Report(config)
    assert report.code == 0, report.errors()
    assert state() == before
    assert len(report.of("authority.expiring", "ok")) == 2
    root = authority.directory / "root.key"
    found = report.one("authority.root-key", "warning")
    assert found["subject"] == str(root) and "offline" in found["remedy"]
    assert not report.of("seed.authority")

    root.rename(authority.directory.parent / "safe")
    assert not Report(config).of("authority.root-key")
    issuer = authority.online / "issuer.key"
    issuer.chmod(0o640)
    assert Report(config).one("certificate.key-exposed", "error")["subject"] == str(issuer)
    issuer.chmod(0o600)

    text = config.read_text()
    config.write_text(text.replace('"mesh.test"', '"mess.test"'))
    assert "mess.test" in Report(config).one("authority.unusable", "error")["what"]
    config.write_text(text)
    for name in ("authority.toml", "issuer.key", "roots.pem"):
        path = authority.online / name
        path.rename(path.with_suffix(".gone"))
        assert str(authority.online) in Report(config).one("authority.unusable", "error")["subject"]
        path.with_suffix(".gone").rename(path)
    assert Report(config).code == 0


def test_an_issuer_that_ends_soon_is_told(meshes, tmp_path):
    authority = Imported(tmp_path)
    site = meshes.site("a", "eu").write(authority)
    report = Report(site.config)
    # Issuer, what is above it, and the root have 41 days.
    assert len(report.of("authority.expiring", "note")) == 3, report.findings
    assert "ca rotate" in report.of("authority.expiring", "note")[0]["remedy"]
    # The node has no certificate yet: it makes its own.
    assert report.code == 0 and "start the node" in report.one("certificate.missing", "note")["remedy"]


def keep_revocations(authority, site):
    """Puts the authority's list where a node keeps those it has: field 1 of a message, length first."""
    signed = (authority.online / "revoked.pb").read_bytes()
    length, tag = len(signed), b"\x0a"
    varint = bytes([length & 0x7F | 0x80, length >> 7]) if length > 0x7F else bytes([length])
    assert length < 1 << 14
    (site.identity / "revocations.pb").write_bytes(tag + varint + signed)


def test_who_was_revoked_is_told_at_both_ends(joined):
    authority, a, b = joined
    authority.revoke("us/b")
    wait_for("the list", lambda: a.metric("isobar_revocations") == 1)
    assert Report(a.site.config).one("peer.revoked", "error")["subject"] == "peer b (us)"

    # The node itself may or may not have heard of it.
    keep_revocations(authority, b.site)
    report = Report(b.site.config)
    assert report.code == 1
    assert "isobar join" in report.one("certificate.revoked", "error")["remedy"]
    assert report.one("seed.refuses", "error") and report.one("seed.authority", "error")
    # Joined anew, it is none of those.
    assert b.stop() == 0
    result = b.site.join(authority.token("b"), "--replace", seed=a.site)
    assert result.returncode == 0, result.stderr
    report = Report(b.site.config)
    assert report.code == 0, report.errors()
