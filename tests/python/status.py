"""What `isobar status --json` says of the mesh, by the names the tests use: whoever changes its JSON changes this file."""

import json
from dataclasses import dataclass

ALIVE, DOWN = "alive", "down"


@dataclass
class Member:
    """One node as another one sees it. `load_age_ms` is None while it has not been heard."""

    name: str
    region: str
    state: str
    epoch: int
    gossip: str
    transport: str | None
    load_age_ms: float | None
    subscribed: bool
    quarantine: str | None
    in_flight: int | None
    slots: int | None

    @staticmethod
    def read(said: dict) -> "Member":
        return Member(
            name=said["node"], region=said["region"], state=said["state"], epoch=said["epoch"],
            gossip=said["gossip"] or "", transport=said["transport"],
            load_age_ms=said["load_age_ms"], subscribed=said["subscribed"],
            quarantine=said["quarantine"] and said["quarantine"]["why"],
            in_flight=said["load"] and said["load"]["in_flight"],
            slots=said["load"] and said["load"]["slots"],
        )


class Status:
    """The mesh from where one node stands, at one moment."""

    def __init__(self, text: str):
        self.said = json.loads(text)
        members = [Member.read(one) for one in self.said["members"]]
        self.members = {member.name: member for member in members}

    def state(self, name: str) -> str:
        """`alive`, `suspect`, `down`, `left`, or `unknown` where it does not speak of the node at all."""
        return self.members[name].state if name in self.members else "unknown"

    def alive(self) -> set[str]:
        return self.named(ALIVE)

    def down(self) -> set[str]:
        return self.named(DOWN)

    def named(self, state: str) -> set[str]:
        return {name for name, member in self.members.items() if member.state == state}

    def linked(self) -> dict[str, str]:
        """How each node is linked that is."""
        return {name: member.transport for name, member in self.members.items() if member.transport}

    def is_relay(self) -> bool:
        return self.said["node"]["relay"]

    def quarantined(self) -> dict[str, str]:
        """Who is not listened to, and why."""
        return {name: one.quarantine for name, one in self.members.items() if one.quarantine}
