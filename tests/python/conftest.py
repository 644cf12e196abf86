"""The worlds the tests share: a test service behind node b, and node a in front of it, which has no engine."""

import os
import sys

import pytest

sys.path.insert(0, os.environ.get("ISOBAR_STUBS", ""))

from faults import Relay  # noqa: E402
from nodes import Node, Service  # noqa: E402

UNARY = "isobar.test.v1.Kinds/Unary"


class World:
    """Service, b and a, started in this order and ended in the other."""

    def __init__(self, directory):
        self.started = []
        try:
            self.service = self.start(Service, directory)
            self.b = self.start(Node, directory, "b", "us", directory / "ca", [self.service.engine()])
            self.a = self.start(
                Node, directory, "a", "eu", directory / "ca", peers=[self.b], plaintext=True
            )
        except BaseException:
            self.stop()
            raise

    def start(self, kind, *arguments, **options):
        process = kind(*arguments, **options)
        self.started.append(process)
        return process

    def stop(self):
        for process in reversed(self.started):
            process.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One world for the tests of a file."""
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.stop()


@pytest.fixture
def own_world(tmp_path):
    """A world for one test that breaks it."""
    world = World(tmp_path)
    yield world
    for process in reversed(world.started):
        process.kill()


class Mesh:
    """Processes of one test, ended whatever happens."""

    def __init__(self, directory):
        self.directory = directory
        self.started = []

    def keep(self, process):
        self.started.append(process)
        return process

    def service(self, name, **options):
        return self.keep(Service(self.directory, name, **options))

    def relay(self, service):
        return self.keep(Relay(service.address))

    def node(self, name, region, **options):
        directory = self.directory / name
        ca = self.directory / "ca"
        return self.keep(Node(directory, name, region, ca, idempotent=[UNARY], **options))

    def again(self, node):
        return self.keep(node.again())


@pytest.fixture
def mesh(tmp_path):
    mesh = Mesh(tmp_path)
    yield mesh
    for process in reversed(mesh.started):
        process.stop() if isinstance(process, Relay) else process.kill()
