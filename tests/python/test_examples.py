"""What README says to type, typed: the two example nodes, MLServer with the example model, and the example client."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nodes import BINARY, LONG, ROOT, Process, listens, wait_for

EXAMPLES = ROOT / "examples/two-nodes"
PORTS = [8081, 8082, 8083, 8443, 8444, 9443, 9444, 9464, 9465]


@pytest.fixture
def processes(tmp_path):
    started = []

    def start(name, *arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ISOBAR_")}
        process = Process(name, tmp_path, arguments, cwd=tmp_path, env=environment)
        started.append(process)
        return process

    taken = [port for port in PORTS if listens(port)]
    assert not taken, f"the examples need these ports: {taken}"
    yield start
    for process in reversed(started):
        process.stop()


def test_the_examples_of_the_readme_work_as_written(processes, tmp_path):
    for name in ("b", "a"):
        arguments = ["node", "--dev-ca", ".isobar", "-c", EXAMPLES / f"{name}.toml"]
        node = processes(name, BINARY, *arguments)
        assert f"isobar node {name} (region " in node.first_line()
    server = processes("mlserver", Path(sys.executable).parent / "mlserver", "start", EXAMPLES / "model")

    def ready():
        server.died()
        return listens(8081)

    wait_for("the start of MLServer", ready, 120)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "infer.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ready: True\nsum:   [ 6. 15.]\n"


def test_the_readme_shows_the_files_it_names():
    readme = (ROOT / "README.md").read_text()
    for named in ("examples/two-nodes/a.toml", "examples/two-nodes/b.toml", "certs/README.md"):
        assert named in readme and (ROOT / named).exists()
    shown = "cargo run --release -- node --dev-ca .isobar -c examples/two-nodes/"
    assert f"{shown}a.toml" in readme and f"{shown}b.toml" in readme
