"""Fuzz target: whatever stream a vfio-user server sends, each command of its own that wants an answer gets exactly one, in order, the
reply that is awaited comes at most once, and every descriptor comes back once.

`fuzz_user_client(data)`: a byte says how much comes in one piece (0: the rest) and, by its top bit, whether a descriptor is with it.
"""

from __future__ import annotations

from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.vfio.user.client_core import MAX_MESSAGE, Answer, Broken, ClientCore, Discard, Reply
from vfio_vmbus.vfio.user.client_memory import ClientMemory
from vfio_vmbus.wire import vfio_user as wire

IOVA = 1 << 32

_READ = wire.encode_request(3, wire.DMA_READ, wire.DmaAccess(iova=IOVA, count=64).pack())
_WRITE = wire.encode_request(4, wire.DMA_WRITE, wire.DmaAccess(iova=IOVA + 100, count=5).pack() + b"hello")
_REPLY = wire.encode_reply(wire.Header(message_id=1, command=wire.DEVICE_RESET))
_ERROR = wire.encode_error(wire.Header(message_id=1, command=wire.DEVICE_RESET), 22)

SEEDS = [
    b"\x00" + _REPLY,
    b"\x80" + _ERROR + _REPLY,
    b"\x00" + _READ + _REPLY + _WRITE,
    b"\x07" + _READ + b"\x80" + _WRITE,
    b"\x81" + _WRITE[:1] + b"\x80" + _WRITE[1:] + _REPLY,
    b"\x00" + wire.encode_request(5, 99, b"abc", no_reply=True),
]


def fuzz_user_client(data: bytes) -> None:
    """Answers go with commands one to one; replies and descriptors are accounted for."""
    with SharedMemory(PAGE) as mine:
        memory = ClientMemory("device")
        memory.add(IOVA, PAGE, mine.fd, 0, 3)
        try:
            _check(ClientCore(memory), data)
        finally:
            memory.clear()


def _check(core: ClientCore, data: bytes) -> None:
    core.ask(wire.DEVICE_RESET)
    stream, given, back = b"", 0, []
    answers, replies, broken = [], 0, False
    at = 0
    while at < len(data) and not broken:
        size = data[at] & 0x7F or len(data)
        piece, fds = data[at + 1 : at + 1 + size], []
        if data[at] & 0x80 and piece:
            given += 1
            fds.append(given)
        at += 1 + size
        stream += piece
        for action in core.receive(piece, fds):
            assert not broken
            match action:
                case Answer(data=answer):
                    header = wire.Header.unpack(answer)
                    assert (header.message_size, header.flags.kind) == (len(answer), wire.KIND_REPLY)
                    answers.append((header.message_id, header.command))
                case Reply(fds=mine):
                    replies += 1
                    back += mine
                case Discard(fds=others):
                    back += others
                case Broken():
                    broken = True
    for action in core.end():
        assert isinstance(action, Discard)
        back += action.fds
    assert sorted(back) == list(range(1, given + 1))
    assert replies <= 1
    expected, ended = _commands(stream)
    if not broken:
        assert (answers, ended) == (expected, False)
    else:
        assert answers == expected[: len(answers)]


def _commands(stream: bytes) -> tuple[list[tuple[int, int]], bool]:
    """The commands of a stream that are to be answered, up to its end or a header that cannot be; is there one?"""
    found: list[tuple[int, int]] = []
    while len(stream) >= 16:
        size, flags = int.from_bytes(stream[4:8], "little"), int.from_bytes(stream[8:12], "little")
        if not 16 <= size <= MAX_MESSAGE or flags & 0xF > 1 or flags >> 6 or flags & 0x2F == 0x20:
            return found, True
        if len(stream) < size:
            break
        if flags & 0x1F == 0:
            found.append((int.from_bytes(stream[0:2], "little"), int.from_bytes(stream[2:4], "little")))
        stream = stream[size:]
    return found, False
