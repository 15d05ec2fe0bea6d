"""What the switch does to ports of any kind: take a burst, end it, give frames, prepare for sleep. Kinds meet only here."""

from __future__ import annotations

from ...memory.kernel import kernel
from ..frames import BURST, FRAME_SIZE, frame_at
from ..netvsp.dataplane import nic_arm, nic_deliver, nic_finish, nic_poll
from .replay import NEVER, replay_due, replay_poll
from .state import GENERATOR, NIC, PORT_SIZE, REPLAY, SINK, TAP, port_at, switch_at
from .tap import tap_deliver, tap_poll
from .traffic import generator_poll, sink_deliver


@kernel("i8(i8, i8, i8)")
def port_poll(address: int, frames: int, now: int) -> int:
    """Fill the table with up to a burst of frames from a port: address, size, flags. Returns how many."""
    kind = port_at(address).kind
    if kind == TAP:
        return tap_poll(address, frames, now)
    if kind == GENERATOR:
        return generator_poll(address, frames, BURST)
    if kind == REPLAY:
        return replay_poll(address, frames, BURST, now)
    if kind == NIC:
        return nic_poll(port_at(address).state, frames, BURST)
    return 0


@kernel("void(i8)")
def port_end(address: int) -> None:
    """The frames of the last `port_poll` are where they were to go."""
    port = port_at(address)
    if port.kind == NIC:
        nic_finish(port.state)


@kernel("void(i8, i8, i8, i8)")
def _give(address: int, frames: int, count: int, size: int) -> None:
    """Give `count` frames of `size` bytes together, none of them too long, to a port, and count them."""
    port = port_at(address)
    if port.kind == TAP:  # counts for itself: a write can also fail
        port.no_room += count - tap_deliver(address, frames, count)
        return
    if port.kind == NIC:
        taken = nic_deliver(port.state, frames, count)
    else:
        taken = sink_deliver(address, frames, count) if port.kind == SINK else count
    if taken < count:
        port.no_room += count - taken
        for index in range(taken, count):
            size -= frame_at(frames + index * FRAME_SIZE).size
    port.tx_frames += taken
    port.tx_bytes += size


@kernel("void(i8, i8, i8, i8, i8)")
def port_deliver(address: int, frames: int, count: int, size: int, longest: int) -> None:
    """Give `count` frames, `size` bytes together and at most `longest` each, to a port."""
    port = port_at(address)
    if longest <= port.max_frame:
        _give(address, frames, count, size)
        return
    for index in range(count):
        place = frames + index * FRAME_SIZE
        size = frame_at(place).size
        if size <= port.max_frame:
            _give(address, place, 1, size)
        else:
            port.too_long += 1


@kernel("i8(i8, i8)")
def ports_due(address: int, now: int) -> int:
    """Before sleeping, with interrupts of all ports wanted from here on: when to wake up at the latest; `now`: do not sleep."""
    switch = switch_at(address)
    due = NEVER
    for index in range(switch.count):
        place = switch.ports + index * PORT_SIZE
        port = port_at(place)
        if port.enabled == 0:
            continue
        if port.kind == NIC:
            if nic_arm(port.state, 1) != 0:
                due = now
        elif port.kind == REPLAY:
            due = min(due, replay_due(place))
        elif port.kind == TAP and port.retry_at > now:
            due = min(due, port.retry_at)
    return due


@kernel("void(i8)")
def ports_awake(address: int) -> None:
    """After sleeping, or thinking better of it: no port need interrupt the worker."""
    switch = switch_at(address)
    for index in range(switch.count):
        port = port_at(switch.ports + index * PORT_SIZE)
        if port.enabled != 0 and port.kind == NIC:
            nic_arm(port.state, 0)
