"""What the driver knows of one queue (a channel), in private memory that its kernels and its Python share."""

from __future__ import annotations

import numpy as np

from ...wire.frame import TxChecksum

DONE_SLOTS = 512
"""Receive transfers whose frames the application may still hold, and whose completions are due at its next call."""
MAIL_SLOTS = 16
MAIL_SLOT = 2048
"""RNDIS control messages that came between frames wait here for Python; longer or more ones are dropped and counted."""

QUEUE = np.dtype(
    [
        ("incoming", "i8"),  # address of the host-to-guest RING
        ("outgoing", "i8"),  # address of the guest-to-host RING
        ("longest", "i8"),  # bytes of the longest frame, Ethernet header included
        ("receive", "i8"),  # the receive buffer: address and bytes
        ("receive_size", "i8"),
        ("resume", "i8"),  # ranges of the transfer at the ring's head that were handed out already
        ("done", "i8"),  # address of the table of transfers to complete, and its height
        ("done_count", "i8"),
        ("send", "i8"),  # the send buffer: address, section size and count
        ("send_section", "i8"),
        ("send_sections", "i8"),
        ("max_messages", "i8"),  # RNDIS messages in one transfer that the host takes
        ("align", "i8"),  # each message begins on a multiple of this
        ("pool", "i8"),  # frames too long for a section: address, IOVA, slot size and count
        ("pool_iova", "i8"),
        ("pool_slot", "i8"),
        ("pool_slots", "i8"),
        ("free", "i8"),  # address of the stack of free send sections, and its height
        ("free_count", "i8"),
        ("pool_free", "i8"),  # the same for slots of the pool
        ("pool_free_count", "i8"),
        ("busy", "i8"),  # address of a table: for each section, then each slot, 1 while the host has it
        ("open", "i8"),  # section that is being filled, or -1; bytes and messages in it
        ("used", "i8"),
        ("messages", "i8"),
        ("slot", "i8"),  # slot that is being filled, or -1
        ("mail", "i8"),  # address of MAIL_SLOTS messages; how many were put and taken
        ("mail_put", "i8"),
        ("mail_taken", "i8"),
        ("mail_lost", "i8"),
        ("attention", "i8"),  # 1: the packet at the ring's head is for Python (or the ring is broken)
        ("parsed", "i8"),  # address of a PARSED record
        ("tx_frames", "i8"),
        ("tx_bytes", "i8"),
        ("tx_failed", "i8"),  # transfers that the host completed with a failure
        ("tx_too_long", "i8"),
        ("rx_frames", "i8"),
        ("rx_bytes", "i8"),
        ("rx_bad_ranges", "i8"),  # ranges outside the receive buffer, or not a transfer of it
        ("rx_bad_messages", "i8"),  # RNDIS messages that contradict themselves
        ("bad_completions", "i8"),  # completions of what was not sent
        ("last_rule", "i8"),
    ]
)

FRAME = np.dtype([("address", "i8"), ("size", "i8"), ("flags", "i8"), ("checksum", "i8")])
"""One frame of a burst. Sending: flags unused, `checksum` is CHECKSUM_* wishes or 0. Receiving: `flags` says what the host checked."""

CHECKSUM_IPV4 = TxChecksum.is_ipv4.mask
CHECKSUM_IPV6 = TxChecksum.is_ipv6.mask
CHECKSUM_TCP = TxChecksum.tcp_checksum.mask
CHECKSUM_UDP = TxChecksum.udp_checksum.mask
CHECKSUM_IP_HEADER = TxChecksum.ip_header_checksum.mask
"""Wishes for a frame to send (NDIS_TCP_IP_CHECKSUM_PACKET_INFO, transmit); the L4 header's offset goes into bits 16 and up."""

GOOD_IP_CHECKSUM = 1
GOOD_L4_CHECKSUM = 2
BAD_IP_CHECKSUM = 4
BAD_L4_CHECKSUM = 8
