"""What the demonstration's driver process asks of its host process: JSON, one message a packet of a SOCK_SEQPACKET socket, each answered
by one. Nothing of the card's traffic comes this way: that is shared memory and eventfds."""

from __future__ import annotations

from typing import Self

import msgspec

from ..errors import LocalError, UnavailableError, UsageError, VfioVmbusError

PACKET_LIMIT = 1 << 16


class SetUp(msgspec.Struct, frozen=True, tag=True):
    """Start the host, with a card of this MAC address. A descriptor that comes along is a TAP for its switch."""

    mac: bytes


class Attach(msgspec.Struct, frozen=True, tag=True):
    """Serve the card, or the attackers' card, to the vfio-user client on the socket that comes along."""

    attacker: bool


class Watch(msgspec.Struct, frozen=True, tag=True):
    """An attacker is about to begin."""


class AskGone(msgspec.Struct, frozen=True, tag=True):
    """Has the host closed the attackers' card?"""


class AskFinding(msgspec.Struct, frozen=True, tag=True):
    """What did the host see of the attack? The attacker's own view of it comes along."""

    refused: tuple[str, ...]
    failed: int
    unanswered: int
    lawful: bool


class Replay(msgspec.Struct, frozen=True, tag=True):
    """Replay a capture into the switch, so many frames a second."""

    path: str
    pace: float


class StopReplay(msgspec.Struct, frozen=True, tag=True):
    """Take it away again."""


Request = SetUp | Attach | Watch | AskGone | AskFinding | Replay | StopReplay


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is done."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The host runs. mac: of the attackers' card. addresses: pages of the host's own memory, for attackers to try."""

    mac: bytes
    addresses: tuple[int, ...]


class Gone(msgspec.Struct, frozen=True, tag=True):
    gone: bool


class Found(msgspec.Struct, frozen=True, tag=True):
    bytes_touched: int
    evidence: tuple[str, ...]


class Failure(msgspec.Struct, frozen=True, tag=True):
    """Why a request failed: the exception's class by name, and its message."""

    error: str
    message: str

    @classmethod
    def of(cls, error: VfioVmbusError) -> Self:
        return cls(type(error).__name__, str(error))

    def exception(self) -> VfioVmbusError:
        known: dict[str, type[VfioVmbusError]] = {kind.__name__: kind for kind in (UsageError, UnavailableError)}
        return known.get(self.error, LocalError)(f"the host's process: {self.message}")


Reply = Done | Ready | Gone | Found | Failure

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
