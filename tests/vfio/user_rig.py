"""A vfio-user client's end for tests of the server's core: requests as bytes, replies taken apart, and every descriptor accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vfio_vmbus.errors import VfioVmbusError
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.function import PciFunction
from vfio_vmbus.vfio.user.core import Action, Close, Release, Send, ServerCore
from vfio_vmbus.vfio.user.core import Answer as ClientsAnswer
from vfio_vmbus.vfio.user.device import FunctionDevice
from vfio_vmbus.wire import vfio_user as wire
from vfio_vmbus.wire.vfio_user_version import Capabilities, encode_version

PEER = Capabilities(max_msg_fds=16)
GREETING = wire.encode_request(1, wire.VERSION, encode_version(wire.Version(), PEER))


@dataclass(frozen=True)
class Answer:
    """errno is 0 for a success."""

    message_id: int
    number: int
    errno: int
    payload: bytes
    fds: tuple[int, ...]


class Rig:
    """A core over a real function. What it releases is closed; descriptors given to it must come back."""

    def __init__(self, function: PciFunction, memory: SharedMemory) -> None:
        self.function = function
        self.memory = memory
        self.core = ServerCore(lambda: FunctionDevice(function), max_data=1 << 16)
        self.given: set[int] = set()
        self.reasons: list[str] = []
        self.told: list[tuple[int, bytes | VfioVmbusError]] = []
        """What came of the server's own requests: message number, and payload or error."""

    def feed(self, data: bytes, fds: Sequence[int] = (), *, lost: bool = False) -> list[Answer]:
        """Bytes as one recvmsg returns them. `fds` are duplicated, as a socket does."""
        mine = [os.dup(fd) for fd in fds]
        self.given.update(mine)
        return self.carry_out(self.core.receive(data, mine, lost=lost))

    def carry_out(self, actions: Sequence[Action]) -> list[Answer]:
        answers = []
        for action in actions:
            match action:
                case Send(data=data, fds=fds):
                    header = wire.Header.unpack(data)
                    assert header.message_size == len(data)
                    assert header.flags.kind == wire.KIND_REPLY
                    assert bool(header.flags.error) == bool(header.error)
                    answers.append(Answer(header.message_id, header.command, header.error, data[16:], fds))
                case Release(fds=fds):
                    for fd in fds:
                        self.given.remove(fd)
                        os.close(fd)
                case ClientsAnswer(message_id=message_id, result=result):
                    self.told.append((message_id, result))
                case Close(reason=reason):
                    self.reasons.append(reason)
        return answers

    def ask(self, number: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """One command; its answer."""
        (answer,) = self.feed(wire.encode_request(77, number, payload), fds)
        assert (answer.message_id, answer.number) == (77, number)
        assert not self.given
        return answer

    def in_step(self) -> bool:
        """Is the next command understood?"""
        answer = self.ask(wire.DEVICE_GET_INFO, wire.DeviceInfo().pack())
        return (answer.errno, answer.payload) == (0, wire.DeviceInfo(flags=3, region_count=9, irq_count=5).pack())


@contextmanager
def rig(*, greeted: bool = True, **limits: int) -> Iterator[Rig]:
    """A rig whose client has said VERSION, unless told otherwise. limits: of its memory. Afterwards nothing of it is left."""
    with nothing_left(objects=False), SharedMemory(8 * PAGE) as memory:
        function = PciFunction("function", **limits)
        made = Rig(function, memory)
        try:
            if greeted:
                assert made.feed(GREETING)[0].errno == 0
            yield made
            made.carry_out(made.core.end())
            assert not made.given
        finally:
            function.close()
