"""What the host knows of one netvsp channel, in private memory that its kernels and its control plane share."""

from __future__ import annotations

import numpy as np

MAX_PENDING = 256
"""Completions that may wait for room in the ring; while they do, nothing more is read."""
MAX_PAGES = 64
"""Page ranges of one GPA-direct packet that are looked at together; a packet with more fails."""
MAX_TAKEN = 512
"""Packets of one guest that are looked at in a row; then others get their turn, and the worker's owner."""
MAX_MESSAGES = 64
"""RNDIS messages in one transfer that a guest may be promised."""
STAGE_SLOTS = 128
STAGE_SLOT = 16384
"""Messages that lie scattered, or are changed on their way, are put together in slots of this many bytes."""

WORKER = 0
CONTROL = 1

NIC = np.dtype(
    [
        ("owner", "i8"),  # WORKER or CONTROL: who may touch the ring from the guest just now
        ("ready", "i8"),  # 1 once both buffers are there and RNDIS is initialised: data may flow
        ("full", "i8"),  # 1 while so many of the control plane's answers wait for room that it takes nothing more
        ("link", "i8"),  # 1 while the virtual cable is plugged in
        ("incoming", "i8"),  # address of the guest-to-host RING
        ("outgoing", "i8"),  # address of the host-to-guest RING
        ("domain", "i8"),  # address of the client's DOMAIN
        ("control_fd", "i8"),  # eventfd that calls the control plane
        ("scratch", "i8"),
        ("longest", "i8"),  # bytes of the longest frame, Ethernet header included
        ("max_messages", "i8"),  # RNDIS messages in one transfer, as promised to the guest
        ("filter", "i8"),  # NDIS packet filter
        ("mac_low", "i8"),  # the card's address as 48 bits in memory order
        ("receive", "i8"),  # the receive buffer (a GPADL): address, section size and count
        ("receive_section", "i8"),
        ("receive_sections", "i8"),
        ("free", "i8"),  # address of the stack of free receive sections, and its height
        ("free_count", "i8"),
        ("chain", "i8"),  # address of a table: for each section the next one of its transfer, or -1
        ("head", "i8"),  # address of a table: for each section 1 if an outstanding transfer starts there
        ("send", "i8"),  # the send buffer: address, section size and count
        ("send_section", "i8"),
        ("send_sections", "i8"),
        ("pending", "i8"),  # address of the table of completions to send (transaction, status), and its height
        ("pending_count", "i8"),
        ("stage", "i8"),  # address of the staging slots, and how many of this burst are used
        ("staged", "i8"),
        ("pages", "i8"),  # address of scratch for MAX_PAGES (address, size) pairs
        ("parsed", "i8"),  # address of a PARSED record
        ("sent_frames", "i8"),  # from the guest
        ("sent_bytes", "i8"),
        ("received_frames", "i8"),  # to the guest
        ("received_bytes", "i8"),
        ("no_buffer", "i8"),  # frames lost because the guest gave no receive section back
        ("filtered", "i8"),
        ("unplugged", "i8"),  # frames that the guest sent while the virtual cable was out
        ("bad_sections", "i8"),  # transfers with a section that does not exist
        ("bad_messages", "i8"),  # transfers with RNDIS messages that contradict themselves
        ("bad_ranges", "i8"),  # GPA-direct packets whose ranges contradict themselves
        ("bad_completions", "i8"),  # completions of transfers that are not outstanding
        ("faults", "i8"),  # transfers refused by the domain
        ("last_rule", "i8"),
    ]
)

PAIR = np.dtype([("first", "i8"), ("second", "i8")])
"""Two numbers: an address and a size, or a transaction and a status."""
