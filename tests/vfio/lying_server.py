"""A vfio-user server for tests of the client: truthful, except for the commands that a test has it answer in its own way."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.user.client import UserDevice
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire
from vfio_vmbus.wire.vfio_user_version import Capabilities, encode_version

PATIENCE = 60.0
BAR_SIZE = 4 * PAGE
VECTORS = 4
MAPPED = 1
"""The region with a file: two pages of it may be mapped."""
BELLS = (0x1000, 0x1004)
BIG = 4096

HONEST = Capabilities(max_msg_fds=8, max_data_xfer_size=BIG)


@dataclass
class Asked:
    """A command of the client's."""

    header: wire.Header
    payload: bytes
    fds: list[int]

    def reply(self, payload: bytes = b"") -> bytes:
        return wire.encode_reply(self.header, payload)

    def error(self, code: int, body: bytes = b"") -> bytes:
        """An error reply, with a body as some servers send it."""
        reply = bytearray(wire.encode_error(self.header, code) + body)
        reply[4:8] = len(reply).to_bytes(4, "little")
        return bytes(reply)


Lie = Callable[["LyingServer", Asked], None]


@dataclass
class LyingServer:
    """One client on `sock`, served by a thread. lies: by command. told: what it was asked, by command."""

    sock: socket.socket
    memory: SharedMemory
    bell: int
    capabilities: Capabilities = HONEST
    lies: dict[int, Lie] = field(default_factory=dict)
    told: list[Asked] = field(default_factory=list)

    def run(self) -> None:
        with suppress(OSError):  # the client has gone
            while asked := self.receive():
                self.told.append(asked)
                lie = self.lies.get(asked.header.command)
                if lie:
                    lie(self, asked)
                else:
                    self.answer(asked)
        self.sock.close()

    def receive(self) -> Asked | None:
        """The next message, or None when there will be none."""
        data = b""
        fds: list[int] = []
        while len(data) < 16 or len(data) < int.from_bytes(data[4:8], "little"):
            want = 16 if len(data) < 16 else int.from_bytes(data[4:8], "little")
            piece, control, _, _ = self.sock.recvmsg(want - len(data), socket.CMSG_SPACE(1024))
            for _, _, raw in control:
                fds += array.array("i", raw)
            if not piece:
                return None
            data += piece
        for fd in fds:
            os.close(fd)
        return Asked(wire.Header.unpack(data), data[16:], fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.sock, [data], list(fds))

    def ask(self, number: int, payload: bytes, message_id: int = 7, *, no_reply: bool = False) -> None:
        """A command of the server's own."""
        self.send(wire.encode_request(message_id, number, payload, no_reply=no_reply))

    def answer(self, asked: Asked) -> None:
        """The truth."""
        payload, fds = self.truth(asked)
        self.send(asked.reply(payload), fds)

    def truth(self, asked: Asked) -> tuple[bytes, Sequence[int]]:
        match asked.header.command:
            case wire.VERSION:
                return encode_version(wire.Version(), self.capabilities), ()
            case wire.DEVICE_GET_INFO:
                return wire.DeviceInfo(flags=3, region_count=9, irq_count=5).pack(), ()
            case wire.DEVICE_GET_REGION_INFO:
                return self.region(vfio.RegionInfo.unpack(asked.payload).index)
            case wire.DEVICE_GET_REGION_IO_FDS:
                return io_fds(BELLS), (self.bell,)
            case wire.DEVICE_GET_IRQ_INFO:
                index = vfio.IrqInfo.unpack(asked.payload).index
                return vfio.IrqInfo(flags=vfio.IRQ_EVENTFD | vfio.IRQ_MASKABLE, index=index, count=VECTORS).pack(), ()
            case wire.REGION_READ:
                value = wire.RegionAccess.unpack(asked.payload)
                return value.pack() + pattern(value.offset, value.count), ()
            case wire.REGION_WRITE:
                return asked.payload[:16], ()
            case wire.DMA_UNMAP:
                return asked.payload, ()
        return b"", ()

    def region(self, index: int) -> tuple[bytes, Sequence[int]]:
        if index != MAPPED:
            return vfio.RegionInfo(flags=3, index=index, size=BAR_SIZE).pack(), ()
        return region_info([(0, PAGE), (2 * PAGE, PAGE)]), (self.memory.fd,)


def pattern(offset: int, count: int) -> bytes:
    """What regions read as."""
    return bytes((offset + at) & 0xFF for at in range(count))


def region_info(areas: Sequence[tuple[int, int]], *, size: int = BAR_SIZE, base: int = 0) -> bytes:
    """The info of the region that may be mapped, with these areas."""
    rows = tuple(vfio.SparseArea(offset=offset, size=length) for offset, length in areas)
    sparse = vfio.SparseMmap(area_count=len(rows), areas=rows).pack()
    need = vfio.RegionInfo.SIZE + len(sparse)
    return vfio.RegionInfo(argsz=need, flags=0xF, index=MAPPED, cap_offset=32, size=size, offset=base).pack() + sparse


def io_fds(offsets: Sequence[int], *, index: int = 0, extra: bytes = b"") -> bytes:
    """The table of registers with an eventfd, all the same one; `extra` behind each entry, as libvfio-user has it."""
    rows = b"".join(wire.SubRegion(offset=offset, size=4).pack() + extra for offset in offsets)
    return wire.RegionIoFds(argsz=16 + len(rows), index=index, count=len(offsets)).pack() + rows


@contextmanager
def lying(
    lies: dict[int, Lie] | None = None, capabilities: Capabilities | None = None
) -> Iterator[tuple[socket.socket, LyingServer]]:
    """The client's end, and the server. Afterwards neither has left anything."""
    with nothing_left(objects=False), ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        memory = stack.enter_context(SharedMemory(BAR_SIZE))
        bell = eventfd.make()
        stack.callback(os.close, bell)
        server = LyingServer(theirs, memory, bell, lies=lies or {})
        if capabilities is not None:
            server.capabilities = capabilities
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(_hang_up, ours)
        yield ours, server


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # the client has closed it
        sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def lied_to(
    lies: dict[int, Lie] | None = None, capabilities: Capabilities | None = None
) -> Iterator[tuple[UserDevice, LyingServer]]:
    """A device of such a server. Once it is there, VERSION and DEVICE_GET_INFO have been answered."""
    with lying(lies, capabilities) as (sock, server), UserDevice(sock, timeout=PATIENCE) as device:
        yield device, server
