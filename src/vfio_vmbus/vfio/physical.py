"""DMA where nothing translates: an IOVA is a physical address of this machine, and the device reaches all of them, mapped or not.

Unsafe: whoever uses it has asked the policy before. `iommu.physical.PhysicalBuffer` is memory whose addresses are known.
"""

from __future__ import annotations

from contextlib import ExitStack

from ..errors import DmaError
from ..memory.mapping import PAGE, Piece
from ..memory.pinned import hold
from ..memory.shared import side_by_side


def hold_at(iova: int, piece: Piece, stack: ExitStack) -> None:
    """Keep a piece of a file in place until `stack` is closed. Raises DmaError unless its physical address is `iova`."""
    with ExitStack() as held:
        _, frames = hold(held.enter_context(side_by_side([piece])), held)
        first = iova // PAGE
        for number, frame in enumerate(frames):
            if frame != first + number:
                raise DmaError(
                    f"nothing translates for this device: byte {number * PAGE} of this memory is at {frame * PAGE:#x}, not at "
                    f"{(first + number) * PAGE:#x}: map a PhysicalBuffer at its own iova"
                )
        stack.push(held.pop_all())
