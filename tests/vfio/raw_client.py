"""A vfio-user client of plain blocking calls, to do what no well-behaved client does; and what such a client may answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.vfio.user_rig import GREETING
from vfio_vmbus.testing import edu
from vfio_vmbus.wire import vfio_user as wire

PATIENCE = 30.0


@dataclass(frozen=True)
class Message:
    header: wire.Header
    payload: bytes


class RawClient:
    """serve: answers the server's own commands, with the bytes of a reply, while `ask` waits for one."""

    def __init__(self, where: str | Path | socket.socket, *, greeting: bytes = GREETING) -> None:
        if isinstance(where, socket.socket):
            self.sock = where
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(os.fspath(where))
        self.sock.settimeout(PATIENCE)
        self.serve: Callable[[Message], bytes] | None = None
        if greeting:
            self.sock.sendall(greeting)
            self.greeted = self.answer()

    def exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError(f"{len(data)} bytes of {size}")
            data += piece
        return bytes(data)

    def message(self) -> Message:
        header = wire.parse_header(self.exactly(16), 1 << 26)
        return Message(header, self.exactly(header.message_size - 16))

    def answer(self) -> tuple[int, bytes]:
        """Errno and payload of the next reply."""
        while True:
            got = self.message()
            if got.header.flags.kind == wire.KIND_REPLY:
                return got.header.error, got.payload
            assert self.serve is not None, got
            self.sock.sendall(self.serve(got))

    def send(self, number: int, payload: bytes = b"", fds: tuple[int, ...] = (), *, no_reply: bool = False) -> None:
        socket.send_fds(self.sock, [wire.encode_request(7, number, payload, no_reply=no_reply)], list(fds))

    def ask(self, number: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> tuple[int, bytes]:
        self.send(number, payload, fds)
        return self.answer()

    def ended(self) -> bool:
        """Has the server closed the connection, after whatever it had to say?"""
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True

    def map(self, iova: int, size: int, fd: int | None = None, *, offset: int = 0, access: int = 3) -> int:
        value = wire.DmaMap(flags=access, iova=iova, size=size, offset=offset)
        return self.ask(wire.DMA_MAP, value.pack(), () if fd is None else (fd,))[0]

    def unmap(self, iova: int, size: int) -> int:
        return self.ask(wire.DMA_UNMAP, wire.DmaUnmap(iova=iova, size=size).pack())[0]

    def read(self, region: int, offset: int, size: int) -> int:
        head = wire.RegionAccess(region=region, offset=offset, count=size).pack()
        code, payload = self.ask(wire.REGION_READ, head)
        assert (code, payload[:16]) == (0, head)
        return int.from_bytes(payload[16:], "little")

    def write(self, region: int, offset: int, value: int, size: int = 4) -> None:
        head = wire.RegionAccess(region=region, offset=offset, count=size).pack()
        assert self.ask(wire.REGION_WRITE, head + value.to_bytes(size, "little")) == (0, head)

    def copy(self, source: int, target: int, size: int, command: int) -> None:
        """Have an `edu` copy, and wait until it is over."""
        for register, value in ((edu.REG_DMA_SOURCE, source), (edu.REG_DMA_TARGET, target), (edu.REG_DMA_COUNT, size)):
            self.write(0, register, value, 8)
        self.write(0, edu.REG_DMA_COMMAND, command | edu.DMA_START)
        while self.read(0, edu.REG_DMA_COMMAND, 4) & edu.DMA_START:
            pass

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


class Home:
    """Memory that only its client can read and write: `data` at `iova`; `answer` serves the server's commands. old: as QEMU 10.1 does."""

    def __init__(self, iova: int, data: bytes, *, old: bool = False) -> None:
        self.iova = iova
        self.data = bytearray(data)
        self.old = old
        self.asked: list[tuple[str, int, int]] = []

    def answer(self, message: Message) -> bytes:
        header, payload = message.header, message.payload
        kind = wire.OldDmaAccess if self.old else wire.DmaAccess
        access = kind.unpack(payload)
        name = wire.COMMANDS[header.command].name
        self.asked.append((name, access.iova, access.count))
        at = access.iova - self.iova
        if not 0 <= at <= at + access.count <= len(self.data):
            return wire.encode_error(header, 19)
        if header.command == wire.DMA_READ:
            body = access.pack() + self.data[at : at + access.count]
            return wire.encode_reply(header, body.ljust(16 + access.count, b"\0"))
        assert len(payload) == 16 + access.count
        self.data[at : at + access.count] = payload[kind.SIZE : kind.SIZE + access.count]
        return wire.encode_reply(header, b"" if self.old else access.pack())
