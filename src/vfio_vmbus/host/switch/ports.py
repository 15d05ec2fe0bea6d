"""What the switch does to ports of any kind: take a burst, end it, give frames, prepare for sleep. Kinds meet only here."""

from __future__ import annotations

from ...memory.kernel import step
from ..frames import BURST, FRAME_SIZE, frame_at
from ..netvsp.dataplane import nic_arm, nic_deliver, nic_finish, nic_poll
from .replay import NEVER, replay_due, replay_poll
from .state import GENERATOR, NIC, PORT_SIZE, REPLAY, SINK, TAP, port_at, switch_at
from .tap import tap_deliver, tap_poll
from .traffic import generator_poll, sink_deliver


@step("i8(i8, i8, i8)")
def port_poll(address: int, frames: int, now: int) -> int:
    """Fill the table with up to a burst of frames from a port: address, size, flags. Returns how many."""
    port = port_at(address)
    kind = port.kind
    if kind == NIC:
        return nic_poll(port.state, frames, BURST)
    if kind == TAP:
        return tap_poll(address, frames, now)
    if kind == GENERATOR:
        return generator_poll(address, frames, BURST)
    if kind == REPLAY:
        return replay_poll(address, frames, BURST, now)
    return 0


@step("void(i8)")
def port_finish(address: int) -> None:
    """The frames of the last poll are where they were to go; whoever lent their memory may have it back."""
    port = port_at(address)
    if port.kind == NIC:
        nic_finish(port.state)


@step("void(i8, i8, i8, i8)")
def _give(address: int, frames: int, count: int, size: int) -> None:
    """Give `count` frames of `size` bytes together, none of them too long, to a port, and count them."""
    port = port_at(address)
    if port.kind == TAP:  # counts for itself: a write can also fail
        port.no_room += count - tap_deliver(address, frames, count)
        return
    taken = count
    if port.kind == NIC:
        taken = nic_deliver(port.state, frames, count)
    elif port.kind == SINK:
        taken = sink_deliver(address, frames, count)
    if taken < count:
        port.no_room += count - taken
        for index in range(taken, count):
            size -= frame_at(frames + index * FRAME_SIZE).size
    port.tx_frames += taken
    port.tx_bytes += size


@step("void(i8, i8, i8, i8, i8)")
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


@step("i8(i8, i8)")
def ports_arm(address: int, armed: int) -> int:
    """Have all NICs signal from now on (1), before the worker sleeps, or no more (0). 1 if one has work already."""
    switch = switch_at(address)
    work = 0
    for index in range(switch.count):
        port = port_at(switch.ports + index * PORT_SIZE)
        if port.enabled != 0 and port.kind == NIC:
            work |= nic_arm(port.state, armed)
    return work


@step("i8(i8, i8)")
def ports_due(address: int, now: int) -> int:
    """When a port has something to do that no descriptor will tell of: the next paced frame, the next try after an error."""
    switch = switch_at(address)
    due = NEVER
    for index in range(switch.count):
        place = switch.ports + index * PORT_SIZE
        port = port_at(place)
        if port.enabled == 0:
            continue
        if port.kind == REPLAY:
            due = min(due, replay_due(place))
        elif port.kind == TAP and port.retry_at > now:
            due = min(due, port.retry_at)
    return due
