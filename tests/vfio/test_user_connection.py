"""A vfio-user client on a real socket: descriptors cross it, what the client does not read waits, and its end leaves nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.vfio.user_rig import GREETING
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.function import PciFunction
from vfio_vmbus.vfio.user.connection import ServerLimits, UserConnection
from vfio_vmbus.vfio.user.device import FunctionDevice
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire

IOVA = 1 << 32
MAX_UNSENT = ServerLimits().max_unsent
PATIENCE = 20.0


class Client:
    """The client's end, in a thread of its own: plain blocking calls."""

    def __init__(self, sock: socket.socket, connection: UserConnection, function: PciFunction, memory: SharedMemory) -> None:
        self.sock = sock
        self.connection = connection
        self.function = function
        self.memory = memory

    def send(self, number: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.sock, [wire.encode_request(1, number, payload)], list(fds))

    def exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece
            data += piece
        return bytes(data)

    def answer(self) -> tuple[int, bytes]:
        """Errno and payload."""
        header = wire.parse_header(self.exactly(16), 1 << 20)
        return header.error, self.exactly(header.message_size - 16)

    def ask(self, number: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> tuple[int, bytes]:
        self.send(number, payload, fds)
        return self.answer()

    def greet(self) -> None:
        self.sock.sendall(GREETING)
        assert self.answer()[0] == 0


def served(client: Callable[[Client], None]) -> list[str]:
    """Serve what `client` does, until it returns and its socket is closed. Why the connection ended: once, and nothing is left."""
    reasons: list[str] = []

    async def main(function: PciFunction, memory: SharedMemory) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.settimeout(PATIENCE)
        over = asyncio.Event()

        def ended(reason: str) -> None:
            reasons.append(reason)
            over.set()

        connection = UserConnection(ours, lambda client: FunctionDevice(function), ended)
        with theirs:
            await loop.run_in_executor(None, client, Client(theirs, connection, function, memory))
        await asyncio.wait_for(over.wait(), PATIENCE)

    with nothing_left(objects=False), SharedMemory(8 * PAGE) as memory:
        function = PciFunction("function")
        try:
            asyncio.run(main(function, memory))
            assert function.domain.maps == ()
        finally:
            function.close()
    assert len(reasons) == 1
    return reasons


@contextmanager
def event() -> Iterator[int]:
    fd = eventfd.make()
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_client_greets_maps_and_is_interrupted() -> None:
    def client(me: Client) -> None:
        me.greet()
        assert me.ask(wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=8 * PAGE).pack(), (me.memory.fd,)) == (0, b"")
        with event() as mine:
            value = vfio.IrqSet(flags=0x24, index=2, count=1).pack()
            assert me.ask(wire.DEVICE_SET_IRQS, value, (mine,)) == (0, b"")
            assert me.ask(wire.DEVICE_SET_IRQS, vfio.IrqSet(flags=0x21, index=2, count=1).pack()) == (0, b"")
            assert eventfd.take(mine)
        head = wire.RegionAccess(region=7, count=4).pack()
        assert me.ask(wire.REGION_READ, head) == (0, head + bytes.fromhex("14145642"))

    assert served(client) == ["the client has closed the connection"]


def test_a_doorbell_crosses_the_socket() -> None:
    def client(me: Client) -> None:
        me.greet()
        me.send(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096).pack())
        data, fds, _, _ = socket.recv_fds(me.sock, 65536, 64)
        assert len(data) == 16 + 16 + 40 * len(fds)
        os.eventfd_write(fds[3], 1)
        for fd in fds:
            os.close(fd)
        assert eventfd.take(me.function.doorbell(3))

    served(client)


def flood(me: Client, count: int) -> threading.Thread:
    """Send `count` reads of the configuration space, and read no answer, until the server takes no more."""
    requests = b"".join(
        wire.encode_request(n & 0xFFFF, wire.REGION_READ, wire.RegionAccess(region=7, count=256).pack()) for n in range(count)
    )

    def send() -> None:
        with suppress(OSError):  # some clients die before all of it is sent
            me.sock.sendall(requests)

    sender = threading.Thread(target=send)
    sender.start()
    deadline = time.monotonic() + PATIENCE
    while me.connection.unsent < MAX_UNSENT:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return sender


def test_a_client_that_does_not_read_is_not_read_from_and_misses_nothing() -> None:
    count = 4 * MAX_UNSENT // 288

    def client(me: Client) -> None:
        me.greet()
        sender = flood(me, count)
        assert me.connection.unsent < 2 * MAX_UNSENT
        answers = me.exactly(288 * count)
        sender.join()
        assert [answers[at] | answers[at + 1] << 8 for at in range(0, len(answers), 288)] == [n & 0xFFFF for n in range(count)]

    served(client)


def test_a_client_that_dies_without_reading_leaves_nothing() -> None:
    def client(me: Client) -> None:
        me.greet()
        sender = flood(me, 4 * MAX_UNSENT // 288)
        me.sock.shutdown(socket.SHUT_RDWR)
        sender.join()

    assert len(served(client)) == 1


def test_a_client_that_dies_in_the_middle_leaves_nothing() -> None:
    def client(me: Client) -> None:
        me.greet()
        assert me.ask(wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=PAGE).pack(), (me.memory.fd,)) == (0, b"")
        message = wire.encode_request(1, wire.DMA_MAP, wire.DmaMap(flags=3, iova=2 * IOVA, size=PAGE).pack())
        socket.send_fds(me.sock, [message[:20]], [me.memory.fd] * 5)

    served(client)


def test_as_many_descriptors_as_linux_passes_are_all_closed() -> None:
    def client(me: Client) -> None:
        me.greet()
        for number in (wire.DEVICE_RESET, wire.DMA_MAP, 99):
            code, _ = me.ask(number, wire.DmaMap(flags=3, iova=IOVA, size=PAGE).pack(), (me.memory.fd,) * 253)
            assert code == 22
        assert me.ask(wire.DEVICE_RESET) == (0, b"")

    served(client)


def test_who_breaks_the_protocol_hears_why_and_is_closed() -> None:
    def client(me: Client) -> None:
        me.sock.sendall(struct.pack("<HHIII", 1, 9, 7, 0, 0))
        assert me.answer() == (22, b"")
        assert me.sock.recv(1) == b""

    (reason,) = served(client)
    assert reason == f"message size 7 bytes, need 16 to {(1 << 20) + 32}"
