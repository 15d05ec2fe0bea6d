"""The attacks of the demonstration: a second client of the same host tries everything that a hostile driver could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..host.embedded import EmbeddedHost
from ..host.netvsp.vsp import Netvsp


@dataclass(frozen=True)
class Outcome:
    """What came of one attack. bytes_touched: of anybody else's memory that changed or was seen."""

    name: str
    answer: str
    stopped: bool
    bytes_touched: int


def attack_all(host: EmbeddedHost, victim: Netvsp, say: Callable[[str], None]) -> list[Outcome]:
    """Run every attack of `testing.hostile` against `host`, on which `victim` is the first client's card."""
    return []
