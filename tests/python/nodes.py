"""Nodes and engines as real processes, each ended by the test that started it."""

import base64
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = os.environ.get("ISOBAR_BIN") or sys.exit("run these tests with: cargo xtask test")
# The optimised one, where there is one: the demo puts load on eighteen processes.
DEMO_BINARY = os.environ.get("ISOBAR_DEMO_BIN") or BINARY
# Variables of the tests themselves, which a node would take for keys of its configuration.
TEST_ONLY = ("ISOBAR_BIN", "ISOBAR_DEMO_BIN", "ISOBAR_STUBS", "ISOBAR_LONG")
# Long enough for a loaded machine; a test that waits so long has failed.
LONG = 30


# Ports that were given to somebody: nobody else gets them.
GIVEN = set()


def free_port() -> int:
    """A TCP port nobody listens on, another one each time. A process may take it first; a test then fails loudly."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port not in GIVEN:
            GIVEN.add(port)
            return port


def start_environment(log: str, **more) -> dict:
    """What a process of ours is started with; `more` may say otherwise."""
    kept = {name: value for name, value in os.environ.items() if name not in TEST_ONLY}
    return {**kept, "ISOBAR_LOG": log, **more}


def wait_for(what, check, timeout=LONG):
    """Polls until `check` returns something true, and returns it."""
    deadline = time.monotonic() + timeout
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} took more than {timeout} s")
        time.sleep(0.02)


def wait_for_peers(node, *peers):
    """Waits until `node` knows how pressed each of `peers` is, and is ready."""
    names = [f'isobar_peer_present{{peer="{p.name}",region="{p.region}"}}' for p in peers]
    wait_for("load of the peers", lambda: all(node.metric(name) == 1 for name in names))
    wait_for("its readiness", lambda: node.get("/readyz") == (200, "ok\n"))


def listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


class Process:
    """A process with its output in files, shown when a test fails."""

    def __init__(self, name: str, directory: Path, arguments, **options):
        self.name = name
        directory.mkdir(parents=True, exist_ok=True)
        self.out, self.err = directory / f"{name}.out", directory / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(
                [str(a) for a in arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                **options,
            )

    def died(self):
        """Raises when the process has ended."""
        if self.popen.poll() is not None:
            raise AssertionError(
                f"{self.name} ended with {self.popen.returncode}:\n{self.err.read_text()[-4000:]}"
            )

    def first_line(self) -> str:
        def line():
            self.died()
            text = self.out.read_text()
            return text if text.endswith("\n") else None

        return wait_for(f"the start of {self.name}", line).splitlines()[0]

    def stop(self, sig=signal.SIGTERM, timeout=LONG) -> int:
        """Ends the process and returns its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(sig)
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"{self.name} did not end within {timeout} s") from None

    def kill(self):
        self.popen.kill()
        self.popen.wait()


