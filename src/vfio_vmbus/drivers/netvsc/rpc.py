"""Questions and answers on a channel that frames pass through as well: NVSP by completions, RNDIS by control messages.

While a question is open the queue is run here, so frames that arrive meanwhile are dropped, as in any driver's control path that
has the queue to itself. Applications whose kernels own the queue ask nothing meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from ...errors import ClosedError, PeerError, ProtocolError, UsageError, WaitTimeout
from ...wire import nvsp, rndis
from ...wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, Packet
from ...wire.table import Side
from .queue import Queue

N = TypeVar("N", bound=nvsp.NvspMessage)
R = TypeVar("R", bound=rndis.RndisMessage)

_FIRST_TRANSACTION = 1 << 32
"""Above every number that a section or a slot has."""


class Rpc:
    """check: raises what has become of the device while an answer is waited for. mail, control: get RNDIS and NVSP messages that answer
    nothing."""

    def __init__(
        self,
        queue: Queue,
        timeout: float,
        check: Callable[[], None],
        mail: Callable[[bytes], None],
        control: Callable[[Packet], None],
    ) -> None:
        self._queue = queue
        self._timeout = timeout
        self._check = check
        self._mail = mail
        self._control = control
        self._transaction = _FIRST_TRANSACTION
        self._request = 0
        self._asked: int | None = None  # transaction of the NVSP question that is open
        self._completion: bytes | None = None
        self._awaited: int | None = None  # number of the RNDIS question that is open
        self._answer: tuple[rndis.RndisMessage, bytes] | None = None

    def ask_nvsp(self, message: nvsp.NvspMessage, answer: type[N]) -> N:
        """Ask and wait for the completion. Raises ProtocolError for another answer, WaitTimeout for none, and what `check` raises."""
        self._completion = None
        self._asked = self._transaction + 1
        self._post(message, True)
        payload = self._wait(lambda: self._completion, f"the answer to {type(message).__name__}")
        received = nvsp.parse_message(payload, sender=Side.HOST)
        if not isinstance(received, answer):
            raise ProtocolError(f"{type(message).__name__} was answered by {type(received).__name__}")
        return received

    def tell_nvsp(self, message: nvsp.NvspMessage) -> None:
        """Say something that has no answer."""
        self._post(message, False)

    def ask_rndis(self, message: rndis.RndisMessage, answer: type[R], info: bytes = b"") -> tuple[R, bytes]:
        """Ask and wait for the answer with its information. Raises as `ask_nvsp`."""
        self._request += 1
        self._answer = None
        self._awaited = self._request
        self._post_rndis(replace(message, request_id=self._request), info)  # type: ignore[call-arg]
        received, value = self._wait(lambda: self._answer, f"the answer to {type(message).__name__}")
        if not isinstance(received, answer):
            raise ProtocolError(f"{type(message).__name__} was answered by {type(received).__name__}")
        return received, value

    def tell_rndis(self, message: rndis.RndisMessage) -> None:
        """Say something in RNDIS that has no answer."""
        self._post_rndis(message, b"")

    def leave(self, steps: Iterable[Callable[[], Any]]) -> None:
        """Say good-bye step by step; a host that does not listen any more ends it early."""
        with suppress(PeerError, UsageError, ClosedError):
            for step in steps:
                step()

    def poll(self) -> None:
        """Take in what came, without waiting."""
        for data in self._queue.take_mail():
            self._on_rndis(data)
        packet = self._queue.take_control()
        if packet is not None:
            if packet.packet_type != PACKET_COMPLETION:
                self._control(packet)
            elif packet.transaction_id == self._asked:
                self._asked = None
                self._completion = packet.payload
            else:
                self._queue.note_bad_completion()

    def _on_rndis(self, data: bytes) -> None:
        message, info = rndis.parse_message(data, sender=Side.HOST)
        request = getattr(message, "request_id", None)
        if request is None or message.message_type & rndis.COMPLETION == 0:
            self._mail(data)
        elif request == self._awaited:
            self._awaited = None
            self._answer = (message, info)
        else:
            raise ProtocolError(f"{type(message).__name__} answers request {request}, awaited was {self._awaited}")

    def _post(self, message: nvsp.NvspMessage, answered: bool) -> None:
        self._transaction += 1
        packet = Packet(
            packet_type=PACKET_INBAND,
            transaction_id=self._transaction,
            completion_requested=answered,
            payload=nvsp.encode_message(message),
        )
        self._send(packet, type(message).__name__)

    def _post_rndis(self, message: rndis.RndisMessage, info: bytes) -> None:
        """Control messages go GPA-direct, as Linux and DPDK send them."""
        data = rndis.encode_message(message, info)
        transaction, pages = self._wait(lambda: self._queue.take_slot(data), f"a free slot for {type(message).__name__}")
        self._send(
            Packet(
                packet_type=PACKET_GPA_DIRECT,
                transaction_id=transaction,
                completion_requested=True,
                pages=pages,
                payload=nvsp.encode_message(nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_CONTROL)),
            ),
            type(message).__name__,
        )

    def _send(self, packet: Packet, what: str) -> None:
        self._wait(lambda: self._queue.send_packet(packet) or None, f"room for {what}")

    def _wait(self, look: Callable[[], Any], awaited: str) -> Any:
        """What `look` gives as soon as it is not None, running the queue meanwhile. Raises WaitTimeout."""
        deadline = time.monotonic() + self._timeout
        while True:
            found = look()
            if found is not None:
                return found
            self._queue.rx_burst()
            self.poll()
            found = look()
            if found is not None:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(awaited, self._timeout)
            self._check()
            self._queue.wait(min(left, 0.05))
