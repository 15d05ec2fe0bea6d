"""The table of a protocol's messages: number -> class, who sends it, and since which version.

A protocol has one base class under `Numbered`, and one `Table` that its messages enter when declared.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import ClassVar, Generic, TypeVar

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire.layout import Struct


class Side(Enum):
    """Who sends a message."""

    GUEST = "guest"
    HOST = "host"
    BOTH = "guest or host"

    def sends_as(self, other: "Side") -> bool:
        """Whether a message of this side may come from `other`."""
        return self is other or Side.BOTH in (self, other)


class Numbered(Struct):
    """Base of the protocols' bases. A message's number is the default of its first field."""

    NUMBER: ClassVar[int]
    SINCE: ClassVar[int]
    SENDER: ClassVar[Side]

    def check(self) -> None:
        """Raise ProtocolError where the fields contradict each other. Parsers call it."""


MessageT = TypeVar("MessageT", bound=Numbered)


class Table(Generic[MessageT]):
    """The messages of one protocol. A number may mean one message of the guest and another of the host."""

    def __init__(self, protocol: str, version_text: Callable[[int], str]) -> None:
        self.protocol = protocol
        self._version_text = version_text
        self._kinds: dict[int, list[type[MessageT]]] = {}

    def add(self, kind: type[MessageT], number: int, *, since: int, sender: Side) -> None:
        """Enter a class. TypeError when another one of that side has the number."""
        kind.NUMBER, kind.SINCE, kind.SENDER = number, since, sender
        same = self._kinds.setdefault(number, [])
        for other in same:
            if other.SENDER.sends_as(sender):
                raise TypeError(f"{self.protocol} message {number} of {kind.__name__} is {other.__name__}'s")
        same.append(kind)

    def __iter__(self) -> Iterator[type[MessageT]]:
        for number in sorted(self._kinds):
            yield from self._kinds[number]

    def select(self, number: int, sender: Side = Side.BOTH, version: int | None = None) -> type[MessageT]:
        """A message's class. ProtocolError: unknown, not for this side to send, or newer than `version`."""
        same = self._kinds.get(number)
        if same is None:
            limit = max(self._kinds)
            raise ProtocolError(f"{self.protocol}: unknown message number {number:#x}, limit {limit:#x}")
        for kind in same:
            if kind.SENDER.sends_as(sender):
                break
        else:
            raise ProtocolError(f"{same[0].__name__} from the {sender.value}, only the {same[0].SENDER.value} sends it")
        if version is not None and version < kind.SINCE:
            need, have = self._version_text(kind.SINCE), self._version_text(version)
            raise ProtocolError(f"{kind.__name__} needs {self.protocol} {need}, negotiated {have}")
        return kind
