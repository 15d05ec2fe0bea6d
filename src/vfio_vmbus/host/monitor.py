"""Looks at a guest's monitor page: signals of channels whose offers are monitored, for guests that make no hypercall for each.

A thread of its own, in compiled code without the GIL. It looks every 100 us while signals come, and less and less often, down to every
4 ms, while none do. What latency a guest wishes for (in the same page) is not looked at.

Only bits of channels that are open are touched, and without one the page is not even read: Linux, when it unloads hv_vmbus, frees the
page without telling the host (6.12: vmbus_exit), and whose memory it is then, nobody knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dataplane.worker import Worker, attention, scratch_of, sleep
from ..memory.access import and32, inline, load32, load64, viewer
from ..memory.block import Block
from ..memory.kernel import kernel
from ..memory.libc import sleep_ns
from ..memory.mapping import Mapping
from ..memory.signal import signal, signal_record
from ..wire.monitor import BITS_PER_GROUP, GROUPS, MonitorPage, TriggerGroup

MONITOR = np.dtype(
    [
        ("control", "i8"),  # address of the worker's CONTROL
        ("page", "i8"),  # address of the guest's page
        ("doorbells", "i8"),  # address of a table: for each number the eventfd
        ("open", "i8"),  # address of a table: for each group the bits of channels that are open
        ("signal", "i8"),  # address of a record for memory.signal
        ("period", "i8"),  # ns until the next look
        ("idle", "i8"),  # how often nothing was there, in a row
        ("looks", "i8"),
        ("signals", "i8"),
    ]
)
"""What the thread has in private memory."""

FASTEST_NS = 100_000
SLOWEST_NS = 4_000_000
_PATIENCE = 50
"""Looks in vain before the period begins to grow."""
_MILLISECOND = 1_000_000
_GROUPS_AT = MonitorPage.OFFSETS["groups"]
_GROUP = TriggerGroup.SIZE
_COUNT = GROUPS * BITS_PER_GROUP

_monitor_at = viewer(MONITOR)


@inline
def look(monitor: Any) -> int:
    """Take the bits of open channels that are set out of the page, and ring those channels' doorbells; how many. -1: none is open."""
    rung = -1
    for group in range(GROUPS):
        mask = load64(monitor.open + group * 8)
        if mask == 0:
            continue
        rung = max(rung, 0)
        word = monitor.page + _GROUPS_AT + group * _GROUP
        bits = load32(word) & mask
        if bits == 0:
            continue
        and32(word, ~bits)  # before the doorbells: what is signalled from here on is seen at the next look
        for bit in range(BITS_PER_GROUP):
            if (bits >> bit) & 1 != 0:
                signal(load64(monitor.doorbells + (group * BITS_PER_GROUP + bit) * 8), monitor.signal)
                rung += 1
    if rung < 0:
        return rung
    monitor.looks += 1
    monitor.signals += rung
    return rung


@inline
def _adapt(monitor: Any, rung: int) -> None:
    if rung > 0:
        monitor.idle = 0
        monitor.period = FASTEST_NS
        return
    monitor.idle += 1
    if monitor.idle > _PATIENCE:
        monitor.period = min(2 * monitor.period, SLOWEST_NS)


@kernel("void(i8)")
def monitor_run(address: int) -> None:
    """The thread's loop, until its worker wants attention."""
    monitor = _monitor_at(address)
    while attention(monitor.control) == 0:
        rung = look(monitor)
        if rung < 0:
            sleep(monitor.control, -1)
            continue
        _adapt(monitor, rung)
        if monitor.period < _MILLISECOND:
            sleep_ns(monitor.period, scratch_of(monitor.control))
        else:
            sleep(monitor.control, monitor.period // _MILLISECOND)


class Monitor:
    """Watches `page`, a mapping of a guest's monitor page, from now on until `stop`; its maker unmaps it then."""

    def __init__(self, page: Mapping, name: str) -> None:
        self.page = page
        self._doorbells = Block("i8", _COUNT)
        self._open = Block("i8", GROUPS)
        self._signal = signal_record()
        self.state = Block(MONITOR)
        self.worker = Worker(name, monitor_run, self.state.address, keep=self)
        for field, value in {
            "control": self.worker.control.address,
            "page": page.address,
            "doorbells": self._doorbells.address,
            "open": self._open.address,
            "signal": self._signal.address,
            "period": FASTEST_NS,
        }.items():
            self.state[field] = value
        self.worker.start()

    def watch(self, number: int, doorbell: int) -> None:
        """Ring this eventfd for that number from now on."""
        self._doorbells.array[number] = doorbell
        self._open.array[number // BITS_PER_GROUP] |= 1 << number % BITS_PER_GROUP
        self.worker.wake()

    def unwatch(self, number: int) -> None:
        """No more; when this returns neither the eventfd nor the bit is touched."""
        with self.worker.paused():
            self._open.array[number // BITS_PER_GROUP] &= ~(1 << number % BITS_PER_GROUP)

    def stop(self) -> None:
        """End the thread: it touches the page and the doorbells no more. Raises WaitTimeout when it does not end. Harmless twice."""
        self.worker.stop()
