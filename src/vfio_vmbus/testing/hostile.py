"""Attacks on the embedded host, and the judge of what came of them.

    with Arena(host, victim) as arena:
        for attack in ATTACKS:
            verdict = arena.judge(attack)       # verdict.stopped, .bytes_touched, .evidence

Each attack gets a client of its own. It is stopped when the host refused or counted it and nothing leaked: memory that the attacker
must not reach is full of marked frames; none of it may change, and none may turn up in a frame on the switch or in the attacker's
receive buffer. What the judge cannot see: a read whose result the host drops.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from ..channel.offered import OfferedDevice
from ..channel.opening import open_device
from ..drivers.netvsc.driver import Netvsc
from ..host.embedded import EmbeddedHost, HostEnd
from ..iommu.translation import READ, WRITE
from ..memory.block import Block
from ..memory.mapping import PAGE
from ..memory.shared import SharedMemory
from ..vfio.inprocess import InProcessDevice
from ..wire import oid
from .attacker import MARK, Attack, Attacker, Outcome, Prey, marked_memory
from .attacks.amounts import AMOUNTS
from .attacks.buffers import BUFFERS
from .attacks.memory import MEMORY
from .attacks.messages import MESSAGES
from .attacks.rings import RINGS

ATTACKS: tuple[Attack, ...] = (*MEMORY, *RINGS, *BUFFERS, *MESSAGES, *AMOUNTS)

CANARY_PAGES = 4
FOREIGN_IOVA = 1 << 37
"""Where the victim maps its canary: far from all that a driver maps by itself."""
_COUNTERS = ("bad_sections", "bad_messages", "bad_ranges", "bad_completions", "faults")
_PORT = ("too_long", "too_short", "spoofed")
_PATIENCE = 2.0


@dataclass(frozen=True)
class Verdict:
    """What came of an attack. bytes_touched: of forbidden memory, written, or read and seen. evidence: how the host took notice."""

    attack: Attack
    stopped: bool
    bytes_touched: int
    evidence: tuple[str, ...]
    outcome: Outcome


class _Canary:
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


class Arena:
    """A card on `host` for the attackers, canaries, and a witness on the switch. A with statement closes it.

    victim: another client of this host, whose memory and handles the attackers are told; some memory is mapped for it meanwhile.
    personality: how the attackers' card is shown to them; those with `bus` need "pci".
    """

    def __init__(self, host: EmbeddedHost, victim: OfferedDevice, *, name: str = "attacker", personality: str = "pci") -> None:
        self.host = host
        self._personality = personality
        self._victim = victim
        self._card = host.add_nic(name)
        self._witness = host.add_nic(f"{name}-witness")
        size = CANARY_PAGES * PAGE
        content = marked_memory(self._card.mac, size)
        self._private = Block("u1", size + PAGE)
        self._foreign = SharedMemory(size, "canary")
        self._mapping = self._foreign.map()
        self._page = -(-self._private.address // PAGE) * PAGE
        self._canaries = [_Canary(self._page, content), _Canary(self._mapping.address, content)]
        victim.connection.device.dma.map(FOREIGN_IOVA, self._foreign.fd, 0, size, READ | WRITE)
        relid = next(iter(victim.connection.offers))
        pfns = range(FOREIGN_IOVA // PAGE, FOREIGN_IOVA // PAGE + CANARY_PAGES)
        self._handles = [victim.connection.create_gpadl(relid, pfns) for _ in range(2)]
        self._sight = open_device(host.attach(self._witness))
        self._eyes = Netvsc(self._sight, mtu=9000, packet_filter=oid.PACKET_TYPE_PROMISCUOUS)
        self.prey = Prey(
            iovas=(FOREIGN_IOVA, FOREIGN_IOVA + size - PAGE),
            addresses=(self._page, self._page + PAGE),
            handles=tuple(self._handles),
        )

    def judge(self, attack: Attack) -> Verdict:
        """Let a fresh client try it."""
        function = self.host.attach(self._card, name=f"embedded:{self._card.name}", personality=self._personality)
        connection = self.host.connection(function)
        before = self._counts(function)
        device = open_device(function)
        try:
            attacker = Attacker(device, self.prey, gone=lambda: self._is_gone(connection))
            own = [_Canary(memory.mapping.address, marked_memory(attacker.mac, memory.size)) for memory in attacker.forbidden]
            outcome = attack.run(attacker)
            touched = sum(canary.changed() for canary in [*self._canaries, *own])
            touched += self._seen() + attacker.received().count(MARK) * len(MARK)
            evidence = self._evidence(function, connection, before, outcome, attack.lawful)
        finally:
            device.close()
        noticed = bool(evidence) or attack.lawful
        return Verdict(attack, noticed and touched == 0, touched, tuple(evidence), outcome)

    def _is_gone(self, connection: HostEnd) -> bool:
        """Has the host closed the attacker's card?"""
        return self._card.port is None or connection.function.failed

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

    def _counts(self, function: InProcessDevice) -> dict[str, int]:
        counts = {f"nic {name}": self._card.counter(name) for name in _COUNTERS}
        port = self._card.port
        if port is not None:
            now = port.counters()
            counts |= {f"switch {name}": getattr(now, name) for name in _PORT}
        return counts | {"isolation faults": function.function.domain.fault_count}

    def _evidence(
        self, function: InProcessDevice, connection: HostEnd, before: dict[str, int], outcome: Outcome, lawful: bool
    ) -> list[str]:
        """How the host took notice. Waits a little, where it may still be about to."""
        end = time.monotonic() + (0 if lawful else _PATIENCE)
        while True:
            grown = {name: value - before.get(name, 0) for name, value in self._counts(function).items()}
            found = [f"{name}: {value}" for name, value in grown.items() if value]
            found += [f"closed: {error}" for error in list(connection.errors)[:3]]
            found += [f"refused: {text}" for text in outcome.refused[:3]]
            found += [f"completed with failure: {outcome.failed}"] if outcome.failed else []
            if (found and (connection.errors or not outcome.unanswered)) or time.monotonic() > end:
                return found
            time.sleep(0.001)

    def close(self) -> None:
        """Take everything away again; the cards stay on the host, unplugged."""
        self._eyes.close()
        self._sight.close()
        for handle in self._handles:
            self._victim.connection.teardown_gpadl(handle)
        self._victim.connection.device.dma.unmap(FOREIGN_IOVA, CANARY_PAGES * PAGE)
        self._mapping.close()
        self._foreign.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
