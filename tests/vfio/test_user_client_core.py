"""The vfio-user client's core without a socket: the stream in any pieces, descriptors and whose they are, and the server's own commands."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_user_client import SEEDS, fuzz_user_client
from vfio_vmbus.errors import DmaError, IsolationFault
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.user.client_core import MAX_DATA, Action, Answer, Broken, ClientCore, Discard, Reply
from vfio_vmbus.vfio.user.client_memory import ClientMemory
from vfio_vmbus.wire import vfio_user as wire

IOVA = 1 << 32


@pytest.fixture
def memory() -> Iterator[ClientMemory]:
    """Four pages at IOVA, for both directions, reading, writing, and (behind a gap) both."""
    with nothing_left(objects=False), SharedMemory(4 * PAGE) as mine:
        made = ClientMemory("device")
        for place, access in ((0, 3), (1, 1), (2, 2)):
            made.add(IOVA + place * PAGE, PAGE, mine.fd, place * PAGE, access)
        made.add(IOVA + 4 * PAGE, PAGE, mine.fd, 3 * PAGE, 3)
        yield made
        made.clear()


@pytest.fixture
def core(memory: ClientMemory) -> ClientCore:
    return ClientCore(memory)


def ask(core: ClientCore, number: int = wire.DEVICE_RESET) -> wire.Header:
    return wire.Header.unpack(core.ask(number))


def command(number: int, payload: bytes = b"", *, no_reply: bool = False) -> bytes:
    return wire.encode_request(9, number, payload, no_reply=no_reply)


def access(number: int, iova: int, count: int, data: bytes = b"") -> bytes:
    return command(number, wire.DmaAccess(iova=iova, count=count).pack() + data)


def errors(actions: Sequence[Action]) -> list[int]:
    """The errnos of the answers, which is all that there is."""
    assert all(isinstance(action, Answer) for action in actions)
    return [wire.Header.unpack(action.data).error for action in actions if isinstance(action, Answer)]


def test_a_reply_in_any_two_pieces(core: ClientCore) -> None:
    for cut in range(45):
        reply = wire.encode_reply(ask(core, wire.REGION_READ), bytes(range(28)))
        assert len(reply) == 44
        actions = core.receive(reply[:cut], [5]) if cut else []
        assert actions == ([] if cut < 44 else [Reply(0, bytes(range(28)), (5,))])
        if cut < 44:
            last = core.receive(reply[cut:], [6])
            assert last == [Reply(0, bytes(range(28)), (5, 6) if cut else (6,))]
        assert not core.partial


def test_descriptors_belong_to_the_last_message_that_begins_in_a_piece(core: ClientCore) -> None:
    stray = wire.encode_reply(wire.Header(message_id=999, command=13))
    asked = ask(core)
    reply = wire.encode_reply(asked)
    assert core.receive(stray + reply, [5]) == [Reply(0, b"", (5,))]
    assert core.stray_replies == 1
    asked = ask(core)
    reply = wire.encode_reply(asked, bytes(4))
    assert core.receive(stray + reply[:3], [5]) == []
    assert core.receive(reply[3:] + stray, [6]) == [Reply(0, bytes(4), (5,)), Discard((6,))]
    assert core.stray_fds == 1
    assert core.receive(stray[:4], [7]) == []
    assert core.end() == [Discard((7,))]
    assert core.end() == []


def test_descriptors_that_were_lost_are_told(core: ClientCore) -> None:
    reply = wire.encode_reply(ask(core))
    core.receive(reply[:1], lost=True)
    assert core.receive(reply[1:], [3]) == [Reply(0, b"", (3,), lost=True)]
    assert core.receive(wire.encode_reply(ask(core))) == [Reply(0, b"")]


def test_the_same_reply_twice_is_one(core: ClientCore) -> None:
    reply = wire.encode_reply(ask(core))
    assert core.receive(reply * 3) == [Reply(0, b"")]
    assert core.stray_replies == 2


def test_message_numbers_go_round(core: ClientCore) -> None:
    numbers = [ask(core).message_id for _ in range(1 << 16)]
    assert len(set(numbers)) == 1 << 16
    assert core.receive(wire.encode_reply(ask(core))) == [Reply(0, b"")]


@pytest.mark.parametrize("size", [0, 1, 15, MAX_DATA + 33, 0xFFFFFFFF])
def test_a_size_that_cannot_be_is_the_end_and_its_descriptors_come_back(core: ClientCore, size: int) -> None:
    ask(core)
    header = wire.Header(message_size=size, flags=wire.HeaderFlags(1)).pack()
    assert core.receive(header[:2], [4]) == []
    discard, broken = core.receive(header[2:], [5])
    assert discard == Discard((4, 5))
    assert isinstance(broken, Broken)
    assert f"message size {size} bytes" in str(broken.error)


def test_memory_is_read_and_written(core: ClientCore) -> None:
    (answer,) = core.receive(access(wire.DMA_WRITE, IOVA + PAGE - 2, 2, b"xy"))
    assert isinstance(answer, Answer)
    assert answer.data[16:] == wire.DmaAccess(iova=IOVA + PAGE - 2, count=2).pack()
    (answer,) = core.receive(access(wire.DMA_READ, IOVA + PAGE - 3, 5))
    assert isinstance(answer, Answer)
    assert answer.data[32:] == b"\0xy\0\0"
    (answer,) = core.receive(access(wire.DMA_READ, IOVA, 0))
    assert isinstance(answer, Answer)
    assert answer.data[16:] == wire.DmaAccess(iova=IOVA).pack()
    assert errors(core.receive(access(wire.DMA_WRITE, 5, 0))) == [0]  # how a server finds out what layout the client has


@pytest.mark.parametrize(
    ("number", "iova", "count"),
    [
        (wire.DMA_READ, 0, 1),
        (wire.DMA_READ, IOVA - 1, 2),
        (wire.DMA_READ, IOVA + 2 * PAGE - 1, 2),  # the next page cannot be read
        (wire.DMA_READ, IOVA + 3 * PAGE - 1, 1),
        (wire.DMA_READ, IOVA + 3 * PAGE, 1),
        (wire.DMA_READ, IOVA + 4 * PAGE, PAGE + 1),
        (wire.DMA_READ, (1 << 64) - 1, 2),
        (wire.DMA_WRITE, IOVA + PAGE - 1, 2),  # the next page cannot be written
        (wire.DMA_WRITE, IOVA + 3 * PAGE - 1, 2),
        (wire.DMA_WRITE, (1 << 64) - 1, 2),
    ],
)
def test_memory_that_is_not_mapped_for_it(core: ClientCore, number: int, iova: int, count: int) -> None:
    data = b"\xff" * count if number == wire.DMA_WRITE else b""
    assert errors(core.receive(access(number, iova, count, data))) == [errno.EFAULT]
    (answer,) = core.receive(access(wire.DMA_READ, IOVA, 2 * PAGE))
    assert isinstance(answer, Answer)
    assert answer.data[32:] == bytes(2 * PAGE)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (command(wire.DMA_READ), errno.EINVAL),
        (command(wire.DMA_READ, bytes(15)), errno.EINVAL),
        (command(wire.DMA_READ, bytes(17)), errno.EINVAL),
        (access(wire.DMA_READ, IOVA, MAX_DATA + 1), errno.EINVAL),
        (access(wire.DMA_READ, IOVA, (1 << 64) - 1), errno.EINVAL),
        (access(wire.DMA_WRITE, IOVA, 4, b"abc"), errno.EINVAL),
        (access(wire.DMA_WRITE, IOVA, 2, b"abc"), errno.EINVAL),
        (command(wire.VERSION, bytes(4)), errno.ENOSYS),
        (command(wire.DEVICE_RESET), errno.ENOSYS),
        (command(0), errno.ENOSYS),
        (command(14), errno.ENOSYS),
        (command(0xFFFF, bytes(100)), errno.ENOSYS),
    ],
)
def test_commands_that_cannot_be(core: ClientCore, message: bytes, code: int) -> None:
    assert errors(core.receive(message)) == [code]
    assert core.receive(wire.encode_reply(ask(core))) == [Reply(0, b"")]


def test_who_wants_no_reply_gets_none(core: ClientCore) -> None:
    for number, payload in ((wire.DMA_WRITE, wire.DmaAccess(iova=IOVA, count=1).pack() + b"z"), (wire.DMA_READ, b""), (77, b"")):
        assert core.receive(command(number, payload, no_reply=True), [8]) == [Discard((8,))]
    (answer,) = core.receive(access(wire.DMA_READ, IOVA, 1))
    assert isinstance(answer, Answer)
    assert answer.data[-1:] == b"z"


def test_memory_sealed_against_writing_is_not_written(core: ClientCore, memory: ClientMemory) -> None:
    import fcntl
    import os

    fd = os.memfd_create("constant", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    memory.add(2 * IOVA, PAGE, fd, 0, 3)
    os.close(fd)
    assert errors(core.receive(access(wire.DMA_WRITE, 2 * IOVA, 1, b"z"))) == [errno.EFAULT]


def test_maps_are_found_and_never_split(memory: ClientMemory) -> None:
    assert [entry.iova for entry in memory.within(IOVA, 8 * PAGE)] == [IOVA + place * PAGE for place in (0, 1, 2, 4)]
    assert memory.within(IOVA + 3 * PAGE, PAGE) == []
    assert memory.within(0, IOVA) == []
    with SharedMemory(4 * PAGE) as mine:
        memory.add(4 * IOVA, 4 * PAGE, mine.fd, 0, 3)
        for first, pages in ((0, 1), (1, 2), (3, 1), (-1, 2), (3, 9)):
            with pytest.raises(DmaError, match="would split"):
                memory.within(4 * IOVA + first * PAGE, pages * PAGE)
            with pytest.raises(DmaError, match="overlaps"):
                memory.add(4 * IOVA + first * PAGE, pages * PAGE, mine.fd, 0, 3)
        with pytest.raises(DmaError, match="cannot be used"):
            memory.add(8 * IOVA, PAGE, 1 << 20, 0, 3)
    with pytest.raises(IsolationFault, match="not mapped for this direction"):
        memory.write(IOVA + PAGE, b"x")


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.tuples(st.sampled_from(SEEDS), st.integers(0, 60), st.binary(max_size=6)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
)
def test_the_fuzz_target_for_a_moment(data: bytes) -> None:
    fuzz_user_client(data)


def test_the_fuzz_target_takes_its_seeds() -> None:
    for seed in SEEDS:
        fuzz_user_client(seed)
