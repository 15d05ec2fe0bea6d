"""Fuzz target of the kernel that takes RNDIS data messages apart, with wire/ as its oracle.

With NUMBA_DISABLE_JIT=1 an access outside of the message raises at once.
"""

from tests.dataplane.messages import agree
from vfio_vmbus.wire.frame import PPI_CHECKSUM, PPI_VLAN, Frame, PacketInfo, encode_packet

_INFOS = (PacketInfo.word(PPI_CHECKSUM, 5), PacketInfo.word(PPI_VLAN, 0x50), PacketInfo(3, b"abc\0", internal=True))

SEEDS = [b"", encode_packet(Frame(bytes(60))), encode_packet(Frame(bytes(range(100)), _INFOS), align=8)]


def fuzz_messages(data: bytes) -> None:
    """Whatever the bytes, the kernel accepts what the parser accepts, with the same frame and information, and stays inside of them."""
    agree(data)
