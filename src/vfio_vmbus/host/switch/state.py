"""What the switch and its ports keep in private memory: records of int64, which kernels and Python both see."""

from __future__ import annotations

import numpy as np

from ...memory.access import viewer

TAP = 1
"""Frames to and from a descriptor that gives and takes one frame a call: a TAP device, or a datagram socket."""
GENERATOR = 2
"""Gives frames made of templates, takes and counts what is sent to their source addresses."""
SINK = 3
"""Takes and counts."""
REPLAY = 4
"""Gives the frames of a capture file, takes and counts."""
CAPTURE = 5
"""Gets a copy of every frame that the switch forwards; no frame is addressed to it."""
NIC = 6
"""A VMBus network card: the data plane of its VSP."""

MAX_PORTS = 64
HEADER = 14
"""Bytes of an Ethernet header, and so of the shortest frame."""
MAX_FRAME = 9216
"""Bytes of the longest frame by default: MTU 9000, header, VLAN tags, and some slack, as switches have it."""

FLOOD = -1
"""Target of a frame for all ports but its own. What follows are targets of frames that go nowhere."""
TOO_SHORT = -2
TOO_LONG = -3
SPOOFED = -4
FILTERED = -5

PORT = np.dtype(
    [
        ("kind", "i8"),
        ("enabled", "i8"),
        ("state", "i8"),  # address of the kind's own record; of a NIC, what its VSP's kernels get
        ("fd", "i8"),
        ("bound", "i8"),  # the only source address that it may send from, or 0: any
        ("max_frame", "i8"),  # bytes of the longest frame that it may send or get
        ("retry_at", "i8"),  # after an error, no system calls until then (ns of the switch's clock)
        ("last_error", "i8"),  # errno of the last failed system call
        ("rx_frames", "i8"),  # all that came in from this port, also what was dropped then
        ("rx_bytes", "i8"),
        ("tx_frames", "i8"),  # all that was given to this port
        ("tx_bytes", "i8"),
        ("no_room", "i8"),  # for this port, which could not take them
        ("too_long", "i8"),  # from or for this port, longer than max_frame
        ("too_short", "i8"),  # from this port, shorter than a header
        ("spoofed", "i8"),  # from this port, whose source address was not its own
        ("filtered", "i8"),  # from this port: its target is there, too, or an address that no switch forwards
        ("errors", "i8"),  # system calls that failed, other than for want of frames or room
    ]
)
"""A port. Only the worker writes its counters, so reading them at any time is fine."""

ENTRY = np.dtype(
    [
        ("mac", "i8"),  # as `mac_value` numbers it; 0: empty
        ("port", "i8"),
        ("seen", "i8"),  # when it was last a source (ns of the switch's clock), or STATIC
    ]
)
"""One address of the forwarding database."""

STATIC = 1 << 62
"""In place of a time: an entry that neither ages nor moves."""
WAYS = 8
"""Entries that one hash value can have; a ninth address pushes out the one not seen for longest, so no flood of addresses
makes a lookup slow."""
BUCKETS = 512
AGE_NS = 300 * 1_000_000_000
"""How long an address is remembered after its last frame (IEEE 802.1D's default)."""

SWITCH = np.dtype(
    [
        ("control", "i8"),  # address of the worker's CONTROL
        ("ports", "i8"),  # address of MAX_PORTS ports
        ("count", "i8"),  # ports up to the last one in use
        ("captures", "i8"),  # how many of them are captures
        ("paced", "i8"),  # how many of them need the clock in every round
        ("frames", "i8"),  # address of the table of BURST frames
        ("fdb", "i8"),  # address of BUCKETS * WAYS entries
        ("age_ns", "i8"),
        ("now", "i8"),  # CLOCK_MONOTONIC in ns when it was last read
        ("rounds", "i8"),
        ("evicted", "i8"),  # addresses forgotten before their time, for want of room
    ]
)
"""A switch."""

PORT_SIZE = PORT.itemsize
ENTRY_SIZE = ENTRY.itemsize

switch_at = viewer(SWITCH)
port_at = viewer(PORT)
entry_at = viewer(ENTRY)
