"""Two machines that are none: network namespaces joined by a cable, each with a home of its own."""

import os
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

from nodes import BINARY, LONG, Process


def ip(*arguments):
    """Runs `ip`, which makes namespaces and cables; root may."""
    if shutil.which("ip") is None:
        raise AssertionError("`ip` is missing, which makes the machines of this test: apt-get install iproute2")
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=LONG)
    if done.returncode != 0:
        what = f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}"
        raise AssertionError(f"{what}. Network namespaces need root: run the tests as root")


class Machine:
    """A clean machine: one network, an empty home to work in, and `isobar` installed."""

    def __init__(self, directory: Path, namespace: str):
        self.namespace, self.home = namespace, directory / "home"
        self.bin = directory / "bin"
        self.home.mkdir(parents=True)
        self.bin.mkdir()
        (self.bin / "isobar").symlink_to(BINARY)
        self.started = []

    def environment(self, **more) -> dict:
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", **more}

    def enter(self, *command) -> list:
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def run(self, *command, **more) -> subprocess.CompletedProcess:
        """Runs a command on this machine to its end."""
        return subprocess.run(
            self.enter(*command), capture_output=True, text=True, timeout=LONG,
            cwd=self.home, env=self.environment(**more), stdin=subprocess.DEVNULL,
        )

    def start(self, name: str, *command, **more) -> Process:
        """Starts a command on this machine, in a session of its own, so that all it starts can be ended."""
        options = {"cwd": self.home, "env": self.environment(**more), "start_new_session": True}
        process = Process(name, self.home.parent, self.enter(*command), **options)
        self.started.append(process)
        return process

    def end(self):
        for process in reversed(self.started):
            try:
                os.killpg(process.popen.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.kill()


class Machines:
    """Two machines with a cable between them: 10.0.0.1 and 10.0.0.2."""

    def __init__(self, directory: Path):
        # Interfaces have names of at most 15 characters.
        name = f"iso{uuid.uuid4().hex[:8]}"
        self.namespaces, self.cable = [], name
        self.machines = []
        try:
            for index in (1, 2):
                namespace = f"{name}-{index}"
                ip("netns", "add", namespace)
                self.namespaces.append(namespace)
                self.machines.append(Machine(Path(directory) / f"machine-{index}", namespace))
            self.plug_in()
        except BaseException:
            self.end()
            raise

    def plug_in(self):
        ends = [f"{self.cable}{end}" for end in "ab"]
        ip("link", "add", ends[0], "netns", self.namespaces[0], "type", "veth",
           "peer", "name", ends[1], "netns", self.namespaces[1])
        for index, (namespace, end) in enumerate(zip(self.namespaces, ends, strict=True), 1):
            ip("-n", namespace, "addr", "add", f"10.0.0.{index}/24", "dev", end)
            ip("-n", namespace, "link", "set", end, "up")
            ip("-n", namespace, "link", "set", "lo", "up")

    def end(self):
        """Ends what runs on both, and takes them away; the cable goes with them."""
        for machine in self.machines:
            machine.end()
        for namespace in self.namespaces:
            ip("netns", "del", namespace)
