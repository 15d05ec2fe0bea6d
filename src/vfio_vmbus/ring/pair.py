"""Both rings of a channel, laid out as in its GPADL: guest-to-host first, host-to-guest behind it.

Each is one control page and its data pages. The second one begins at the "downstream page" that the open message names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from ..errors import UsageError
from ..memory.mapping import PAGE, Mapping, Piece, window
from ..memory.shared import SharedMemory, side_by_side
from ..wire.table import Side
from .ends import IncomingRing, OutgoingRing
from .primitives import FEAT_PENDING_SEND_SZ, FEATURE_BITS

_MINIMUM = 2 * PAGE
_FEATURES = struct.pack("<I", FEAT_PENDING_SEND_SZ)


class RingPair:
    """One side's two ends, `outgoing` and `incoming`, over pieces of sealed memory.

    pieces: both rings, side by side. downstream: bytes of the guest-to-host ring, control page included, which is
    the offset of the other one. doorbell: eventfd that signals the other side, or -1. `close` unmaps both.
    Raises UsageError for sizes that are no rings, DmaError for memory that is not sealed or too short, RingError for
    indices in the control pages that cannot be.
    """

    def __init__(self, pieces: Sequence[Piece], downstream: int, side: Side, doorbell: int = -1, name: str = "channel") -> None:
        total = sum(piece.size for piece in pieces)
        for size in (downstream, total - downstream):
            if size < _MINIMUM or size % PAGE:
                raise UsageError(
                    f"{name}: a ring of {size} bytes; it is a control page and one data page or more, {_MINIMUM} bytes at least"
                )
        with ExitStack() as stack:
            mappings = [
                stack.enter_context(side_by_side(part, wrap_from=PAGE))
                for part in (window(pieces, 0, downstream), window(pieces, downstream, total - downstream))
            ]
            self._take(mappings, side, doorbell, name)
            stack.pop_all()

    @classmethod
    def over(cls, upstream: Mapping, downstream: Mapping, side: Side, doorbell: int = -1, name: str = "channel") -> RingPair:
        """A pair of rings that are mapped already, each with wrap_from=4096; the guest-to-host ring first.

        The mappings are the pair's from then on; when this raises, which it does for rings that cannot be, they are the caller's.
        """
        pair = cls.__new__(cls)
        pair._take([upstream, downstream], side, doorbell, name)
        return pair

    def _take(self, mappings: list[Mapping], side: Side, doorbell: int, name: str) -> None:
        for mapping in mappings:
            mapping.write(FEATURE_BITS, _FEATURES)  # each side says that it knows pending_send_sz
        out, back = mappings if side is Side.GUEST else mappings[::-1]
        self.outgoing = OutgoingRing(out, doorbell, f"{name}, outgoing ring")
        self.incoming = IncomingRing(back, doorbell, f"{name}, incoming ring")
        self._mappings = mappings

    @classmethod
    def fresh(
        cls,
        memory: SharedMemory,
        offset: int,
        downstream: int,
        size: int,
        doorbell: int = -1,
        name: str = "channel",
        side: Side = Side.GUEST,
    ) -> RingPair:
        """Lay a new pair of `size` bytes out at `offset` of shared memory, control pages cleared.

        That is what a guest opens a channel with.
        """
        pieces = [Piece(memory.fd, offset, size)]
        with memory.map(offset, size) as mapping:
            for control in (0, downstream):
                mapping.write(control, bytes(PAGE))
        return cls(pieces, downstream, side, doorbell, name)

    def lead_to(self, doorbell: int) -> None:
        """Signal another eventfd from now on; -1: none."""
        self.outgoing.lead_to(doorbell)
        self.incoming.lead_to(doorbell)

    def close(self) -> None:
        """Unmap both rings. Whoever runs kernels on them stops them first."""
        for mapping in self._mappings:
            mapping.close()

    def __enter__(self) -> RingPair:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
