"""A relay between a guest's rings and the VSP that serves them: where packets, completions and interrupts meet their fates.

The VSP gets a pair of rings of its own, as large as the guest's, and a doorbell of its own; packets are carried from ring to ring, in
order, but for what the orders do to them. So VSPs and the kernels of the data plane know nothing of faults, and where none are ordered
there is no relay. It runs on the host's loop, in Python: some ten thousand packets a second, of up to 64 frames each.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from ...errors import ProtocolError, RingError
from ...memory.bell import NOBODY
from ...memory.mapping import PAGE, Piece
from ...memory.shared import SharedMemory
from ...ring.ends import IncomingRing, OutgoingRing
from ...ring.pair import RingPair
from ...ring.primitives import FOOTER, INTERRUPT_MASK, PENDING_SEND_SZ, READ_INDEX, WRITE_INDEX
from ...vfio import eventfd
from ...wire import nvsp
from ...wire.ring import FLAG_COMPLETION_REQUESTED, PACKET_COMPLETION, PACKET_INBAND, PACKET_XFER_PAGES, Packet
from ...wire.table import Side
from ..vsp import ChannelContext
from .fate import Desk, Stream
from .forger import Forger, forge_rndis, is_forged, pick, word
from .passage import Passage
from .plan import Flow

_BUDGET = 64
"""Packets carried in one direction before others get their turn."""
_RETRY_SECONDS = 0.001
_SPARED = 16
"""Bytes of a packet that are not corrupted: kind, lengths, flags, without which a reader would lose the ring's thread, and the transaction,
without which whatever the packet is about would be lost for good."""
_SPARED_OF_COMPLETIONS = 8
"""Of completions the transaction is the point."""
_REPEAT_SECONDS = 0.001
"""Between an interrupt and its duplicate: two at once are one."""
_REPAIR_SECONDS = 0.001
"""How long an index lies, unless traffic rights it before."""
_OUT_OF_RING = struct.pack("<I", 0xFFFFFFFF)

_CHANNEL_FLOWS = (
    Flow.PACKETS_TO_GUEST,
    Flow.PACKETS_TO_HOST,
    Flow.COMPLETIONS,
    Flow.COMPLETIONS_TO_HOST,
    Flow.INTERRUPTS,
    Flow.LIES,
)


def relay(desk: Desk, device: str, context: ChannelContext, interrupt: int) -> Relay | None:
    """A relay for an open channel of a device, where faults are ordered for it. interrupt: what its pair signals the guest by."""
    return Relay(desk, device, context, interrupt) if desk.touches(device, *_CHANNEL_FLOWS) else None


class _Way:
    """One direction: from a ring to a queue, by way of passages, and from there to the other ring."""

    def __init__(self, source: IncomingRing, target: OutgoingRing, take: Callable[[bytes], None]) -> None:
        self.queue: deque[bytes] = deque()
        self._source = source
        self._target = target
        self._take = take

    def carry(self) -> bool | None:
        """Carry some packets. True when there are more, None when the target has no room. Raises RingError."""
        for _ in range(_BUDGET):
            while self.queue:
                if not self._target.send_raw(self.queue[0]):
                    return None
                self.queue.popleft()
            packet = self._source.receive_raw()
            if packet is not None:
                self._take(bytes(packet))
            elif not self._source.unmask():
                return bool(self.queue)
        return True


class Relay:
    """Carries one channel. `context` is for the VSP, in place of the one that was given, whose pair the relay closes.

    Raises OSError where the machine has no more memory or descriptors.
    """

    def __init__(self, desk: Desk, device: str, context: ChannelContext, interrupt: int) -> None:
        self._outer = context.pair
        self._guest = context
        self._interrupt = interrupt
        self._loop = asyncio.get_running_loop()
        self._resources = ExitStack()
        self._running = True
        self._next: asyncio.Handle | None = None
        """When it goes on by itself."""
        self._timers: set[asyncio.TimerHandle] = set()
        self._signals = 0
        """Those that were given, and met their fate."""
        self._receive_buffer: int | None = None
        """Handle of the GPADL that a network card's guest named."""
        self._pump = context.guarded(self._carry)
        with ExitStack() as stack:
            self._open_rings(stack, context)
            self._up = _Way(self._outer.incoming, self._inner.outgoing, self._from_guest)
            self._down = _Way(self._inner.incoming, self._outer.outgoing, self._from_vsp)
            self._open_passages(desk, device)
            stack.callback(self.stop)
            self._resources = stack.pop_all()
        self._loop.add_reader(context.doorbell, self._kick)
        self._loop.add_reader(self._wake, self._kick)
        self._soon()

    def lead_to(self, interrupt: int) -> None:
        """Interrupt the guest by this from now on."""
        self._interrupt = interrupt
        if self._bell.free:
            self._outer.lead_to(interrupt)

    def stop(self) -> None:
        """Carry nothing more, and let go of what is held back. Before the VSP closes its end."""
        if not self._running:
            return
        self._running = False
        self._loop.remove_reader(self._guest.doorbell)
        self._loop.remove_reader(self._wake)
        for passage in (*self._passages.values(), self._bell):
            passage.close()
        for timer in (*self._timers, *([self._next] if self._next else [])):
            timer.cancel()

    def close(self) -> None:
        """Unmap the VSP's rings, and the guest's."""
        self._resources.close()
        self._outer.close()

    def _open_rings(self, stack: ExitStack, context: ChannelContext) -> None:
        up, down = self._outer.incoming.size + PAGE, self._outer.outgoing.size + PAGE
        memory = stack.enter_context(SharedMemory(up + down, "faults"))
        doorbell = eventfd.make()
        stack.callback(os.close, doorbell)
        self._wake = eventfd.make()
        stack.callback(os.close, self._wake)
        name = f"{self._outer.outgoing.name}, relayed"
        self._inner = stack.enter_context(RingPair.fresh(memory, 0, up, up + down, doorbell, name))
        pair = stack.enter_context(RingPair([Piece(memory.fd, 0, up + down)], up, Side.HOST, self._wake, name))
        self.context = replace(context, pair=pair, doorbell=doorbell)

    def _open_passages(self, desk: Desk, device: str) -> None:
        def passage(flow: Flow, way: _Way, spared: int = _SPARED) -> Passage:
            lost = self._given_back if flow is Flow.PACKETS_TO_GUEST else _nothing
            return Passage(desk.gate(device, flow), way.queue.append, spared=spared, dropped=lost, kick=self._soon)

        self._passages = {
            Flow.PACKETS_TO_HOST: passage(Flow.PACKETS_TO_HOST, self._up),
            Flow.COMPLETIONS_TO_HOST: passage(Flow.COMPLETIONS_TO_HOST, self._up, _SPARED_OF_COMPLETIONS),
            Flow.PACKETS_TO_GUEST: passage(Flow.PACKETS_TO_GUEST, self._down),
            Flow.COMPLETIONS: passage(Flow.COMPLETIONS, self._down, _SPARED_OF_COMPLETIONS),
        }
        self._bell = Passage(desk.gate(device, Flow.INTERRUPTS), self._ring, gap=_REPEAT_SECONDS)
        if not self._bell.free:
            self._outer.lead_to(NOBODY)
        self._lies = [(stream, stream.fault.lies(Flow.LIES)) for stream in desk.streams(device, Flow.LIES)]
        self._forger = Forger()

    # Going on.

    def _soon(self) -> None:
        """Go on in the loop's next round; once, however many want it."""
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.call_soon(self._kick)

    def _kick(self) -> None:
        """A doorbell was rung, or there is more to do."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._running:
            eventfd.take(self._guest.doorbell)
            eventfd.take(self._wake)
            self._pump()

    def _carry(self) -> None:
        try:
            results = (self._up.carry(), self._down.carry())
        except RingError as error:
            self._give_up(error)
            return
        finally:
            self._signalled()
        if True in results:
            self._soon()
        elif None in results and self._next is None:
            self._next = self._loop.call_later(_RETRY_SECONDS, self._kick)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        def ripe() -> None:
            self._timers.discard(timer)
            call()

        timer = self._loop.call_later(seconds, ripe)
        self._timers.add(timer)

    def _give_up(self, error: RingError) -> None:
        """The guest broke a ring: let the VSP find its own one broken, as it would the guest's."""
        self.stop()
        self._inner.outgoing.mapping.write(WRITE_INDEX, _OUT_OF_RING)
        self._inner.outgoing.signal()
        self._guest.failed(error)  # last, as that may close all of it

    # Packets.

    def _from_guest(self, packet: bytes) -> None:
        kind, offset, _, _, transaction = struct.unpack_from("<HHHHQ", packet)
        if kind == PACKET_COMPLETION:
            if not is_forged(transaction):
                self._passages[Flow.COMPLETIONS_TO_HOST].put(packet)
            return
        if kind == PACKET_INBAND and packet[8 * offset : 8 * offset + 4] == struct.pack("<I", nvsp.SEND_RECEIVE_BUFFER):
            (self._receive_buffer,) = struct.unpack_from("<I", packet.ljust(8 * offset + 8, b"\0"), 8 * offset + 4)
        self._passages[Flow.PACKETS_TO_HOST].put(packet)

    def _from_vsp(self, packet: bytes) -> None:
        self._forger.saw(packet)
        for stream, lies in self._lies:
            if stream.due():
                stream.hit()
                self._lie(stream, pick(stream.how, lies), packet)
        (kind,) = struct.unpack_from("<H", packet)
        self._passages[Flow.COMPLETIONS if kind == PACKET_COMPLETION else Flow.PACKETS_TO_GUEST].put(packet)

    def _given_back(self, packet: bytes) -> None:
        """A transfer to the guest is lost: the VSP may use its sections again. It is the driver that is tested, not what the host leaks."""
        kind, _, _, flags, transaction = struct.unpack_from("<HHHHQ", packet)
        if kind == PACKET_XFER_PAGES and flags & FLAG_COMPLETION_REQUESTED:
            done = nvsp.encode_message(nvsp.SendRndisPacketComplete())
            self._up.queue.append(Packet(packet_type=PACKET_COMPLETION, transaction_id=transaction, payload=done).pack())
            self._soon()

    # Lies.

    def _lie(self, stream: Stream, about: str, packet: bytes) -> None:
        if about == "indices":
            self._misplace(stream)
        elif about == "rndis":
            self._scribble(stream, packet)
        else:
            forged = self._forger.packet(about, stream.how, packet)
            if len(forged) + FOOTER < self._outer.outgoing.size:
                self._down.queue.append(forged)

    def _misplace(self, stream: Stream) -> None:
        """Put a number that cannot be right into what of the control pages is the host's to write, for a moment."""
        incoming, outgoing = self._outer.incoming, self._outer.outgoing
        indices: list[tuple[IncomingRing | OutgoingRing, int]] = [(outgoing, WRITE_INDEX), (incoming, READ_INDEX)]
        end, field = pick(stream.how, [*(2 * indices), (outgoing, PENDING_SEND_SZ), (incoming, INTERRUPT_MASK)])
        size, right = end.size, end.mapping.read(field, 4)
        own = int.from_bytes(right, "little")
        value = pick(stream.how, (size, size - 4, size + 8, (own - 8) % size, (own + 8) % size, own + 1, word(stream.how)))
        end.mapping.write(field, struct.pack("<I", value))
        outgoing.signal()
        self._later(_REPAIR_SECONDS, lambda: self._put_right(end, field))

    def _put_right(self, end: IncomingRing | OutgoingRing, field: int) -> None:
        index = end.shown if field in (WRITE_INDEX, READ_INDEX) else 0
        end.mapping.write(field, struct.pack("<I", index))
        self._kick()  # the guest may have kept quiet meanwhile, as it was told to

    def _scribble(self, stream: Stream, packet: bytes) -> None:
        """Write nonsense over one of the RNDIS messages that a transfer announces, in the guest's receive buffer."""
        kind, offset, _, _, _ = struct.unpack_from("<HHHHQ", packet)
        count = 8 * offset - 24
        if kind != PACKET_XFER_PAGES or count < 8 or self._receive_buffer is None:
            return
        size, place = struct.unpack_from("<II", packet, 24 + 8 * int(stream.how.random() * (count // 8)))
        try:
            mapping = self._guest.gpadl(self._receive_buffer).mapping
        except ProtocolError:
            return  # it was torn down
        for at, data in forge_rndis(stream.how):
            if at + len(data) <= size and place + size <= mapping.size:
                mapping.write(place + at, data)

    # Interrupts.

    def _signalled(self) -> None:
        """If the guest is to be interrupted for what was done since the last look, an interrupt is on its way."""
        if self._bell.free or not self._running:
            return
        ends = (self._outer.incoming, self._outer.outgoing)
        before, self._signals = self._signals, sum(end.statistics().signals for end in ends)
        for _ in range(self._signals - before):
            self._bell.put(b"")

    def _ring(self, _: bytes) -> None:
        outgoing = self._outer.outgoing
        outgoing.lead_to(self._interrupt)
        outgoing.signal()
        outgoing.lead_to(NOBODY)
        self._signals += 1  # this one is no new one


def _nothing(packet: bytes) -> None:
    """Whoever sent it finds out for itself."""
