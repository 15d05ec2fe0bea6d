"""What one end of a ring keeps in private memory. Nothing in here can be written by the other side."""

from __future__ import annotations

import numpy as np

RING = np.dtype(
    [
        ("control", "i8"),  # address of the control page
        ("data", "i8"),  # address of the data area, which is mapped twice in a row
        ("size", "i8"),  # bytes of the data area
        ("index", "i8"),  # own index: where the next packet is written (outgoing) or read (incoming)
        ("shown", "i8"),  # own index as the other side can see it
        ("room", "i8"),  # bytes free (outgoing) or readable (incoming) when the other side's index was last looked at
        ("packets", "i8"),
        ("bytes", "i8"),  # shown or given back, descriptors and footers included
        # up to here one cache line: what every packet touches
        ("broken", "i8"),  # 0, or the first rule that the other side broke: BAD_*
        ("bad_value", "i8"),  # the value that broke it
        ("bad_limit", "i8"),  # what it had to stay below, or within
        ("doorbell", "i8"),  # eventfd that signals the other side, or -1, or the number of a memory.bell
        ("signals", "i8"),  # how often it was signalled
        ("full", "i8"),  # outgoing: how often a packet found no room
        ("signal", "i8"),  # address of a record for memory.signal
    ]
)
"""One end of one ring; all int64 so that a kernel and Python see the same numbers."""

BAD_INDEX = 1
"""The other side's index is outside the data area, or not a multiple of 8."""
BAD_LENGTH = 2
"""A packet's length is shorter than its header, or longer than what is readable."""
BAD_OFFSET = 3
"""A packet's data offset is inside its header or behind its end."""
BAD_MOVE = 4
"""The other side's index moved backwards, or past what there was to read or free."""

RULES = {
    BAD_INDEX: "index outside the data area or not a multiple of 8",
    BAD_LENGTH: "packet shorter than its header or longer than what the ring holds",
    BAD_OFFSET: "packet's data offset outside the packet",
    BAD_MOVE: "index moved backwards or past what there was",
}
