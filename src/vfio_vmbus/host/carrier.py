"""What carries one client's messages, signals and memory. A `host.connection` knows nothing else of where its client is.

There are two: the admin ring of a PCI function (`admin_ring`), and a virtual machine's SynIC (`vm.vmbus`).
"""

from __future__ import annotations

from typing import Protocol

from ..iommu.domain import Domain


class Carried(Protocol):
    """What a carrier brings messages to, on the host's loop. None of these raises."""

    def receive(self, message: bytes) -> None:
        """One message, a private copy."""

    def fail(self, error: Exception) -> None:
        """The client broke a rule of the carrier's: its connection ends, which the carrier hears by its own `fail`."""

    def revoke(self, iova: int, size: int) -> None:
        """The client takes this memory away: its connection ends if that was in use."""

    def reset(self) -> None:
        """Let go of everything of the client's, without a word to it. It may connect anew."""


class Carrier(Protocol):
    """One client's way to the host. Methods are called on the host's loop; where they do not say so they raise nothing on account of the
    client.

    domain: what addresses in the client's messages and packets mean. channels: their numbers lie below this. targets: how many
    processors, or interrupt vectors, the client has.
    """

    name: str
    domain: Domain
    channels: int
    targets: int

    @property
    def failed(self) -> bool:
        """Is the client cut off, until it begins anew?"""

    def begin(self, carried: Carried) -> None:
        """Bring messages to `carried` from now on, until `end`."""

    def contact(self, target: int) -> None:
        """The client wants its messages there. Raises ProtocolError where it has no such processor."""

    def send(self, message: bytes) -> None:
        """Keep a message for the client; those kept go in this order. What is sent while a message is received goes by itself."""

    def flush(self) -> None:
        """What is kept is to go, as far as the client takes it now; the rest later."""

    def doorbell(self, relid: int) -> int:
        """The eventfd by which the client signals a channel; the same one each time. Raises UsageError, OSError."""

    def interrupt(self, relid: int, target: int) -> int:
        """What signals the client for a channel at one of its targets, as rings take a doorbell; good until `end`."""

    def fail(self, error: Exception) -> None:
        """The connection cannot go on: show it to the client, if there is a way, and have the carried `reset`."""

    def end(self) -> None:
        """The host is done with this client. Harmless twice."""