def toml(value) -> str:
    """A value as TOML spells it: JSON's spelling is the same for what configurations hold."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


class Node(Process):
    """`isobar node` with its own configuration."""

    def __init__(
        self,
        directory: Path,
        name: str,
        region: str,
        ca: Path,
        engines=(),
        peers=(),
        plaintext=False,
        environment=None,
        idempotent=(),
        log=None,
        tls=None,
        access=None,
        tenants=(),
        allow=(),
        **keys,
    ):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        listen = {a: "127.0.0.1:0" for a in ("clients", "peers", "gossip", "metrics", "admin")}
        if plaintext:
            listen["plaintext"] = plaintext if isinstance(plaintext, str) else "127.0.0.1:0"
        listen.update(keys.pop("listen", {}))
        lines = ["[node]", f'name = "{name}"', f'region = "{region}"']
        lines += [f"{k} = {toml(v)}" for k, v in keys.items()]
        lines += ["[listen]"] + [f"{k} = {toml(v)}" for k, v in listen.items()]
        lines += ["[mesh]", 'trust_domain = "mesh.test"']
        if idempotent:
            lines += ["[routing]", f"idempotent = {toml(list(idempotent))}"]
        if log:
            lines += ["[log]"] + [f"{k} = {toml(v)}" for k, v in log.items()]
        if tls:
            lines += ["[tls]"] + [f"{k} = {toml(v)}" for k, v in tls.items()]
        anonymous = (access or {}).get("anonymous")
        if anonymous:
            lines += ["[access]", f"anonymous = {toml(anonymous)}"]
        tables = {"access.jwt": (access or {}).get("jwt", ()), "tenant": tenants, "allow": allow}
        for table, entries in tables.items():
            for entry in entries:
                lines += [f"[[{table}]]"] + [f"{k} = {toml(v)}" for k, v in entry.items()]
        for peer in peers:
            if isinstance(peer, Node):
                peer = peer.as_peer()
            lines += ["[[mesh.peer]]"] + [f"{k} = {toml(v)}" for k, v in peer.items()]
        for engine in engines:
            lines += ["[[engine]]"] + [f"{k} = {toml(v)}" for k, v in engine.items()]
        config = directory / f"{name}.toml"
        config.write_text("\n".join(lines) + "\n")
        self.region = region
        self.made_with = (directory, name, region, ca)
        self.options = {
            **keys, "engines": engines, "plaintext": plaintext, "environment": environment,
            "idempotent": idempotent, "log": log, "tls": tls, "access": access,
            "tenants": tenants, "allow": allow,
        }
        self.peer_list = peers
        variables = start_environment("debug,h2=info,rustls=info", **(environment or {}))
        super().__init__(
            name,
            directory,
            [BINARY, "node", "-c", config, "--dev-ca", ca, "--json"],
            env=variables,
            cwd=directory,
        )
        try:
            self.info = json.loads(self.first_line())
        except BaseException:
            self.kill()
            raise
        listening = self.info["listen"]
        self.clients, self.peers = listening["clients"], listening["peers"]
        self.gossip = listening["gossip"]
        self.metrics_address, self.plaintext = listening["metrics"], listening["plaintext"]
        self.ca = Path(self.info["ca"])

    def as_peer(self) -> dict:
        """How others list it."""
        return {
            "name": self.name, "region": self.region, "peers": self.peers, "gossip": self.gossip,
        }

    def again(self) -> "Node":
        """The same node started anew, on the same ports; the old one must have ended."""
        listen = {k: v for k, v in self.info["listen"].items() if v}
        peers = [p.as_peer() if isinstance(p, Node) else p for p in self.peer_list]
        return Node(*self.made_with, peers=peers, listen=listen, **self.options)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page of the metrics port."""
        try:
            with urllib.request.urlopen(
                f"http://{self.metrics_address}{path}", timeout=LONG
            ) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The value of a metric with its labels; 0 before it was first counted."""
        for line in self.get("/metrics")[1].splitlines():
            if line.rsplit(" ", 1)[0] == name:
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def memory_bytes(self) -> int:
        """Resident memory."""
        for line in Path(f"/proc/{self.popen.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")


class MLServer(Process):
    """MLServer with the example model, on ports of its own."""

    def __init__(self, directory: Path):
        model = Path(directory) / "model"
        shutil.copytree(ROOT / "examples/two-nodes/model", model, dirs_exist_ok=True)
        settings = json.loads((model / "settings.json").read_text())
        self.port = free_port()
        settings.update(grpc_port=self.port, http_port=free_port(), metrics_port=free_port())
        (model / "settings.json").write_text(json.dumps(settings))
        command = Path(sys.executable).parent / "mlserver"
        super().__init__("mlserver", Path(directory), [command, "start", model], cwd=directory)
        self.address = f"127.0.0.1:{self.port}"

        def ready():
            self.died()
            return listens(self.port)

        wait_for("the start of MLServer", ready, 120)


class SimEngine(Process):
    """A simulated GPU server: `isobar sim engine`."""

    def __init__(
        self, directory: Path, name="sim", model="sim", enter=lambda *command: command, **options
    ):
        listen = {key: "127.0.0.1:0" for key in ("grpc", "http", "admin")}
        arguments = [BINARY, "sim", "engine", "--json", "--model", model]
        for key, value in {**listen, "step": "2ms", **options}.items():
            arguments += [f"--{key.replace('_', '-')}", value]
        super().__init__(name, Path(directory), enter(*arguments))
        try:
            self.listen = json.loads(self.first_line())["listen"]
        except BaseException:
            self.kill()
            raise
        self.model = model
        self.address = self.listen["grpc"]

    def engine(self, **more) -> dict:
        """How a node lists it."""
        keys = {"name": self.name, "url": f"http://{self.address}", "protocol": "kserve-v2"}
        return {**keys, "models": [self.model], **more}

    def http(self, path: str, body=None, address=None) -> tuple[int, str]:
        """Status and body of a page of its HTTP port."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://{address or self.listen['http']}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=LONG) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def inject(self, fault: str):
        """A fault, or `heal`."""
        status, said = self.http(f"/{fault}", {}, self.listen["admin"])
        assert status == 200, said


def text_input(prompt: str, tokens: int, model="sim") -> dict:
    """A ModelInferRequest of text, as JSON."""
    contents = {"bytes_contents": [base64.b64encode(prompt.encode()).decode()]}
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": contents}
    parameters = {"max_tokens": {"int64_param": tokens}}
    return {"model_name": model, "inputs": [tensor], "parameters": parameters}


def pem_of(address: str) -> str:
    """The certificate a TLS port presents."""
    host, port = address.rsplit(":", 1)
    return ssl.get_server_certificate((host, int(port)))


class Service(Process):
    """The test service (service.py); `enter` is a command that starts another one elsewhere."""

    def __init__(
        self, directory: Path, name="service", factor=1.0, health=False, reflection=False,
        host="127.0.0.1", enter=lambda *command: command,
    ):
        script = Path(__file__).with_name("service.py")
        arguments = [sys.executable, script, "--factor", factor, "--host", host]
        arguments += ["--health"] if health else []
        arguments += ["--reflection"] if reflection else []
        super().__init__(name, Path(directory), enter(*arguments))
        self.address = f"{host}:{self.first_line()}"

    def engine(self, **more) -> dict:
        return {"name": self.name, "url": f"http://{self.address}", "protocol": "grpc", **more}
