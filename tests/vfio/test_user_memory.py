"""A client's memory as a served device reaches it: mapped, in a file, or at the client's, which may say anything."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.vfio.raw_client import PATIENCE, Home, Message, RawClient
from vfio_vmbus.errors import ClosedError, IsolationFault, ProtocolError, RefusedError, WaitTimeout
from vfio_vmbus.iommu.domain import Domain
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing import edu
from vfio_vmbus.testing.edu import BUFFER_AT, BUFFER_SIZE, Edu, serving_edu
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.user.connection import ServerLimits, UserConnection
from vfio_vmbus.vfio.user.memory import CHUNK, ClientMemory
from vfio_vmbus.wire import vfio_user as wire
from vfio_vmbus.wire.vfio_user_version import Capabilities, encode_version

IOVA = 1 << 32
PATTERN = bytes(range(256)) * (BUFFER_SIZE // 256)


def asking(
    client: Callable[[RawClient], None],
    call: Callable[[ClientMemory], Coroutine[Any, Any, object]],
    *,
    prepare: Callable[[Domain], None] = lambda domain: domain.map_unmapped(IOVA, 1 << 20, READ | WRITE),
    seconds: float = PATIENCE,
) -> object:
    """What `call` returns or raises of a memory whose client, in a thread, greets and then does as `client`."""

    async def main() -> object:
        ours, theirs = socket.socketpair()
        over = asyncio.Event()
        devices: list[Edu] = []

        def claim(link: Any) -> Edu:
            devices.append(Edu(link))
            return devices[-1]

        connection = UserConnection(ours, claim, lambda reason: over.set(), limits=ServerLimits(answer_seconds=seconds))
        with RawClient(theirs, greeting=b"") as raw:

            def begin() -> None:
                hello = encode_version(wire.Version(), Capabilities(max_msg_fds=16, max_data_xfer_size=1 << 18))
                assert raw.ask(wire.VERSION, hello)[0] == 0

            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, begin)
            domain = Domain("client")
            prepare(domain)
            other = loop.run_in_executor(None, client, raw)
            try:
                return await call(ClientMemory(domain, connection))
            finally:
                await other
                connection.close()
                await over.wait()
                domain.close()

    with nothing_left(objects=False):
        return asyncio.run(main())


def test_large_copies_are_made_in_pieces() -> None:
    home = Home(IOVA, os.urandom(1 << 20))
    before = bytes(home.data)

    def client(me: RawClient) -> None:
        for _ in range(1 + 3 + 3):
            me.sock.sendall(home.answer(me.message()))

    async def call(memory: ClientMemory) -> bytes:
        data = await memory.read(IOVA + 8, 300_000)
        await memory.write(IOVA + 500_000, data)
        return data

    assert asking(client, call) == before[8:300_008]
    assert home.data[500_000:800_000] == before[8:300_008]
    pieces = [CHUNK, CHUNK, 300_000 - 2 * CHUNK]
    assert [count for _, _, count in home.asked] == [0, *pieces, *pieces]
    assert max(count for _, _, count in home.asked) <= 1 << 17


Lie = Callable[[Message], bytes]


def _head(**changes: int) -> Callable[[Message], bytes]:
    """A true answer but for some fields of the header."""

    def lie(message: Message) -> bytes:
        body = message.payload[:16] + bytes(8)
        values = {"message_id": message.header.message_id, "command": message.header.command, "message_size": 16 + len(body)}
        return wire.Header(**{**values, **changes}, flags=wire.HeaderFlags(1)).pack() + body

    return lie


LIES: dict[str, tuple[Lie, type[Exception]]] = {
    "another command": (_head(command=wire.DMA_WRITE), ProtocolError),
    "too short": (lambda m: wire.encode_reply(m.header, m.payload[:16] + bytes(7)), ProtocolError),
    "too long": (lambda m: wire.encode_reply(m.header, m.payload[:16] + bytes(9)), ProtocolError),
    "a header only": (lambda m: wire.encode_reply(m.header), ProtocolError),
    "another address": (
        lambda m: wire.encode_reply(m.header, wire.DmaAccess(iova=IOVA + 1, count=8).pack() + bytes(8)),
        ProtocolError,
    ),
    "another count": (lambda m: wire.encode_reply(m.header, wire.DmaAccess(iova=IOVA, count=4).pack() + bytes(4)), ProtocolError),
    "an error": (lambda m: wire.encode_error(m.header, errno.ENODEV), RefusedError),
    "an error without a number": (
        lambda m: wire.Header(message_id=m.header.message_id, command=m.header.command, flags=wire.HeaderFlags(0x21)).pack(),
        RefusedError,
    ),
    "an error with a body": (
        lambda m: (
            wire.Header(
                message_id=m.header.message_id, command=m.header.command, message_size=40, flags=wire.HeaderFlags(0x21), error=5
            ).pack()
            + bytes(24)
        ),
        RefusedError,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_not_what_was_asked_for_is_a_typed_error_and_the_stream_goes_on(lie: str) -> None:
    home = Home(IOVA, bytes(8))
    tell, kind = LIES[lie]

    def client(me: RawClient) -> None:
        me.sock.sendall(home.answer(me.message()))
        me.sock.sendall(tell(me.message()))
        me.sock.sendall(home.answer(me.message()))

    async def call(memory: ClientMemory) -> bytes:
        with pytest.raises(kind):
            await memory.read(IOVA, 8)
        return await memory.read(IOVA, 8)

    assert asking(client, call) == bytes(8)


def test_an_answer_to_nothing_is_counted_and_a_late_one_is_such() -> None:
    home = Home(IOVA, bytes(8))

    def client(me: RawClient) -> None:
        stray = wire.Header(message_id=999, command=wire.DMA_READ, message_size=16, flags=wire.HeaderFlags(1)).pack()
        me.sock.sendall(stray + home.answer(me.message()))
        late = me.message()
        me.sock.sendall(home.answer(me.message()))  # to the second question, after the first was given up
        me.sock.sendall(home.answer(late))
        me.sock.sendall(home.answer(me.message()))

    async def call(memory: ClientMemory) -> int:
        await memory._layout_at(IOVA)
        connection: Any = memory._client
        memory_ = ClientMemory(memory.domain, connection)
        memory_._layout = memory._layout
        question = asyncio.ensure_future(memory.read(IOVA, 8))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        question.cancel()
        await asyncio.wait([question])
        await memory_.read(IOVA, 8)
        await memory_.read(IOVA, 8)
        return int(connection.core.unasked_replies)

    assert asking(client, call) == 2


def test_no_answer_in_time_is_an_error() -> None:
    async def call(memory: ClientMemory) -> None:
        with pytest.raises(WaitTimeout, match="to answer command 12"):
            await memory.read(IOVA, 8)

    asking(lambda me: None, call, seconds=0.05)


def test_a_client_that_goes_answers_nobody() -> None:
    def client(me: RawClient) -> None:
        me.message()
        me.sock.shutdown(socket.SHUT_RDWR)

    async def call(memory: ClientMemory) -> None:
        with pytest.raises(ClosedError):
            await memory.read(IOVA, 8)
        with pytest.raises(ClosedError):
            await memory.write(IOVA, bytes(8))

    asking(client, call)


def test_a_client_without_a_handler_for_empty_writes_is_believed_to_keep_to_the_specification() -> None:
    home = Home(IOVA, b"12345678")

    def client(me: RawClient) -> None:
        for _ in range(2):
            me.sock.sendall(wire.encode_error(me.message().header, errno.EINVAL))
            me.sock.sendall(home.answer(me.message()))

    async def call(memory: ClientMemory) -> bytes:
        return await memory.read(IOVA, 4) + await memory.read(IOVA + 4, 4)

    assert asking(client, call) == b"12345678"


def test_one_copy_goes_over_all_kinds_of_memory(tmp_path: Path) -> None:
    home = Home(IOVA + 2 * PAGE, b"c" * PAGE)
    with SharedMemory(PAGE) as memory, memory.map() as mapping, open(tmp_path / "file", "wb+") as file:
        file.write(b"b" * PAGE)
        file.flush()
        mapping.write(0, b"a" * PAGE)

        def prepare(domain: Domain) -> None:
            domain.map(IOVA, memory.fd, 0, PAGE, READ | WRITE)
            domain.map_unmapped(IOVA + PAGE, PAGE, READ | WRITE, file.fileno())
            domain.map_unmapped(IOVA + 2 * PAGE, PAGE, READ | WRITE)

        def client(me: RawClient) -> None:
            for _ in range(3):
                me.sock.sendall(home.answer(me.message()))

        async def call(memory: ClientMemory) -> bytes:
            data = await memory.read(IOVA, 3 * PAGE)
            await memory.write(IOVA, data[::-1])
            for iova, size in ((IOVA - 1, 2), (IOVA + 3 * PAGE, 1 << 62)):
                with pytest.raises(IsolationFault, match="not mapped"):
                    await memory.read(iova, size)
            return data

        assert asking(client, call, prepare=prepare) == b"a" * PAGE + b"b" * PAGE + b"c" * PAGE
        assert mapping.read(0, PAGE) == b"c" * PAGE
        assert os.pread(file.fileno(), PAGE, 0) == b"b" * PAGE
        assert bytes(home.data) == b"a" * PAGE


def test_a_file_that_was_cut_off_is_a_fault_and_is_not_made_longer(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        file.write(bytes(2 * PAGE))
        file.flush()

        def prepare(domain: Domain) -> None:
            domain.map_unmapped(IOVA, 2 * PAGE, READ | WRITE, file.fileno())

        async def call(memory: ClientMemory) -> list[str]:
            os.ftruncate(file.fileno(), PAGE)
            assert await memory.read(IOVA, PAGE) == bytes(PAGE)
            for size in (PAGE + 1, 2 * PAGE):
                with pytest.raises(IsolationFault, match="file"):
                    await memory.read(IOVA, size)
                with pytest.raises(IsolationFault, match="file"):
                    await memory.write(IOVA, bytes(size))
            with pytest.raises(IsolationFault, match="file"):
                await memory.write(IOVA + PAGE, b"x")
            return [fault.reason for fault in memory.domain.faults()]

        assert len(asking(lambda me: None, call, prepare=prepare)) == 5  # type: ignore[arg-type]
        assert os.fstat(file.fileno()).st_size == PAGE


# The same by a device, `edu`.


@pytest.mark.parametrize("old", [False, True], ids=["as specified", "as QEMU 10.1"])
def test_edu_copies_from_and_to_memory_that_is_at_home(tmp_path: Path, old: bool) -> None:
    home = Home(IOVA, PATTERN + bytes(PAGE), old=old)
    with nothing_left(objects=False), serving_edu(tmp_path / "edu"), RawClient(tmp_path / "edu") as me:
        me.serve = home.answer
        assert me.map(IOVA, 2 * PAGE) == 0
        me.copy(IOVA, BUFFER_AT, BUFFER_SIZE, 0)
        me.copy(BUFFER_AT + 100, IOVA + PAGE, 1000, edu.DMA_FROM_DEVICE)
        assert home.data[PAGE:] == PATTERN[100:1100] + bytes(PAGE - 1000)
        assert home.asked == [("DMA_WRITE", IOVA, 0), ("DMA_READ", IOVA, BUFFER_SIZE), ("DMA_WRITE", IOVA + PAGE, 1000)]


def _unsealed() -> int:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 2 * PAGE)
    return fd


def _sealed() -> int:
    with SharedMemory(2 * PAGE) as memory:
        return os.dup(memory.fd)


def _regular(folder: Path) -> int:
    fd = os.open(folder / "memory", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 2 * PAGE)
    return fd


@pytest.mark.parametrize("kind", ["sealed", "unsealed", "regular"])
def test_edu_copies_from_and_to_files(tmp_path: Path, kind: str) -> None:
    fd = {"sealed": _sealed, "unsealed": _unsealed, "regular": lambda: _regular(tmp_path)}[kind]()
    os.pwrite(fd, PATTERN, 0)
    with nothing_left(objects=False), serving_edu(tmp_path / "edu"), RawClient(tmp_path / "edu") as me:
        assert me.map(IOVA, 2 * PAGE, fd) == 0
        me.copy(IOVA, BUFFER_AT, BUFFER_SIZE, 0)
        me.copy(BUFFER_AT, IOVA + PAGE, BUFFER_SIZE, edu.DMA_FROM_DEVICE)
        if kind == "unsealed":
            os.ftruncate(fd, 0)  # whoever had mapped it would be dead now
            me.copy(IOVA, BUFFER_AT, BUFFER_SIZE, 0)
            me.copy(BUFFER_AT, IOVA, BUFFER_SIZE, edu.DMA_FROM_DEVICE)
            assert os.fstat(fd).st_size == 0
        else:
            assert os.pread(fd, PAGE, PAGE) == PATTERN
        assert me.read(0, 0, 4) == edu.ID
    os.close(fd)
