"""The attacks of the demonstration: other clients of the same host try everything that a hostile driver could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..channel.offered import OfferedDevice
from ..host.embedded import EmbeddedHost
from ..testing.hostile import ATTACKS, Arena


@dataclass(frozen=True)
class Outcome:
    """What came of one attack. answer: how the host took notice. bytes_touched: of memory that is not the attacker's."""

    name: str
    answer: str
    stopped: bool
    bytes_touched: int


def attack_all(host: EmbeddedHost, victim: OfferedDevice, say: Callable[[str], None]) -> list[Outcome]:
    """Run every attack there is against `host`, while `victim` is driven by the first client."""
    outcomes = []
    with Arena(host, victim) as arena:
        for number, attack in enumerate(ATTACKS, 1):
            say(f"attack {number} of {len(ATTACKS)}: {attack.name}")
            verdict = arena.judge(attack)
            outcomes.append(Outcome(attack.name, "; ".join(verdict.evidence), verdict.stopped, verdict.bytes_touched))
    return outcomes
