"""What the driver's end remembers of one channel and of its GPADLs."""

from dataclasses import dataclass, field
from enum import Enum


class GuestGpadl(Enum):
    """A GPADL as the driver asked for it. While CREATING and TEARING the host's answer is awaited."""

    CREATING = "creating"
    READY = "ready"
    TEARING = "tearing down"


class GuestStage(Enum):
    """A channel as the driver asked for it. Closing takes no answer."""

    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"


@dataclass(slots=True, eq=False)
class GuestChannel:
    """An offer and what the driver made of it."""

    key: tuple[bytes, bytes, int]
    stage: GuestStage = GuestStage.CLOSED
    rescinded: bool = False
    open_id: int = 0
    ring: int = 0
    modifying: bool = False
    gpadls: dict[int, GuestGpadl] = field(default_factory=dict)
