"""How an application's kernel waits: look for a while, let the host interrupt, look once more, sleep."""

from __future__ import annotations

from typing import Any

from ..dataplane.worker import control_at, scratch_of, sleep
from ..drivers.netvsc.receive import queue_at
from ..memory.access import inline, pause
from ..memory.libc import clock_ns, sys_yield
from ..ring.primitives import in_mask, in_ready, ring_at

LOOKS = 16
"""Empty rounds between two looks at the clock."""


@inline
def needs_python(queue: int) -> bool:
    """Is there something in the queue that a kernel does not deal with: a control message, a broken ring?"""
    state = queue_at(queue)
    return state.attention != 0 or state.mail_put != state.mail_taken


@inline
def idle_round(control: int, queue: int, empty: int, since: int) -> Any:
    """After a round that found nothing, the `empty`-th in a row since `since` ns: sleep if it is time. The new (empty, since)."""
    pause()
    if empty % LOOKS == 0:
        sys_yield()  # who is to bring work may be waiting for this very core
        now = clock_ns(scratch_of(control))
        if empty == 0:
            since = now
        elif now - since >= control_at(control).spin_ns:
            ring = ring_at(queue_at(queue).incoming)
            in_mask(ring, 0)
            if not in_ready(ring):
                sleep(control, 1000)
            in_mask(ring, 1)
            return 0, since
    return empty + 1, since
