"""The switch: each port's burst is judged frame by frame, then handed on run by run, until the worker is called.

Judging reads a frame's Ethernet header once, as the frame may lie in the memory of a guest, who may rewrite it at any time; what
was read goes into the frame table, and everything behind this works with that.
"""

from __future__ import annotations

from ...dataplane.worker import BUSY, attention, control_at, scratch_of, sleep
from ...memory.access import inline, load64, pause
from ...memory.kernel import kernel, step
from ...memory.libc import clock_ns, sys_yield
from ..frames import ADDRESSES, FRAME_SIZE, frame_at
from .capture import capture_take
from .fdb import fdb_learn, fdb_lookup
from .ports import port_deliver, port_finish, port_poll, ports_arm, ports_due
from .state import (
    CAPTURE,
    FILTERED,
    FLOOD,
    HEADER,
    PORT_SIZE,
    SPOOFED,
    TOO_LONG,
    TOO_SHORT,
    port_at,
    switch_at,
)

GROUP = 1
"""The bit of an address, as numbered here, that makes it a group's."""
RESERVED = 0x00_00_00_C2_80_01
RESERVED_MASK = 0xF0_FF_FF_FF_FF_FF
"""01-80-C2-00-00-0x: for the next bridge only, which does not forward them (IEEE 802.1Q, table 8-1)."""
CLOCK_ROUNDS = 64
"""The clock is read once in so many rounds."""
LOOKS = 16
"""Empty rounds between two looks at the clock."""
LONGEST_SLEEP = 60_000
"""Milliseconds."""
MILLISECOND = 1_000_000


@step("i8(i8, i8, i8)")
def _target(address: int, source: int, destination: int) -> int:
    """Where frames for `destination` go that came in at port `source`."""
    if destination & GROUP != 0:
        return FILTERED if destination & RESERVED_MASK == RESERVED else FLOOD
    port = fdb_lookup(address, destination)
    return FILTERED if port == source else port


@step("void(i8, i8, i8)")
def _judge(address: int, source: int, count: int) -> None:
    """Give every frame of the table its target; learn where its sender is. Looks things up once in a run of equal addresses."""
    switch = switch_at(address)
    port = port_at(switch.ports + source * PORT_SIZE)
    bound = port.bound
    longest = port.max_frame
    sender = -1
    receiver = -1
    refused = 0
    target = FLOOD
    for index in range(count):
        frame = frame_at(switch.frames + index * FRAME_SIZE)
        if frame.size < HEADER or frame.size > longest:
            frame.target = TOO_SHORT if frame.size < HEADER else TOO_LONG
            continue
        at = frame.address
        frame.destination = load64(at) & ADDRESSES
        frame.source = load64(at + 6) & ADDRESSES
        if frame.source != sender:
            sender = frame.source
            refused = 0
            if bound != 0 and sender != bound:
                refused = SPOOFED
            elif sender & GROUP != 0 or sender == 0:
                refused = FILTERED
            elif fdb_learn(address, sender, source) != 0:
                receiver = -1
        if refused != 0:
            frame.target = refused
            continue
        if frame.destination != receiver:
            receiver = frame.destination
            target = _target(address, source, receiver)
        frame.target = target


@inline
def _drop(place: int, why: int, count: int) -> None:
    """Count frames of a port that go nowhere."""
    port = port_at(place)
    if why == SPOOFED:
        port.spoofed += count
    elif why == FILTERED:
        port.filtered += count
    elif why == TOO_SHORT:
        port.too_short += count
    else:
        port.too_long += count


@step("void(i8, i8, i8, i8, i8, i8)")
def _hand_on(address: int, source: int, frames: int, count: int, size: int, longest: int) -> None:
    """A run of `count` frames with one target: `size` bytes together, at most `longest` each."""
    switch = switch_at(address)
    target = frame_at(frames).target
    if target < FLOOD:
        _drop(switch.ports + source * PORT_SIZE, target, count)
    elif target != FLOOD:
        place = switch.ports + target * PORT_SIZE
        if port_at(place).enabled != 0:
            port_deliver(place, frames, count, size, longest)
    else:
        for index in range(switch.count):
            place = switch.ports + index * PORT_SIZE
            port = port_at(place)
            if index != source and port.enabled != 0 and port.kind != CAPTURE:
                port_deliver(place, frames, count, size, longest)


@step("void(i8, i8, i8)")
def switch_forward(address: int, source: int, count: int) -> None:
    """Forward `count` frames of the table, which came in at port number `source`."""
    switch = switch_at(address)
    _judge(address, source, count)
    if switch.captures != 0:
        for index in range(switch.count):
            place = switch.ports + index * PORT_SIZE
            if port_at(place).kind == CAPTURE and port_at(place).enabled != 0:
                capture_take(place, switch.frames, count)
    port = port_at(switch.ports + source * PORT_SIZE)
    port.rx_frames += count
    start = 0
    while start < count:
        run = switch.frames + start * FRAME_SIZE
        target = frame_at(run).target
        size = 0
        longest = 0
        end = start
        while end < count and frame_at(switch.frames + end * FRAME_SIZE).target == target:
            length = frame_at(switch.frames + end * FRAME_SIZE).size
            size += length
            longest = max(longest, length)
            end += 1
        port.rx_bytes += size
        _hand_on(address, source, run, end - start, size, longest)
        start = end


@step("i8(i8)")
def switch_round(address: int) -> int:
    """One burst from every port in turn. Returns how many frames there were; ends early when the worker is called."""
    switch = switch_at(address)
    work = 0
    for index in range(switch.count):
        if attention(switch.control) != 0:
            break
        place = switch.ports + index * PORT_SIZE
        if port_at(place).enabled == 0:
            continue
        count = port_poll(place, switch.frames, switch.now)
        if count > 0:
            switch_forward(address, index, count)
            port_finish(place)
            work += count
    switch.rounds += 1
    return work


@step("void(i8)")
def _rest(address: int) -> None:
    """Nothing to do: sleep until a port or the worker's owner has something, or the next paced frame is due."""
    switch = switch_at(address)
    wait = min((ports_due(address, switch.now) - switch.now) // MILLISECOND, LONGEST_SLEEP)
    if wait > 0:  # less than epoll_wait can express is spent looking
        if ports_arm(address, 1) == 0:
            sleep(switch.control, wait)
        ports_arm(address, 0)
    switch.now = clock_ns(scratch_of(switch.control))


@kernel("void(i8)")
def switch_run(address: int) -> None:
    """The worker's loop: rounds until it is called, sleep according to its policy."""
    switch = switch_at(address)
    control = switch.control
    spin = control_at(control).spin_ns
    scratch = scratch_of(control)
    rounds = 0
    empty = 0
    since = 0
    while attention(control) == 0:
        if rounds % CLOCK_ROUNDS == 0 or switch.paced != 0:
            switch.now = clock_ns(scratch)
        rounds += 1
        if switch_round(address) > 0:
            empty = 0
            continue
        pause()
        if empty % LOOKS == 0 and spin != BUSY:
            sys_yield()  # who is to bring work may be waiting for this very core
            switch.now = clock_ns(scratch)
            since = since if empty > 0 else switch.now
            if switch.now - since >= spin:
                _rest(address)
                empty = -1
        empty += 1
