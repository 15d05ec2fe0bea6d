"""`ClientMemory`: a vfio-user client's memory as a served device reaches it, whatever it is behind a map: memory that is mapped here, a
file, or only the client itself, which is asked by DMA_READ and DMA_WRITE.

For devices that copy. Rings and buffers that kernels work on need memory that is mapped (`Domain.translate`, `Domain.pieces`).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Iterator
from enum import Enum
from typing import Final

from ...errors import ProtocolError, RefusedError
from ...iommu.domain import DmaMap, Domain
from ...iommu.translation import FILE_FAILED, READ, WRITE
from ...wire import vfio_user as wire
from .connection import Client

CHUNK: Final = 1 << 17
"""Bytes that are copied at once. QEMU's reply to a DMA_READ of more than some 200 KiB breaks its stream."""
_OLD_PADDING: Final = bytes(4)


class _Layout(Enum):
    """How a client lays DMA_READ and DMA_WRITE out: as the specification says, or as QEMU 10.1 and 10.2."""

    STANDARD = 0
    OLD = 1


class ClientMemory:
    """What is in `domain`, of the client that is asked for what is not here. On the connection's loop only.

    `read` and `write` raise IsolationFault for what is not mapped, not for this direction, or in a file that ends before (counted in the
    domain); RefusedError with the client's errno, ProtocolError and WaitTimeout for its answers; ClosedError when it has gone. Then a
    part may have been written.
    """

    def __init__(self, domain: Domain, client: Client) -> None:
        self.domain = domain
        self._client = client
        self._layout: _Layout | None = None

    async def read(self, iova: int, size: int) -> bytes:
        """A copy of [iova, iova + size), across neighbouring maps."""
        parts = []
        for at, count in _chunks(iova, size):
            parts.append(await self._read(at, count))
        return b"".join(parts)

    async def write(self, iova: int, data: bytes) -> None:
        """Store `data` at `iova`, across neighbouring maps."""
        for at, count in _chunks(iova, len(data)):
            await self._write(at, data[at - iova : at - iova + count])

    async def _read(self, iova: int, size: int) -> bytes:
        parts = []
        while size:
            entry = self.domain.find(iova, size, READ)
            count = min(size, entry.end - iova)
            parts.append(await self._read_within(entry, iova, count))
            iova += count
            size -= count
        await asyncio.sleep(0)  # others get their turn
        return b"".join(parts)

    async def _write(self, iova: int, data: bytes) -> None:
        while data:
            entry = self.domain.find(iova, len(data), WRITE)
            count = min(len(data), entry.end - iova)
            await self._write_within(entry, iova, data[:count])
            iova += count
            data = data[count:]
        await asyncio.sleep(0)

    async def _read_within(self, entry: DmaMap, iova: int, size: int) -> bytes:
        at = iova - entry.iova
        if entry.address:
            return ctypes.string_at(entry.address + at, size)
        if entry.window is None:
            return await self._ask_to_read(iova, size)
        try:
            data = os.pread(entry.fd, size, entry.offset + at)
        except OSError:
            data = b""
        if len(data) < size:
            raise self.domain.fault(iova, size, READ, FILE_FAILED)
        return data

    async def _write_within(self, entry: DmaMap, iova: int, data: bytes) -> None:
        at = iova - entry.iova
        if entry.address:
            ctypes.memmove(entry.address + at, data, len(data))
        elif entry.window is None:
            await self._ask_to_write(iova, data)
        elif not _store(entry.fd, entry.offset + at, data):
            raise self.domain.fault(iova, len(data), WRITE, FILE_FAILED)

    async def _ask_to_read(self, iova: int, size: int) -> bytes:
        parts = []
        for at, count in _chunks(iova, size, self._client.max_data):
            layout = await self._layout_at(at)
            payload = await self._client.ask(wire.DMA_READ, wire.DmaAccess(iova=at, count=count).pack())
            if layout is _Layout.OLD:
                said: wire.DmaAccess | wire.OldDmaAccess = wire.OldDmaAccess.unpack(payload)
                data = payload[said.SIZE : said.SIZE + count]
                if len(payload) != wire.DmaAccess.SIZE + count:
                    raise ProtocolError(f"reply to DMA_READ: {len(payload)} bytes, need {wire.DmaAccess.SIZE + count}")
            else:
                said, data = wire.parse_reply(wire.DMA_READ, payload)
            _check("DMA_READ", said, at, count)
            parts.append(data)
        return b"".join(parts)

    async def _ask_to_write(self, iova: int, data: bytes) -> None:
        for at, count in _chunks(iova, len(data), self._client.max_data):
            piece = data[at - iova : at - iova + count]
            if await self._layout_at(at) is _Layout.OLD:
                request = wire.OldDmaAccess(iova=at, count=count).pack() + piece + _OLD_PADDING
                if await self._client.ask(wire.DMA_WRITE, request):
                    raise ProtocolError("reply to DMA_WRITE: there is something behind the header")
            else:
                answer = await self._client.ask(wire.DMA_WRITE, wire.DmaAccess(iova=at, count=count).pack() + piece)
                _check("DMA_WRITE", wire.parse_reply(wire.DMA_WRITE, answer)[0], at, count)

    async def _layout_at(self, iova: int) -> _Layout:
        """Which layout the client has, found out by writing nothing there: the answer's size tells. A refusal leaves it open."""
        if self._layout is None:
            try:
                answer = await self._client.ask(wire.DMA_WRITE, wire.DmaAccess(iova=iova).pack())
            except RefusedError:
                return _Layout.STANDARD
            if answer:
                _check("DMA_WRITE", wire.parse_reply(wire.DMA_WRITE, answer)[0], iova, 0)
            self._layout = _Layout.STANDARD if answer else _Layout.OLD
        return self._layout


def _chunks(iova: int, size: int, most: int = CHUNK) -> Iterator[tuple[int, int]]:
    most = min(most, CHUNK)
    for at in range(iova, iova + size, most):
        yield at, min(most, iova + size - at)


def _check(name: str, said: wire.DmaAccess | wire.OldDmaAccess, iova: int, count: int) -> None:
    if (said.iova, said.count) != (iova, count):
        raise ProtocolError(f"reply to {name}: of {said.count} bytes at {said.iova:#x}, asked for {count} at {iova:#x}")


def _store(fd: int, offset: int, data: bytes) -> bool:
    """Write into a file, which is not made longer by that."""
    try:
        return offset + len(data) <= os.fstat(fd).st_size and os.pwrite(fd, data, offset) == len(data)
    except OSError:
        return False
