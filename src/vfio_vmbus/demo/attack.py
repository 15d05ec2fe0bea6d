"""The attacks of the demonstration: other clients of the same host try everything that a hostile driver could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..channel.device import VmbusDevice
from ..channel.offered import OfferedDevice
from ..errors import UsageError
from ..testing.hostile import ATTACKS, Raid
from .hostprocess import HostProcess


@dataclass(frozen=True)
class Outcome:
    """What came of one attack. answer: how the host took notice. bytes_touched: of memory that is not the attacker's."""

    name: str
    answer: str
    stopped: bool
    bytes_touched: int


def attack_all(host: HostProcess, victim: VmbusDevice, say: Callable[[str], None]) -> list[Outcome]:
    """Run every attack there is against `host`, each over a socket of its own, while `victim` is driven by the first client."""
    if not isinstance(victim, OfferedDevice):
        raise UsageError(f"{victim.name}: attackers are told of the memory of a card with a VMBus connection of its own")

    def attach() -> VmbusDevice:
        return host.attach(attacker=True)

    outcomes = []
    with Raid(attach, host, victim, addresses=host.ready.addresses, mac=host.ready.mac) as raid:
        for number, attack in enumerate(ATTACKS, 1):
            say(f"attack {number} of {len(ATTACKS)}: {attack.name}")
            verdict = raid.judge(attack)
            outcomes.append(Outcome(attack.name, "; ".join(verdict.evidence), verdict.stopped, verdict.bytes_touched))
    return outcomes
