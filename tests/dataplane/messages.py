"""RNDIS data messages as wire/ reads them, and as the kernel does: they must agree."""

from __future__ import annotations

import numpy as np

from tests.dataplane import kernels
from vfio_vmbus.dataplane.rndis import MESSAGE_RULES, PARSED
from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.memory.block import Block
from vfio_vmbus.wire.frame import PPI_CHECKSUM, PPI_VLAN, parse_packet
from vfio_vmbus.wire.rndis import PacketMessage

LONGEST = 1518


def oracle(data: bytes, longest: int) -> tuple[bytes, int, int] | None:
    """Frame, checksum word and VLAN word (-1 where there is none) of the message at the beginning of `data`; None: refused.

    What kernels want beyond the parser: information in whole 4-byte words, and frames of a length that can be.
    """
    try:
        head = PacketMessage.unpack(data)
        if head.ppi_length == 0:  # wherever nothing is said to lie
            data = data[:28] + bytes(4) + data[32:]
        elif head.ppi_offset == 0 or head.ppi_offset % 4 or head.ppi_length % 4:
            return None
        frame = parse_packet(data)
    except ProtocolError:
        return None
    if not 14 <= len(frame.data) <= longest:
        return None
    found = {PPI_CHECKSUM: -1, PPI_VLAN: -1}
    for info in frame.infos:
        if info.number in found and not info.internal and len(info.data) >= 4:
            found[info.number] = int.from_bytes(info.data[:4], "little")
    return frame.data, found[PPI_CHECKSUM], found[PPI_VLAN]


def parse(data: bytes, at: int = 0, longest: int = LONGEST) -> tuple[int, tuple[int, bytes, int, int] | None]:
    """The kernel on memory of exactly that size: the rule broken; or the next message's place, frame, checksum, VLAN."""
    memory = Block("u1", len(data))
    memory.array[:] = np.frombuffer(data, np.uint8)
    out = Block(PARSED)
    rule = kernels.parse_message(out.address, memory.address, at, len(data), longest)
    if rule:
        return rule, None
    start = out["address"] - memory.address
    return 0, (out["next"], data[start : start + out["size"]], out["checksum"], out["vlan"])


def agree(data: bytes, at: int = 0) -> None:
    expected = oracle(data[at:], LONGEST)
    rule, found = parse(data, at)
    assert (expected is None) == (rule in MESSAGE_RULES)
    if expected is not None and found is not None:
        length = PacketMessage.unpack(data, at).message_length
        assert found == (at + length, *expected)
