"""Kernels that look addresses up, and a worker's loop that never stops doing so."""

from __future__ import annotations

import numpy as np

from vfio_vmbus.dataplane.worker import attention
from vfio_vmbus.iommu import translation
from vfio_vmbus.memory.access import load64, viewer
from vfio_vmbus.memory.kernel import kernel

PAGE = 4096

LOOKER = np.dtype(
    [
        ("control", "i8"),
        ("domain", "i8"),
        ("base", "i8"),
        ("pages", "i8"),
        ("hits", "i8"),
        ("misses", "i8"),
        ("wrong", "i8"),
        ("refusals", "i8"),  # how many more requests to have refused, each of another size
        ("refused", "i8"),
    ]
)
looker_at = viewer(LOOKER)


@kernel("i8(i8, i8, i8, i8)")
def look(domain: int, iova: int, size: int, access: int) -> int:
    """The lookup alone: an address, or minus the reason."""
    return translation.lookup(domain, iova, size, access)


@kernel("i8(i8, i8, i8, i8)")
def translate(domain: int, iova: int, size: int, access: int) -> int:
    """The lookup that counts faults: an address, or 0."""
    return translation.translate(domain, iova, size, access)


@kernel("void(i8)")
def look_on(address: int) -> None:
    """Look all pages up, again and again; each page that is mapped begins with its own number."""
    state = looker_at(address)
    step = 0
    while attention(state.control) == 0:
        page = (step * 7) % state.pages
        step += 1
        found = translation.lookup(state.domain, state.base + page * PAGE, PAGE, translation.READ)
        if found < 0:
            state.misses += 1
        else:
            state.hits += 1
            if load64(found) != page or load64(found + PAGE - 8) != page:
                state.wrong += 1
        if state.refusals > 0:
            state.refusals -= 1
            state.refused += 1
            translation.translate(state.domain, state.refused * PAGE, state.refused, translation.WRITE)
