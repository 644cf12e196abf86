"""Machines that are none, in regions: network namespaces on one bridge per region, and a router between the regions that
takes its time. What passes is bent by nftables where it arrives, as a network does, not where it leaves.

    10.77.1.0/24            router             10.77.2.0/24
    hosts of region 1 ── br1 ─┤ tun ├─ br2 ── hosts of region 2

The kernel's own delay (netem) is missing in many kernels: a packet that crosses goes through a tun device whose other end is
a process (delay.py), and comes back when it is due.
"""

import ctypes
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

from nodes import DEMO_BINARY, LONG, Node, Process, SimEngine, start_environment, toml
from status import Status
from traffic import Traffic

PREFIX = "10.77"
ROUTER = 254
TUN, DELAY = "delay", Path(__file__).with_name("delay.py")
# Nobody in these regions has anything to say to anybody further away.
SETTINGS = {"ip_forward": "1", "conf/all/rp_filter": "0", "conf/default/rp_filter": "0"}
CLONE_NEWNET = 0x40000000


def run(*command, text=None):
    """Runs a command that has to work, and says what it takes where it does not."""
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=LONG, input=text
        )
    except FileNotFoundError:
        package = {"nft": "nftables"}.get(str(command[0]), "iproute2")
        raise AssertionError(f"`{command[0]}` is missing: apt-get install {package}") from None
    if done.returncode != 0:
        said = f"`{' '.join(map(str, command))}` failed: {done.stderr.strip()}"
        raise AssertionError(f"{said}. Network namespaces need root: run the tests as root")
    return done.stdout


def within(namespace: str, act):
    """Does `act` in the network of a namespace and returns what it returned: sockets made there stay there."""
    outcome = {}

    def enter():
        try:
            with open(f"/var/run/netns/{namespace}") as opened:
                if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
            outcome["returned"] = act()
        except Exception as error:
            outcome["raised"] = error

    # The namespace is the thread's own, and goes with it.
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if "raised" in outcome:
        raise outcome["raised"]
    return outcome["returned"]


class Namespace:
    """A network of its own, with rules by name for what arrives."""

    def __init__(self, name: str, hook: str):
        self.namespace, self.hook, self.rules = name, hook, {}
        run("ip", "netns", "add", name)
        self.ip("link", "set", "lo", "up")
        for key, value in SETTINGS.items():
            within(name, lambda: Path("/proc/sys/net/ipv4", key).write_text(value))

    def enter(self, *command) -> list[str]:
        """A command as it is run there."""
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def ip(self, *arguments):
        run("ip", "-n", self.namespace, *arguments)

    def drop(self, name: str, *what: str):
        """From now on packets that match any of `what` (nft) are lost, until `allow(name)`."""
        self.rules[name] = what
        self.apply()

    def allow(self, name: str):
        if self.rules.pop(name, None) is not None:
            self.apply()

    def heal(self):
        if self.rules:
            self.rules = {}
            self.apply()

    def apply(self):
        """All rules are replaced at one moment."""
        lines = [f"    {what} drop" for rule in self.rules.values() for what in rule]
        chain = f"type filter hook {self.hook} priority 0; policy accept;"
        table = ["table inet lan {", "  chain lost {", f"    {chain}", *lines, "  }", "}"]
        text = "\n".join(["table inet lan", "delete table inet lan", *table, ""])
        run(*self.enter("nft", "-f", "-"), text=text)

    def remove(self):
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True)


