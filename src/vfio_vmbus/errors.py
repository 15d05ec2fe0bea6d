"""The tree of exceptions: whose mistake it was decides the branch.

    VfioVmbusError
    +- LocalError               the caller's mistake, or this machine's
    |  +- UsageError            an argument or an order of calls that cannot work      (also a ValueError)
    |  +- ClosedError           use of something already closed or unmapped
    |  +- DmaError              memory that cannot be mapped, pinned or addressed
    |  +- UnavailableError      the kernel or the machine lacks a facility, or forbids it
    |     +- UnsafeError        an unsafe way that was not asked for, or not allowed
    +- PeerError                the other side's mistake, or its refusal
       +- ProtocolError         a malformed, unknown or misplaced message
       |  +- RingError          ring indices or packet headers that cannot be
       +- IsolationFault        an address outside of what the peer may reach
       +- RefusedError          a well-formed answer that says no
       +- RescindedError        the device was taken away
       +- WaitTimeout           no answer in time                                      (also a TimeoutError)

Empty and full are flow control, not errors. A message names the value, the limit and the unit.
The command line turns `UsageError` and `UnavailableError` into one line and exit status 2.
"""


class VfioVmbusError(Exception):
    """Root of everything that this package raises on purpose."""


class LocalError(VfioVmbusError):
    """The caller's mistake, or something that this machine cannot do."""


class UsageError(LocalError, ValueError):
    """An argument out of range, or a call in a state that does not allow it."""


class ClosedError(LocalError):
    """Use of an object after it was closed, or of memory after it was unmapped."""


class DmaError(LocalError):
    """Memory that cannot be mapped for a device: overlap, alignment, exhaustion, wrong kind of file."""


class UnavailableError(LocalError):
    """A facility that the kernel or the machine lacks or forbids; the message says how to get it."""


class UnsafeError(UnavailableError):
    """A way without isolation that was not asked for, or that this process is not allowed; the message says which condition is missing."""


class PeerError(VfioVmbusError):
    """The other side broke a rule, refused, or went away."""


class ProtocolError(PeerError):
    """A message that is malformed, unknown, or not allowed in this state."""


class RingError(ProtocolError):
    """A ring whose indices or packet headers contradict themselves; its channel cannot go on."""


class IsolationFault(PeerError):
    """A request for memory that its sender may not reach; nothing was touched.

    `device` names the client, `iova` and `length` are in bytes, `direction` is "read" or "write" as the
    device saw it, `reason` says what was wrong ("not mapped", "not writable", "wraps around").
    """

    def __init__(self, device: str, iova: int, length: int, direction: str, reason: str) -> None:
        super().__init__(device, iova, length, direction, reason)
        self.device = device
        self.iova = iova
        self.length = length
        self.direction = direction
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.device}: {self.direction} of {self.length} bytes at IOVA {self.iova:#x}: {self.reason}"


class RefusedError(PeerError):
    """The peer answered with a failure. `status` is its code (an NTSTATUS, NVSP or RNDIS status), or 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return f"{self.message} (status {self.status:#x})" if self.status else self.message


class RescindedError(PeerError):
    """The device or channel was taken away by its host."""


class WaitTimeout(PeerError, TimeoutError):
    """Nothing came in time. `awaited` says what was awaited, `seconds` how long."""

    def __init__(self, awaited: str, seconds: float) -> None:
        super().__init__(awaited, seconds)
        self.awaited = awaited
        self.seconds = seconds

    def __str__(self) -> str:
        return f"waited {self.seconds:g} s for {self.awaited}"
