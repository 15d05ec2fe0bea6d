"""The process that the NIC's benches measure: `python -m benchmarks.nic.child isolated|open|across`.

It answers each line "WHAT SIZE SECONDS" of its standard input with two numbers: million frames a second, and the part of the time that
its threads had their cores to themselves. WHAT is one of

- `tx`: driver to host to a sink, counted there; `gpa-direct`: the same, every frame in a GPA-direct packet;
- `rx`: generator to host to driver, counted by the driver;
- `python`: from a generator through a loop in Python and back to the generator, counted there.

"across" has the host in a process of its own, to which it talks by vfio-user. "open" takes the isolation away from this one process:
addresses in GPA-direct packets are used after an addition, unchecked.
"""

from __future__ import annotations

import sys

from vfio_vmbus.iommu import translation
from vfio_vmbus.memory.access import inline, load64

_DELTA_AT: int = translation.DOMAIN.fields["hint"][1]  # type: ignore[index]  # a field that look-ups alone use


@inline
def _unchecked(domain: int, iova: int, size: int, access: int) -> int:
    """In place of `translate`: `rig` has put there what lies between IOVAs of the driver's pool and their addresses here."""
    return iova + load64(domain + _DELTA_AT)


def main(mode: str) -> None:
    if mode == "open":
        translation.translate = _unchecked
    from benchmarks.nic.rig import Rig  # compiles all kernels, so not before

    with Rig(mode) as rig:
        for line in sys.stdin:
            what, size, seconds = line.split()
            print(*rig.measure(what, int(size), float(seconds)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
