"""The host's side of an attack: what of its memory changed, what turned up on the switch, how it took notice.

    judge = Judge(host)
    ...                         # a client attaches the card `judge.card`
    judge.watch()
    ...                         # and attacks
    finding = judge.finding(outcome)

What the judge cannot see: a read whose result the host drops.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import numpy as np

from ..channel.opening import open_device
from ..drivers.netvsc.driver import Netvsc
from ..host.embedded import EmbeddedHost, HostEnd
from ..memory.block import Block
from ..memory.mapping import PAGE
from ..wire import oid
from .attacker import MARK, Outcome, marked_memory

CANARY_PAGES = 4
_COUNTERS = ("bad_sections", "bad_messages", "bad_ranges", "bad_completions", "faults")
_PORT = ("too_long", "too_short", "spoofed")
_PATIENCE = 2.0


class Canary:
    """Memory at `address` that nobody may write."""

    def __init__(self, address: int, content: bytes) -> None:
        self._address = address
        self._content = np.frombuffer(content, np.uint8)
        self._now = np.ctypeslib.as_array((ctypes.c_uint8 * len(content)).from_address(address))
        self._now[:] = self._content

    def changed(self) -> int:
        """How many bytes are not as they were; they are put right again."""
        differ = int((self._now != self._content).sum())
        self._now[:] = self._content
        return differ


@dataclass(frozen=True)
class Finding:
    """bytes_touched: of forbidden memory, written, or read and seen. evidence: how the host took notice."""

    bytes_touched: int
    evidence: tuple[str, ...]


class Judge:
    """On `host`: a card for attackers, marked memory that is the host's alone, a witness on the switch."""

    def __init__(self, host: EmbeddedHost, name: str = "attacker") -> None:
        self.host = host
        self.card = host.add_nic(name)
        self._witness = host.add_nic(f"{name}-witness")
        size = CANARY_PAGES * PAGE
        self._private = Block("u1", size + PAGE)
        page = -(-self._private.address // PAGE) * PAGE
        self._canary = Canary(page, marked_memory(self.card.mac, size))
        self.addresses = (page, page + PAGE)
        """Pages of the host's own memory, for attackers to try."""
        self._sight = open_device(host.attach(self._witness))
        self._eyes = Netvsc(self._sight, mtu=9000, packet_filter=oid.PACKET_TYPE_PROMISCUOUS)
        self._connection: HostEnd | None = None
        self._before: dict[str, int] = {}

    def watch(self) -> None:
        """The card's next client is the attacker, and about to begin. Raises UsageError when it has no client."""
        self._connection = self.host.connection_of(self.card)
        self._before = self._counts(self._connection)

    def gone(self) -> bool:
        """Has the host closed the attacker's card?"""
        return self.card.port is None or self._watched.failed

    def finding(self, outcome: Outcome, *, lawful: bool) -> Finding:
        """What the host saw of the attack. Waits a little, where it may still be about to notice."""
        touched = self._canary.changed() + self._seen()
        return Finding(touched, tuple(self._evidence(outcome, lawful)))

    @property
    def _watched(self) -> HostEnd:
        assert self._connection is not None, "watch() comes first"
        return self._connection

    def _seen(self) -> int:
        """Bytes of marked frames that the witness got, once the switch has nothing more to forward."""
        with self.host.switch.worker.paused():
            pass
        seen = 0
        while len(frames := self._eyes.queue.rx_burst()):
            for frame in frames:
                data = ctypes.string_at(int(frame["address"]), int(frame["size"]))
                seen += len(data) if MARK[:16] in data else 0
        self._eyes.poll()
        return seen

    def _counts(self, connection: HostEnd) -> dict[str, int]:
        counts = {f"nic {name}": self.card.counter(name) for name in _COUNTERS}
        port = self.card.port
        if port is not None:
            now = port.counters()
            counts |= {f"switch {name}": getattr(now, name) for name in _PORT}
        return counts | {"isolation faults": connection.domain.fault_count}

    def _evidence(self, outcome: Outcome, lawful: bool) -> list[str]:
        connection = self._watched
        end = time.monotonic() + (0 if lawful else _PATIENCE)
        while True:
            grown = {name: value - self._before.get(name, 0) for name, value in self._counts(connection).items()}
            found = [f"{name}: {value}" for name, value in grown.items() if value]
            found += [f"closed: {error}" for error in list(connection.errors)[:3]]
            found += [f"refused: {text}" for text in outcome.refused[:3]]
            found += [f"completed with failure: {outcome.failed}"] if outcome.failed else []
            if (found and (connection.errors or not outcome.unanswered)) or time.monotonic() > end:
                return found
            time.sleep(0.001)

    def close(self) -> None:
        """Take the witness away; the cards stay on the host, unplugged."""
        self._eyes.close()
        self._sight.close()
