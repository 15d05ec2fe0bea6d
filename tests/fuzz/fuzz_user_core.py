"""Fuzz targets: whatever stream a vfio-user client sends, each command that wants an answer gets exactly one, in order, and every
descriptor comes back.

`fuzz_user_core(data)`: a byte says how much comes in one piece (0: the rest) and, by its top bit, whether descriptors are with it. The
server has asked the client for memory before: each question is answered once, by the client or by its end.
`fuzz_user_core_quick(data)`: the short way of single accesses to regions says and does the same as the long way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace

from tests.vfio.user_rig import Answer, Rig, rig
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.user.core import Send
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire

IOVA = 1 << 32

SEEDS = [
    b"\x80" + wire.encode_request(1, wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=4096).pack()),
    b"\x00" + wire.encode_request(1, wire.DMA_UNMAP, wire.DmaUnmap(iova=IOVA, size=4096).pack()),
    b"\x00" + wire.encode_request(2, wire.DMA_UNMAP, wire.DmaUnmap(flags=wire.UNMAP_ALL).pack()),
    b"\x00" + wire.encode_request(3, wire.DEVICE_SET_IRQS, vfio.IrqSet(flags=0x21, index=2, count=3).pack()),
    b"\x80" + wire.encode_request(3, wire.DEVICE_SET_IRQS, vfio.IrqSet(flags=0x24, index=2, count=1).pack()),
    b"\x00" + wire.encode_request(4, wire.REGION_READ, wire.RegionAccess(region=7, count=64).pack()),
    b"\x00" + wire.encode_request(5, wire.REGION_WRITE, wire.RegionAccess(offset=0x24, count=4).pack() + b"\1\0\0\0"),
    b"\x00" + wire.encode_request(6, wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096).pack()),
    b"\x00"
    + wire.encode_reply(wire.Header(message_id=1, command=wire.DMA_READ), wire.DmaAccess(iova=IOVA, count=8).pack() + bytes(8)),
    b"\x00" + wire.encode_error(wire.Header(message_id=2, command=wire.DMA_WRITE), 19),
    b"\x00" + wire.encode_request(9, wire.DMA_MAP, wire.DmaMap(flags=1, iova=2 * IOVA, size=4096).pack()),
    b"\x07" + wire.encode_request(7, wire.DEVICE_RESET) + b"\x00" + wire.encode_request(8, wire.DEVICE_RESET),
]


def fuzz_user_core(data: bytes) -> None:
    """Answers go with commands one to one, errors are errnos, and no descriptor is left (the rig looks)."""
    with rig() as made:
        asked = [
            made.core.ask(number, wire.DmaAccess(iova=IOVA, count=8).pack())[0] for number in (wire.DMA_READ, wire.DMA_WRITE)
        ]
        stream, answers = b"", []
        fds = [eventfd.make()]
        try:
            at = 0
            while at < len(data):
                size = data[at] & 0x7F or len(data)
                piece = data[at + 1 : at + 1 + size]
                at += 1 + size
                if piece and not made.core.closed:
                    stream += piece
                    answers += made.feed(piece, fds if data[at - 1 - size] & 0x80 else ())
        finally:
            for fd in fds:
                os.close(fd)
        expected, ended = commands(stream, made.core.max_size)
        assert [(answer.message_id, answer.number) for answer in answers] == expected
        assert ended == made.core.closed
        assert all(answer.errno == 0 or answer.errno in errno.errorcode for answer in answers)
        made.carry_out(made.core.end())
        assert sorted(number for number, _ in made.told) == asked


def fuzz_user_core_quick(data: bytes) -> None:
    """Answers, refusals and the device are the same; a message that is whole and alone is one or the other."""
    with rig() as one:
        slow = outcome(one, one.feed(data) if data else [])
    with rig() as other:
        answers: list[Answer] = []
        for message in messages(data, other.core.max_size):
            reply = other.core.quick(message)
            if reply is None:
                answers += other.feed(message)
            elif reply:
                answers += other.carry_out([Send(reply)])
        assert outcome(other, answers) == slow


def outcome(made: Rig, answers: list[Answer]) -> object:
    registers = [made.function.read(offset, 8) for offset in range(0, 0x48, 8)]
    said = [(replace(answer, fds=()), len(answer.fds)) for answer in answers]
    return said, list(map(str, made.core.refusals)), made.core.closed, registers, made.function.windows[7].read(0, 256)


def messages(stream: bytes, max_size: int) -> Iterator[bytes]:
    """Cut where messages end, up to one whose size cannot be believed or that is not complete."""
    while stream:
        size = int.from_bytes(stream[4:8], "little")
        if len(stream) < 16 or not 16 <= size <= max_size:
            size = len(stream)
        yield stream[:size]
        stream = stream[size:]


def commands(stream: bytes, max_size: int) -> tuple[list[tuple[int, int]], bool]:
    """The commands of a stream that are answered, and whether it ends by one whose size cannot be believed."""
    found: list[tuple[int, int]] = []
    while len(stream) >= 16:
        number, command = int.from_bytes(stream[0:2], "little"), int.from_bytes(stream[2:4], "little")
        size, flags = int.from_bytes(stream[4:8], "little"), stream[8]
        plausible = 16 <= size <= max_size
        if plausible and len(stream) < size:
            break
        if flags & 0xF != 1 and not flags & 0x10:
            found.append((number, command))
        if not plausible:
            return found, True
        stream = stream[size:]
    return found, False
