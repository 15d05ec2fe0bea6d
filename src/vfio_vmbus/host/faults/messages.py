"""A carrier around another one: where a connection's control messages meet their fates, and a hostile host's own come between."""

from __future__ import annotations

from collections.abc import Callable

from ..carrier import Carried, Carrier
from .fate import Desk
from .forger import forge_message
from .passage import Passage
from .plan import Flow

_MESSAGE_FLOWS = (Flow.MESSAGES_TO_GUEST, Flow.MESSAGES_TO_HOST, Flow.LIES_IN_MESSAGES)


def faulted(desk: Desk | None, device: str, carrier: Carrier) -> Carrier:
    """The carrier itself, or one around it where faults are ordered for its messages. device: what they are counted under."""
    if desk is None or not desk.touches(device, *_MESSAGE_FLOWS):
        return carrier
    return FaultyCarrier(desk, device, carrier)


class FaultyCarrier:
    """Carrier to the connection, and carried to the carrier. All that is no message passes untouched."""

    def __init__(self, desk: Desk, device: str, carrier: Carrier) -> None:
        self.carrier = carrier
        self.name = carrier.name
        self.domain = carrier.domain
        self.channels = carrier.channels
        self.targets = carrier.targets
        self._carried: Carried | None = None

        def passage(flow: Flow, deliver: Callable[[bytes], None]) -> Passage:
            return Passage(desk.gate(device, flow), deliver, in_order=True, kick=carrier.flush)

        self._to_guest = passage(Flow.MESSAGES_TO_GUEST, carrier.send)
        self._to_host = passage(Flow.MESSAGES_TO_HOST, self._bring)
        self._lies = desk.streams(device, Flow.LIES_IN_MESSAGES)
        self.contact = carrier.contact
        self.flush = carrier.flush
        self.doorbell = carrier.doorbell
        self.interrupt = carrier.interrupt
        self.fail = carrier.fail

    @property
    def failed(self) -> bool:
        return self.carrier.failed

    # What the connection asks.

    def begin(self, carried: Carried) -> None:
        self._carried = carried
        self.carrier.begin(self)

    def send(self, message: bytes) -> None:
        for stream in self._lies:
            if stream.due():
                stream.hit()
                self.carrier.send(forge_message(stream.how, message))
        self._to_guest.put(message)

    def end(self) -> None:
        self._forget()
        self.carrier.end()

    # What the carrier brings.

    def receive(self, message: bytes) -> None:
        self._to_host.put(message)

    def revoke(self, iova: int, size: int) -> None:
        if self._carried is not None:
            self._carried.revoke(iova, size)

    def reset(self) -> None:
        self._forget()
        if self._carried is not None:
            self._carried.reset()

    def _bring(self, message: bytes) -> None:
        if self._carried is not None:
            self._carried.receive(message)

    def _forget(self) -> None:
        """What is held back was for a connection that is no more."""
        self._to_guest.close()
        self._to_host.close()
