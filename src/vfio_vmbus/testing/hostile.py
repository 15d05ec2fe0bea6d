"""Attacks on the embedded host, and what came of them.

    with Arena(host, victim) as arena:
        for attack in ATTACKS:
            verdict = arena.judge(attack)       # verdict.stopped, .bytes_touched, .evidence

Each attack gets a client of its own. It is stopped when the host refused or counted it and nothing leaked: memory that the attacker
must not reach is full of marked frames; none of it may change, and none may turn up in a frame on the switch or in the attacker's
receive buffer.

`Raid` is the attackers' half, which needs nothing of the host but a way to it, and `judge.Judge` the host's; an Arena is both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from ..channel.device import VmbusDevice
from ..channel.offered import OfferedDevice
from ..channel.opening import open_device
from ..host.embedded import EmbeddedHost
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..memory.shared import SharedMemory
from .attacker import MARK, Attack, Attacker, Outcome, Prey, marked_memory
from .attacks.amounts import AMOUNTS
from .attacks.buffers import BUFFERS
from .attacks.memory import MEMORY
from .attacks.messages import MESSAGES
from .attacks.rings import RINGS
from .judge import CANARY_PAGES, Canary, Finding, Judge

ATTACKS: tuple[Attack, ...] = (*MEMORY, *RINGS, *BUFFERS, *MESSAGES, *AMOUNTS)

FOREIGN_IOVA = 1 << 37
"""Where the victim maps its canary: far from all that a driver maps by itself."""


@dataclass(frozen=True)
class Verdict:
    """What came of an attack. bytes_touched: of forbidden memory, written, or read and seen. evidence: how the host took notice."""

    attack: Attack
    stopped: bool
    bytes_touched: int
    evidence: tuple[str, ...]
    outcome: Outcome


class HostSide(Protocol):
    """What a `Judge` does, wherever it is."""

    def watch(self) -> None:
        """An attacker has attached, and is about to begin."""

    def gone(self) -> bool:
        """Has the host closed the attacker's card?"""

    def finding(self, outcome: Outcome, *, lawful: bool) -> Finding:
        """What the host saw of the attack."""


class Raid:
    """The attackers, one after the other, each on a device that `attach` gives. A with statement closes it.

    victim: another client of the same host, whose memory and handles the attackers are told; some memory is mapped for it meanwhile.
    addresses: of the host's own memory. mac: the attackers' card's.
    """

    def __init__(
        self,
        attach: Callable[[], VmbusDevice],
        side: HostSide,
        victim: OfferedDevice,
        *,
        addresses: tuple[int, ...],
        mac: bytes,
    ) -> None:
        self._attach = attach
        self._side = side
        size = CANARY_PAGES * PAGE
        connection = victim.connection
        with ExitStack() as stack:
            memory = SharedMemory(size, "canary")
            stack.callback(memory.close)
            mapping = memory.map()
            stack.callback(mapping.close)
            self._canary = Canary(mapping.address, marked_memory(mac, size))
            connection.device.dma.map(FOREIGN_IOVA, memory.fd, 0, size, READ | WRITE)
            stack.callback(connection.device.dma.unmap, FOREIGN_IOVA, size)
            relid = next(iter(connection.offers))
            pfns = range(FOREIGN_IOVA // PAGE, FOREIGN_IOVA // PAGE + CANARY_PAGES)
            handles = []
            for _ in range(2):
                handles.append(connection.create_gpadl(relid, pfns))
                stack.callback(connection.teardown_gpadl, handles[-1])
            self._resources = stack.pop_all()
        self.prey = Prey(iovas=(FOREIGN_IOVA, FOREIGN_IOVA + size - PAGE), addresses=addresses, handles=tuple(handles))

    def judge(self, attack: Attack) -> Verdict:
        """Let a fresh client try it."""
        with self._attach() as device:
            self._side.watch()
            attacker = Attacker(device, self.prey, gone=self._side.gone)
            own = [Canary(memory.mapping.address, marked_memory(attacker.mac, memory.size)) for memory in attacker.forbidden]
            outcome = attack.run(attacker)
            finding = self._side.finding(outcome, lawful=attack.lawful)
            touched = finding.bytes_touched + sum(canary.changed() for canary in [self._canary, *own])
            touched += attacker.received().count(MARK) * len(MARK)
        noticed = bool(finding.evidence) or attack.lawful
        return Verdict(attack, noticed and touched == 0, touched, finding.evidence, outcome)

    def close(self) -> None:
        """Take the victim's memory back."""
        self._resources.close()

    def __enter__(self) -> Raid:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Arena:
    """Attackers and judge in one process with the host. A with statement closes it; the cards stay on the host, unplugged.

    personality: how the attackers' card is shown to them; attacks with `bus` need "pci".
    """

    def __init__(self, host: EmbeddedHost, victim: OfferedDevice, *, name: str = "attacker", personality: str = "pci") -> None:
        with ExitStack() as stack:
            judge = Judge(host, name)
            stack.callback(judge.close)

            def attach() -> VmbusDevice:
                return open_device(host.attach(judge.card, name=f"embedded:{name}", personality=personality))

            raid = stack.enter_context(Raid(attach, judge, victim, addresses=judge.addresses, mac=judge.card.mac))
            self.judge = raid.judge
            self._resources = stack.pop_all()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._resources.close()
