"""Fuzz target: whatever bytes either end of the control plane gets, it returns or raises ProtocolError, and then lets go of everything.

`check_host(data)` and `check_guest(data)` take a stream: a length byte, then that many bytes of message, and so on.
By itself, `python -m tests.fuzz.fuzz_vmbus [seconds [seed]]` mutates valid messages.
"""

import random
import sys
import time

from hypothesis import strategies as st

from tests.vmbus.world import World, nic
from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.vmbus import GuestState, HostState, whole_pages
from vfio_vmbus.wire import vmbus as wire

NUMBERS = (0, 1, 2, 3, 7, 0xE1E10, 0xE1E11, 0xE1E12, 0xFFFFFFFF)  # relids, handles, offsets: some of them in use
WORDS = (4096, 8192, 32768, 4096 | 8 << 32, 0, 1, 2, 1 << 52, (1 << 64) - 1)
SMALL = {
    "version_supported": (0, 1, 1),
    "connection_state": (0, 0, 2),
    "status": (0, 0, wire.STATUS_UNSUCCESSFUL),
    "downstream_page_offset": (0, 2, 4, 6, 7, 8),
    "version_requested": (*wire.SUPPORTED_VERSIONS, wire.VERSION_WIN7, 0x60000),
    "range_bytes": (8, 16, 24, 32, 48, 72, 240, 65528, 3),
    "range_count": (0, 1, 1, 1, 2, 8),
    "message_number": (0, 0, 0, 1, 2),
    "padding2": (0, 1),
    "monitor_id": (0, 9),
}


def make(kind, choose):
    """A message of a class with fields that make sense often enough; `choose` picks one of a tuple."""
    fields = {}
    for field in kind.FIELDS[2:]:
        name = field.name
        if name in SMALL:
            fields[name] = choose(SMALL[name])
        elif name == "words":
            fields[name] = tuple(choose(WORDS) for _ in range(choose((0, 1, 2, 3, 9))))
        elif name == "offer":
            fields[name] = nic(choose((1, 2, 3)), choose((0, 0, 1)))
        elif name == "target_info":
            fields[name] = wire.TargetInfo.of(sint=choose((2, 2, 2, 3)), vtl=choose((0, 0, 1)))
        elif name in ("monitor_page1", "monitor_page2"):
            fields[name] = choose((0, 0, 4096))
        elif name in ("child_relid", "gpadl", "open_id", "ring_gpadl", "target_vp"):
            fields[name] = choose(NUMBERS)
    return kind(**fields)


def _messages(sender):
    kinds = [kind for kind in wire.MESSAGES.values() if kind.SENDER is sender]
    return st.builds(lambda kind, seed: make(kind, random.Random(seed).choice), st.sampled_from(kinds), st.integers(0, 1 << 32))


def guest_messages():
    """Strategy: messages that a guest sends, right and wrong ones."""
    return _messages(wire.Side.GUEST)


def host_messages():
    """Strategy: messages that a host sends, right and wrong ones."""
    return _messages(wire.Side.HOST)


def packets(data):
    """Cut a stream: a length byte, then that many bytes."""
    at = 0
    while at < len(data):
        size = data[at]
        yield data[at + 1 : at + 1 + size]
        at += 1 + size


def check_host(data):
    """One stream to a host in the middle of its work."""
    world = World().start(nic(1), nic(2))
    world.open(1)
    world.gpadl(2)
    for number, packet in enumerate(packets(data)):
        try:
            world.shell.do(world.host.receive(packet))
        except ProtocolError:
            assert world.host.state is HostState.FAILED
            world.shell.do(world.host.reset())
        if number % 2:
            world.shell.answer_all()
    world.shell.end()


def check_guest(data):
    """One stream to a driver in the middle of its work, up to its first error."""
    world = World().start(nic(1), nic(2))
    world.open(1)
    world.guest.create_gpadl(2, [whole_pages(range(8))])
    world.guest.modify_channel(1, 1)
    for packet in packets(data):
        try:
            world.guest.receive(packet)
        except ProtocolError:
            assert world.guest.state is GuestState.FAILED
            break
    owned = [owned for channel in world.guest._channels.values() for owned in channel.gpadls]
    assert sorted(owned) == sorted(world.guest.gpadl_handles)
    world.guest.reset()
    assert world.guest.gpadl_handles == world.guest.relids == ()


TARGETS = {wire.Side.GUEST: check_host, wire.Side.HOST: check_guest}


def stream(source, sender):
    """A stream of up to 12 messages of one side, some of them with changed, missing or surplus bytes."""
    kinds = [kind for kind in wire.MESSAGES.values() if kind.SENDER is sender]
    out = bytearray()
    for _ in range(source.randrange(1, 12)):
        data = bytearray(make(source.choice(kinds), source.choice).pack())
        if source.random() < 0.2:
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        if source.random() < 0.05:
            del data[source.randrange(len(data)) :]
        if source.random() < 0.05:
            data += source.randbytes(source.randrange(16))
        out += bytes([min(len(data), 255)]) + data[:255]
    return bytes(out)


def main(seconds=60.0, seed=0):
    """Run for so many seconds; a failure names its seed."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            for sender, check in TARGETS.items():
                check(stream(random.Random(seed + count), sender))
        except BaseException:
            print(f"seed {seed + count}", file=sys.stderr)
            raise
        count += 1
    print(f"{count} streams to each end, from seed {seed} on")


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:], strict=False)))