class Host(Namespace):
    """A machine of a region, with one address."""

    def __init__(self, name: str, region: int, number: int):
        super().__init__(name, "input")
        self.region = region
        self.address = f"{PREFIX}.{region}.{number}"

    def plugged_in(self):
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("route", "add", "default", "via", f"{PREFIX}.{self.region}.{ROUTER}")

    def move(self, number: int):
        """It gets another address; whoever has the old one finds nobody."""
        self.ip("addr", "flush", "dev", "eth0")
        self.address = f"{PREFIX}.{self.region}.{number}"
        self.plugged_in()

    def deaf_to(self, *others: "Host"):
        """What these send is lost; what it sends to them arrives."""
        senders = [f"ip saddr {other.address}" for other in others]
        self.drop(f"deaf to {senders}", *senders)

    def run(self, *command, timeout=LONG) -> subprocess.CompletedProcess:
        """Runs a command here to its end."""
        return subprocess.run(
            self.enter(*command), capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def connect(self, address: str) -> socket.socket:
        """A TCP connection from here."""
        host, port = address.rsplit(":", 1)
        return within(self.namespace, lambda: socket.create_connection((host, int(port)), 5))

    def get(self, address: str, path: str) -> tuple[int, str]:
        """Status and body of a page, asked for from here."""
        connection = http.client.HTTPConnection(address, timeout=5)
        connection.sock = self.connect(address)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()


class Lan:
    """Regions of hosts, numbered from 1. Packets between regions take `delay_ms` each way."""

    def __init__(self, regions=2, delay_ms=20):
        self.name = f"iso{uuid.uuid4().hex[:8]}"
        self.hosts, self.router, self.crossing = [], None, None
        try:
            self.router = Namespace(f"{self.name}-r", "forward")
            for region in range(1, regions + 1):
                self.begin_region(region)
            self.begin_delay(delay_ms, regions)
        except BaseException:
            self.end()
            raise

    def begin_region(self, region: int):
        bridge = f"br{region}"
        self.router.ip("link", "add", bridge, "type", "bridge")
        self.router.ip("addr", "add", f"{PREFIX}.{region}.{ROUTER}/24", "dev", bridge)
        self.router.ip("link", "set", bridge, "up")

    def begin_delay(self, delay_ms: int, regions: int):
        command = self.router.enter(sys.executable, DELAY, TUN, delay_ms)
        self.crossing = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.crossing.stdout.readline() == b"ready\n", "there is no tun device"
        self.router.ip("link", "set", TUN, "up")
        self.router.ip("route", "add", "default", "dev", TUN, "table", "100")
        for region in range(1, regions + 1):
            self.router.ip("rule", "add", "iif", f"br{region}", "lookup", "100")

    def host(self, region: int, number=None) -> Host:
        number = number or 1 + sum(host.region == region for host in self.hosts)
        host = Host(f"{self.name}-{region}-{number}", region, number)
        self.hosts.append(host)
        port = f"p{region}-{number}"
        self.router.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        self.router.ip("link", "set", port, "master", f"br{region}", "up")
        host.plugged_in()
        return host

    def split(self, group: list[Host]):
        """What these hosts and the others say to each other is lost."""
        rest = [host for host in self.hosts if host not in group]
        for host in group:
            host.deaf_to(*rest)
        for host in rest:
            host.deaf_to(*group)

    def cut_off(self, region: int):
        """Nothing enters the region, and nothing leaves it."""
        bridge = f"br{region}"
        # Where bridges hand packets to nftables, those within the region come by here too.
        inside, outside = f'"{bridge}"', f'!= "{bridge}"'
        self.router.drop(f"region {region}", f"iifname {inside} oifname {outside}", f"iifname {outside} oifname {inside}")

    def lose(self, percent: int):
        """So much of what comes over the network is lost."""
        for host in self.hosts:
            host.drop("loss", f'iifname "eth0" numgen random mod 100 < {percent}')

    def no_udp(self):
        for host in self.hosts:
            host.drop("udp", 'iifname "eth0" meta l4proto udp')

    def heal(self):
        """Everything passes again."""
        for one in (self.router, *self.hosts):
            one.heal()

    def end(self):
        """Takes everything away, in whatever state it is; what runs there must have been ended."""
        if self.crossing:
            self.crossing.kill()
            self.crossing.wait()
            self.crossing.stdin.close()
            self.crossing.stdout.close()
        for one in (*self.hosts, self.router):
            if one:
                one.remove()


# The ports of a node of a LAN: those README names. Those for operators are its machine's own.
PORTS = {"clients": 8443, "peers": 8444, "gossip": 8445}
OPERATORS = {"metrics": "127.0.0.1:9464", "admin": "127.0.0.1:9090"}


class LanNode(Node):
    """`isobar node` on a host. It knows one seed, by its gossip port, and nobody else."""

    def __init__(self, host: Host, directory: Path, name: str, region: str, seed=None, **more):
        self.host, self.made_with = host, (directory, name, region)
        self.name, self.region, self.options = name, region, {"seed": seed, **more}
        self.directory = Path(directory) / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.starts = 1 + len(list(self.directory.glob("*.err")))
        config = self.directory / f"node-{self.starts}.toml"
        config.write_text(self.configuration(seed, **more))
        ca = Path(directory) / "ca"
        # The optimised binary: a dozen processes share two cores, and time is measured.
        command = host.enter(DEMO_BINARY, "node", "-c", config, "--dev-ca", ca, "--json")
        options = {"env": start_environment("info"), "cwd": self.directory}
        Process.__init__(self, f"{name}-{self.starts}", self.directory, command, **options)
        self.name = name

    def configuration(self, seed, engines=(), listen=None, state="state", **keys) -> str:
        ports = {port: f"{self.host.address}:{number}" for port, number in PORTS.items()}
        node = {"name": self.name, "region": self.region, "state_dir": str(self.directory / state)}
        tables = [
            ("[node]", {**node, "drain_timeout": "5s", **keys}),
            ("[listen]", {**ports, **OPERATORS, **(listen or {})}),
            ("[mesh]", {"trust_domain": "mesh.test", "seeds": [seed] if seed else []}),
            ("[routing]", {"idempotent": ["isobar.test.v1.Kinds/Unary"]}),
            *(("[[engine]]", engine) for engine in engines),
        ]
        lines = []
        for head, table in tables:
            lines += [head] + [f"{key} = {toml(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"

    def is_ready(self) -> "LanNode":
        """Waits until it listens, and learns where."""
        try:
            self.info = json.loads(self.first_line())
        except BaseException:
            self.kill()
            raise
        listening = self.info["listen"]
        self.clients, self.peers = listening["clients"], listening["peers"]
        self.gossip, self.admin = listening["gossip"], listening["admin"]
        self.metrics_address, self.ca = listening["metrics"], Path(self.info["ca"])
        return self

    def again(self, host=None, **more) -> "LanNode":
        """The same node started anew, here or on another host."""
        return LanNode(host or self.host, *self.made_with, **{**self.options, **more})

    def get(self, path: str) -> tuple[int, str]:
        return self.host.get(self.metrics_address, path)

    def status(self) -> Status:
        """The mesh as this node sees it."""
        command = [DEMO_BINARY, "status", "--json", "--admin", self.admin]
        done = self.host.run(*command)
        assert done.returncode == 0, f"isobar status at {self.name}: {done.stderr}{done.stdout}"
        return Status(done.stdout)

    def broken_attempts(self) -> float:
        """Attempts at other nodes that came to nothing, for whatever reason but that those were busy."""
        found = 0.0
        for line in self.get("/metrics")[1].splitlines():
            if re.match(r'isobar_attempts_failed_total\{.*to="peer"', line) and '"busy"' not in line:
                found += float(line.rsplit(" ", 1)[1])
        return found

    def says(self, *parts: str) -> list[str]:
        """The lines of its log in which all of `parts` occur."""
        lines = self.err.read_text(errors="replace").splitlines()
        return [line for line in lines if all(part in line for part in parts)]

    def cpu_s(self) -> float:
        """Time of the processor it has used so far."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sim_engine(host: Host, directory: Path, name: str, model: str, **options) -> SimEngine:
    """A simulated GPU server beside a node of this host."""
    return SimEngine(directory, name, model, enter=host.enter, **options)


def callers(host: Host, directory: Path, name: str, flows: list[dict], **options) -> Traffic:
    """Calls by a client on this host."""
    return Traffic(directory, flows, name, enter=host.enter, **options)
