"""The catalogue of lying servers: what a vfio-user server may send, and how the client takes it.

It raises a typed error or goes on; it never hangs, never uses what it was not given, and closes every descriptor (the rig looks).
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
from collections.abc import Callable

import pytest

from tests.vfio.lying_server import BELLS, BIG, MAPPED, PATIENCE, Asked, LyingServer, io_fds, lied_to, lying, pattern, region_info
from vfio_vmbus.errors import ClosedError, DmaError, ProtocolError, RefusedError, UnavailableError, UsageError, WaitTimeout
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import REGION_MMAP, REGION_READ, REGION_WRITE
from vfio_vmbus.vfio.user.client import UserDevice
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire
from vfio_vmbus.wire.vfio_user_version import Capabilities

IOVA = 1 << 32
SHORT = 0.3
"""Seconds after which a client that waits in vain gives up, in tests where it must."""

Use = Callable[[UserDevice, SharedMemory], object]


def read(device: UserDevice, memory: SharedMemory) -> object:
    return device.region(0).read(8, 4)


def write(device: UserDevice, memory: SharedMemory) -> object:
    return device.region(0).write(8, b"abcd")


def enable(device: UserDevice, memory: SharedMemory) -> object:
    fd = eventfd.make()
    try:
        device.irq(2).enable(0, fd)
    finally:
        os.close(fd)
    return None


def dma_map(device: UserDevice, memory: SharedMemory) -> object:
    return device.dma.map(IOVA, memory.fd, 0, PAGE, 3)


def dma_unmap(device: UserDevice, memory: SharedMemory) -> object:
    device.dma.map(IOVA, memory.fd, 0, PAGE, 3)
    return device.dma.unmap(IOVA, PAGE)


def unmap_only(device: UserDevice, memory: SharedMemory) -> object:
    return device.dma.unmap(IOVA, PAGE)


def doorbell(device: UserDevice, memory: SharedMemory) -> object:
    return device.region(0).doorbell(BELLS[0])


USES: dict[int, Use] = {
    wire.DEVICE_GET_REGION_INFO: lambda device, memory: device.region(MAPPED),
    wire.DEVICE_GET_REGION_IO_FDS: doorbell,
    wire.DEVICE_GET_IRQ_INFO: lambda device, memory: device.irq(2),
    wire.DEVICE_SET_IRQS: enable,
    wire.REGION_READ: read,
    wire.REGION_WRITE: write,
    wire.DMA_MAP: dma_map,
    wire.DMA_UNMAP: dma_unmap,
    wire.DEVICE_RESET: lambda device, memory: device.reset(),
}
"""A call that sends this command."""

every_command = pytest.mark.parametrize("number", sorted(USES), ids=lambda number: wire.COMMANDS[number].name)


def dead(device: UserDevice, reason: str) -> None:
    """The connection has ended for good, and says why."""
    for use in (lambda: device.region(0).read(0, 4), device.reset, lambda: device.dma.unmap(IOVA, PAGE), lambda: device.irq(1)):
        with pytest.raises(ClosedError, match=reason):
            use()


def bent(at: int, value: bytes) -> Callable[[LyingServer, Asked], None]:
    """The true reply with other bytes at `at`."""

    def lie(server: LyingServer, asked: Asked) -> None:
        payload, fds = server.truth(asked)
        reply = bytearray(asked.reply(payload))
        reply[at : at + len(value)] = value
        server.send(bytes(reply), fds)

    return lie


def resized(change: int) -> Callable[[LyingServer, Asked], None]:
    """The true reply, longer or shorter than it should be, in step."""

    def lie(server: LyingServer, asked: Asked) -> None:
        payload, fds = server.truth(asked)
        server.send(asked.reply(payload + bytes(change) if change > 0 else payload[:change]), fds)

    return lie


# Honest servers, as a yardstick.


def test_an_honest_server_is_believed() -> None:
    with lied_to() as (device, server):
        for use in USES.values():
            use(device, server.memory)
            device.dma.unmap(IOVA, PAGE)
        assert device.region(0).read(5, 100) == pattern(5, 100)
        irq = device.irq(2)
        irq.mask(1)
        irq.unmask(1)
        flags = [vfio.IrqSet.unpack(asked.payload).flags for asked in server.told if asked.header.command == wire.DEVICE_SET_IRQS]
        assert flags == [0x24, 0x09, 0x11]


def test_a_region_is_mapped_where_the_server_says() -> None:
    with lied_to() as (device, server):
        region = device.region(MAPPED)
        assert (region.areas, region.flags) == (((0, PAGE), (2 * PAGE, PAGE)), REGION_READ | REGION_WRITE | REGION_MMAP)
        with region.map(2 * PAGE, PAGE) as mapping, server.memory.map() as all_of_it:
            all_of_it.write(2 * PAGE, b"from the server")
            assert mapping.read(0, 15) == b"from the server"
            mapping.write(8, b"the driver")
            assert all_of_it.read(2 * PAGE + 8, 10) == b"the driver"
        for offset, size in (
            (PAGE, PAGE),
            (0, 2 * PAGE),
            (0, 3 * PAGE),
            (8, PAGE),
            (0, 8),
            (2 * PAGE, 2 * PAGE),
            (0, 0),
            (-PAGE, PAGE),
        ):
            with pytest.raises(UsageError, match="cannot be mapped"):
                region.map(offset, size)
        with pytest.raises(UsageError, match="no part of it can"):
            device.region(0).map(0, PAGE)
        device.close()
        with pytest.raises(ClosedError):
            region.map(0, PAGE)


def test_long_accesses_go_in_pieces() -> None:
    with lied_to() as (device, server):
        region = device.region(0)
        assert region.read(1, 3 * BIG + 7) == pattern(1, 3 * BIG + 7)
        region.write(2, pattern(0, 2 * BIG + 1))
        accesses = [
            (asked.header.command, value.offset, value.count, asked.payload[16:])
            for asked in server.told
            if asked.header.command in (wire.REGION_READ, wire.REGION_WRITE)
            for value in [wire.RegionAccess.unpack(asked.payload)]
        ]
        assert accesses == [
            *((wire.REGION_READ, 1 + at, min(BIG, 3 * BIG + 7 - at), b"") for at in range(0, 3 * BIG + 7, BIG)),
            (wire.REGION_WRITE, 2, BIG, pattern(0, BIG)),
            (wire.REGION_WRITE, 2 + BIG, BIG, pattern(0, BIG)),
            (wire.REGION_WRITE, 2 + 2 * BIG, 1, b"\0"),
        ]


# Every reply: header fields, lengths, errors, silence.


@every_command
def test_an_error_with_a_body_is_an_error_and_leaves_the_stream_in_step(number: int) -> None:
    lies = {number: lambda server, asked: server.send(asked.error(errno.ENXIO, bytes(100)), [server.bell])}
    with lied_to(lies) as (device, server):
        if number == wire.DEVICE_GET_REGION_IO_FDS:
            with pytest.raises(UnavailableError, match="has no eventfds for region 0"):
                USES[number](device, server.memory)
        else:
            kind = DmaError if number in (wire.DMA_MAP, wire.DMA_UNMAP) else RefusedError
            with pytest.raises(kind, match=f"{wire.COMMANDS[number].name} refused: ENXIO"):
                USES[number](device, server.memory)
        server.lies.clear()
        assert device.region(0).read(0, 4) == pattern(0, 4)


@pytest.mark.parametrize(("code", "name"), [(0, "EIO"), (errno.EINVAL, "EINVAL"), (4095, "an errno of its own")])
def test_errnos_have_names(code: int, name: str) -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        reply = bytearray(asked.error(1))
        reply[12:16] = code.to_bytes(4, "little")
        server.send(bytes(reply))

    with lied_to({wire.REGION_READ: lie}) as (device, server):
        kind = UsageError if code == errno.EINVAL else RefusedError
        with pytest.raises(kind, match=f"REGION_READ refused: {name}"):
            device.region(0).read(0, 4)
        server.lies.clear()
        assert device.region(0).read(0, 4) == pattern(0, 4)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (2, b"\1"),
        (2, b"\x63"),
        (4, b"\0\0\0\0"),
        (4, b"\x0f\0\0\0"),
        (4, b"\xff\xff\xff\xff"),
        (8, b"\2"),
        (8, b"\x41"),
        (8, b"\x20"),
    ],
    ids=["command", "unknown command", "size 0", "size 15", "huge size", "type", "reserved flag", "command with error"],
)
@every_command
def test_a_header_that_cannot_be_is_the_end(number: int, at: int, value: bytes) -> None:
    with lied_to({number: bent(at, value)}) as (device, server):
        with pytest.raises(ProtocolError) as raised:
            USES[number](device, server.memory)
        dead(device, "message|command")
        assert str(raised.value)


EMPTY = (wire.DMA_MAP, wire.DEVICE_SET_IRQS, wire.DEVICE_RESET)
"""Replies that are nothing but a header."""
OPEN = (wire.DEVICE_GET_IRQ_INFO, wire.DEVICE_GET_REGION_INFO, wire.DMA_UNMAP)
"""Replies that may be longer: a client takes what it knows."""


@pytest.mark.parametrize(
    ("number", "change"),
    [(number, change) for number in sorted(USES) for change in (1, 4, -1, -4) if change > 0 or number not in EMPTY],
)
def test_a_reply_of_another_length_is_the_end(number: int, change: int) -> None:
    with lied_to({number: resized(change)}) as (device, server):
        if change > 0 and number in OPEN:
            USES[number](device, server.memory)
            assert device.region(0).read(0, 4) == pattern(0, 4)
        else:
            with pytest.raises(ProtocolError):
                USES[number](device, server.memory)
            dead(device, "need")


@pytest.mark.parametrize("at", range(16, 32))
@pytest.mark.parametrize("number", [wire.REGION_READ, wire.REGION_WRITE])
def test_a_reply_to_another_access_is_the_end(number: int, at: int) -> None:
    with lied_to({number: bent(at, b"\x5a")}) as (device, server):
        with pytest.raises(ProtocolError, match="was not asked for"):
            USES[number](device, server.memory)
        dead(device, "was not asked for")


@pytest.mark.parametrize("at", range(24, 40))
def test_an_unmap_of_something_else_is_the_end(at: int) -> None:
    why = "were unmapped, need 0x1000 at 0x100000000"
    with lied_to({wire.DMA_UNMAP: bent(at, b"\x5a")}) as (device, server), pytest.raises(ProtocolError, match=why):
        dma_unmap(device, server.memory)


@pytest.mark.parametrize(
    ("number", "at"), [(wire.DEVICE_GET_REGION_INFO, 24), (wire.DEVICE_GET_REGION_IO_FDS, 24), (wire.DEVICE_GET_IRQ_INFO, 24)]
)
def test_an_info_of_another_index_is_the_end(number: int, at: int) -> None:
    with lied_to({number: bent(at, b"\6")}) as (device, server):
        with pytest.raises(ProtocolError, match=r"need [012]"):
            USES[number](device, server.memory)
        dead(device, "need")


@every_command
def test_a_reply_with_another_number_is_dropped_and_the_wait_ends(number: int) -> None:
    with lied_to() as (device, server):
        use = USES[number]
        device.region(0)
        if number == wire.DEVICE_SET_IRQS:
            device.irq(2)
        if number == wire.DMA_UNMAP:
            dma_map(device, server.memory)
            use = unmap_only
        server.lies[number] = bent(0, b"\xff\xff")
        device.timeout = SHORT
        with pytest.raises(WaitTimeout, match=f"the reply to {wire.COMMANDS[number].name}"):
            use(device, server.memory)
        assert device.core.stray_replies == 1
        dead(device, r"waited 0\.3 s")


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 35])
def test_silence_in_mid_reply_ends_in_a_timeout(size: int) -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        server.send(asked.reply(server.truth(asked)[0])[:size])

    with lied_to({wire.REGION_READ: lie}) as (device, _):
        region = device.region(0)
        device.timeout = SHORT
        with pytest.raises(WaitTimeout, match=r"waited 0\.3 s for vfio-user: the reply to REGION_READ"):
            region.read(0, 4)
        dead(device, "the reply to REGION_READ")


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 35])
@every_command
def test_an_end_in_mid_reply_is_told(number: int, size: int) -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        payload, fds = server.truth(asked)
        part = asked.reply(payload)[:size]
        if part and size < 16 + len(payload):
            server.send(part, fds)
        server.sock.shutdown(socket.SHUT_RDWR)

    with lied_to({number: lie}) as (device, server):
        with pytest.raises(ClosedError, match="the server has closed the connection"):
            USES[number](device, server.memory)
        dead(device, "the server has closed the connection")


@every_command
def test_a_reply_that_comes_byte_by_byte(number: int) -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        payload, fds = server.truth(asked)
        for at, byte in enumerate(asked.reply(payload)):
            server.send(bytes([byte]), fds if at == 0 else ())

    with lied_to({number: lie}) as (device, server):
        USES[number](device, server.memory)
        assert device.region(0).read(0, 4) == pattern(0, 4)


@every_command
def test_descriptors_that_nobody_asked_for_are_closed(number: int) -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        payload, fds = server.truth(asked)
        server.send(asked.reply(payload), [*fds, *[server.memory.fd] * (200 - len(fds))])

    with lied_to({number: lie}) as (device, server):
        for _ in range(3):
            USES[number](device, server.memory)
            device.dma.unmap(IOVA, PAGE)
        assert device.region(0).read(0, 4) == pattern(0, 4)


def test_replies_that_nobody_asked_for_are_counted_and_dropped() -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        for number in (0, 50_000):
            header = wire.Header(message_id=number, command=asked.header.command)
            server.send(wire.encode_reply(header, bytes(20)), [server.bell])
        server.answer(asked)
        server.send(asked.reply(bytes(20)), [server.bell])

    with lied_to({wire.REGION_READ: lie, wire.DEVICE_GET_REGION_IO_FDS: lie}) as (device, _):
        for _ in range(3):
            assert device.region(0).read(8, 4) == pattern(8, 4)
        assert device.region(0).doorbell(BELLS[0])
        device.reset()
        assert device.core.stray_replies == 12


def test_descriptors_that_find_no_room_are_missed() -> None:
    """As many as Linux passes are asked for, so some are lost only if this process may not have so many."""

    def lie(server: LyingServer, asked: Asked) -> None:
        server.send(asked.reply(server.truth(asked)[0]), [server.bell] * 200)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with lied_to({wire.DEVICE_GET_REGION_INFO: lie}) as (device, server):
        free = os.dup(server.bell)  # the lowest that is free
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, hard))
        try:
            with pytest.raises(UnavailableError, match="DEVICE_GET_REGION_INFO were lost: has this process too many open"):
                device.region(MAPPED)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        server.lies.clear()
        assert device.region(MAPPED).areas


def test_a_server_that_is_silent_in_the_end() -> None:
    with lied_to({wire.DEVICE_RESET: lambda server, asked: None}) as (device, _):
        device.timeout = SHORT
        device.close()
        with pytest.raises(ClosedError, match="the reply to DEVICE_RESET"):
            device.region(0)


def test_a_server_that_does_not_hang_up() -> None:
    gate = threading.Event()

    def lie(server: LyingServer, asked: Asked) -> None:
        server.answer(asked)
        gate.wait(PATIENCE)

    with lied_to({wire.DEVICE_RESET: lie}) as (device, _):
        device.timeout = SHORT
        device.close()
        gate.set()


# VERSION and the counts.


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "Version: have 0 bytes"),
        (b"\0\0\0", "Version: have 3 bytes"),
        (wire.Version(major=1).pack(), "vfio-user version 1.0, need 0"),
        (wire.Version().pack() + b"{", "is no JSON of capabilities"),
        (wire.Version().pack() + b'{"capabilities":{"max_msg_fds":-1}}\0', "max_msg_fds is -1, need 0 to 1024"),
        (wire.Version().pack() + b'{"capabilities":{"max_msg_fds":1025}}\0', "max_msg_fds is 1025, need 0 to 1024"),
        (wire.Version().pack() + b'{"capabilities":{"max_data_xfer_size":7}}\0', "max_data_xfer_size is 7 bytes, need 8"),
        (wire.Version().pack() + b'{"capabilities":{"max_data_xfer_size":67108865}}\0', "need 1 to 67108864"),
        (wire.Version().pack() + b'{"capabilities":{"max_dma_maps":0}}\0', "max_dma_maps is 0"),
        (wire.Version().pack() + b'{"capabilities":{"pgsizes":0}}\0', "pgsizes is 0"),
        (wire.Version().pack() + b'{"capabilities":{"write_multiple":1}}\0', "is no JSON of capabilities"),
        (wire.Version().pack() + b" " * 5000, "VERSION: 5004 bytes, limit 4096"),
    ],
)
def test_a_version_that_cannot_be(payload: bytes, why: str) -> None:
    lies = {wire.VERSION: lambda server, asked: server.send(asked.reply(payload))}
    with lying(lies) as (sock, _), pytest.raises(ProtocolError, match=why):
        UserDevice(sock, timeout=PATIENCE)


@pytest.mark.parametrize(
    "payload",
    [
        wire.Version().pack(),
        wire.Version(minor=2).pack() + b"\0",
        wire.Version(minor=9).pack() + b"{}",
        wire.Version().pack() + b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true,"fd_index":0},"x":[1]}}',
    ],
)
def test_versions_of_other_servers(payload: bytes) -> None:
    with lied_to({wire.VERSION: lambda server, asked: server.send(asked.reply(payload))}) as (device, _):
        assert device.capabilities in (Capabilities(), Capabilities(max_msg_fds=8))
        assert device.region(0).read(8, 4) == pattern(8, 4)


def test_a_server_that_does_not_want_us() -> None:
    lies = {wire.VERSION: lambda server, asked: server.send(asked.error(errno.EBUSY))}
    with lying(lies) as (sock, _), pytest.raises(RefusedError, match=r"somebody else has this device.*EBUSY") as raised:
        UserDevice(sock, timeout=PATIENCE)
    assert raised.value.status == errno.EBUSY


@pytest.mark.parametrize(("regions", "irqs"), [(513, 5), (9, 513), (0xFFFFFFFF, 5), (9, 0xFFFFFFFF)])
def test_counts_that_make_no_sense(regions: int, irqs: int) -> None:
    value = wire.DeviceInfo(flags=3, region_count=regions, irq_count=irqs).pack()
    lies = {wire.DEVICE_GET_INFO: lambda server, asked: server.send(asked.reply(value))}
    with lying(lies) as (sock, _), pytest.raises(ProtocolError, match="limit 512"):
        UserDevice(sock, timeout=PATIENCE)


def test_a_device_that_cannot_be_reset() -> None:
    value = wire.DeviceInfo(flags=2, region_count=9, irq_count=5).pack()
    with lied_to({wire.DEVICE_GET_INFO: lambda server, asked: server.send(asked.reply(value))}) as (device, server):
        assert not device.info.resettable
        with pytest.raises(UnavailableError, match="cannot be reset"):
            device.reset()
        device.close()
        assert wire.DEVICE_RESET not in [asked.header.command for asked in server.told]


# Regions.


def chain(*links: tuple[int, int, int], size: int = 96) -> bytes:
    """The info of the region that may be mapped, with capabilities (where, id, next)."""
    payload = bytearray(size)
    payload[:32] = vfio.RegionInfo(argsz=size, flags=0xF, index=MAPPED, cap_offset=links[0][0], size=4 * PAGE).pack()
    for at, kind, following in reversed(links):
        if at >= 32:
            payload[at : at + 8] = vfio.CapabilityHeader(id=kind, next=following).pack()
    return bytes(payload[:size])


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (chain((32, 9, 32)), "the chain has a loop"),
        (chain((32, 9, 48), (48, 9, 32)), "the chain has a loop"),
        (chain((32, 9, 36), (36, 9, 0)), "the chain has a loop"),
        (chain((31, 9, 0)), "a capability at 31"),
        (chain((8, 9, 0)), "a capability at 8"),
        (chain((89, 9, 0)), "a capability at 89, need 32 to 88"),
        (chain((32, 9, 0xFFFFFFFF)), "a capability at 4294967295"),
        (chain((88, vfio.CAPABILITY_SPARSE_MMAP, 0)), "SparseMmap: have 8 bytes, need 16"),
        (chain((88, vfio.CAPABILITY_TYPE, 0)), "RegionType: have 8 bytes, need 16"),
        (chain((32, 1, 64), (64, 1, 0)), "two lists of sparse areas"),
        (region_info([(0, PAGE), (0, PAGE)]), "overlaps the one that ends at 0x1000"),
        (region_info([(0, 2 * PAGE), (PAGE, PAGE)]), "overlaps"),
        (region_info([(0, 5 * PAGE)]), "an area of 0x5000 bytes at 0x0, the region has 0x4000"),
        (region_info([((1 << 64) - PAGE, PAGE)]), "an area of 0x1000 bytes"),
        (region_info([(0, 1)] * 64)[:-1], "need 1024 bytes, have 1023"),
        (vfio.RegionInfo(argsz=(1 << 16) + 1, flags=7, index=MAPPED, size=PAGE).pack(), "argsz is 65537 bytes, limit 65536"),
    ],
)
def test_a_region_that_contradicts_itself(payload: bytes, why: str) -> None:
    lies = {wire.DEVICE_GET_REGION_INFO: lambda server, asked: server.send(asked.reply(payload), [server.memory.fd])}
    with lied_to(lies) as (device, _):
        with pytest.raises(ProtocolError, match=why):
            device.region(MAPPED)
        dead(device, why)


def test_a_region_with_capabilities_that_nobody_knows() -> None:
    payload = bytearray(chain((32, 77, 48), (48, vfio.CAPABILITY_TYPE, 64), (64, vfio.CAPABILITY_MSIX_MAPPABLE, 0)))
    payload[56:64] = b"\1\0\0\0\2\0\0\0"
    lies = {wire.DEVICE_GET_REGION_INFO: lambda server, asked: server.send(asked.reply(bytes(payload)), [server.memory.fd])}
    with lied_to(lies) as (device, _):
        region = device.region(MAPPED)
        assert region.areas == ((0, 4 * PAGE),)
        assert (region.view.kind, region.view.msix_mappable) == ((1, 2), True)  # type: ignore[attr-defined]


def test_an_argsz_that_grows_is_followed_once() -> None:
    asked_for: list[int] = []

    def lie(server: LyingServer, asked: Asked) -> None:
        asked_for.append(vfio.RegionInfo.unpack(asked.payload).argsz)
        grown = vfio.RegionInfo(argsz=asked_for[-1] + 1, flags=7, index=MAPPED, size=PAGE).pack()
        server.send(asked.reply(grown), [server.memory.fd])

    with lied_to({wire.DEVICE_GET_REGION_INFO: lie}) as (device, _):
        with pytest.raises(UnavailableError, match="has no end"):
            device.region(MAPPED)
        device.reset()
    assert asked_for == [4096, 4097]


def test_a_reply_that_had_no_room_is_asked_for_again() -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        payload, fds = server.truth(asked)
        if vfio.RegionInfo.unpack(asked.payload).argsz < 5000:
            server.send(asked.reply((5000).to_bytes(4, "little") + payload[4:32]))
        else:
            server.send(asked.reply(payload), fds)

    with lied_to({wire.DEVICE_GET_REGION_INFO: lie}) as (device, _):
        assert device.region(MAPPED).areas == ((0, PAGE), (2 * PAGE, PAGE))


def unsealed() -> int:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    return fd


def short() -> int:
    memory = SharedMemory(PAGE)
    fd = os.dup(memory.fd)
    memory.close()
    return fd


FILES: dict[str, Callable[[], int]] = {
    "unsealed": unsealed,
    "short": short,
    "device": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "file": lambda: os.open(__file__, os.O_RDONLY | os.O_CLOEXEC),
    "eventfd": eventfd.make,
}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_only_sealed_memory_that_is_long_enough_is_mapped(kind: str) -> None:
    fd = FILES[kind]()
    try:
        lies = {wire.DEVICE_GET_REGION_INFO: lambda server, asked: server.send(asked.reply(server.truth(asked)[0]), [fd])}
        with lied_to(lies) as (device, _):
            region = device.region(MAPPED)
            assert (region.areas, region.flags) == ((), REGION_READ | REGION_WRITE)
            assert region.read(8, 4) == pattern(8, 4)
    finally:
        os.close(fd)


def test_a_region_to_be_mapped_without_a_file_is_read_by_messages() -> None:
    with lied_to({wire.DEVICE_GET_REGION_INFO: lambda server, asked: server.send(asked.reply(server.truth(asked)[0]))}) as (
        device,
        _,
    ):
        assert device.region(MAPPED).areas == ()
        assert device.region(MAPPED).read(8, 4) == pattern(8, 4)


def test_areas_that_are_no_whole_pages_are_not_mapped() -> None:
    payload = region_info([(0, PAGE - 1), (PAGE + 8, PAGE - 8), (2 * PAGE, PAGE + 1)])
    lies = {wire.DEVICE_GET_REGION_INFO: lambda server, asked: server.send(asked.reply(payload), [server.memory.fd])}
    with lied_to(lies) as (device, _):
        assert device.region(MAPPED).areas == ((2 * PAGE, PAGE),)


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_rights_of_a_region(flags: int) -> None:
    payload = vfio.RegionInfo(flags=flags, index=0, size=PAGE).pack()
    with lied_to({wire.DEVICE_GET_REGION_INFO: lambda server, asked: server.send(asked.reply(payload))}) as (device, _):
        region = device.region(0)
        for right, use in ((1, lambda: region.read(0, 4)), (2, lambda: region.write(0, b"abcd"))):
            if flags & right:
                use()
            else:
                with pytest.raises(UsageError, match="cannot be"):
                    use()


# Doorbells.


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (io_fds(BELLS)[:-1], "79 bytes with 2 descriptors' entries, need 40 or 48 each"),
        (io_fds(BELLS) + b"\0", "81 bytes with 2"),
        (io_fds([0x3FFD]), "a descriptor for 4 bytes at 0x3ffd, the region has 0x4000"),
        (io_fds([(1 << 64) - 4]), "a descriptor for 4 bytes"),
        (
            wire.RegionIoFds(argsz=56, count=1).pack() + wire.SubRegion(offset=0, size=4, fd_index=1).pack(),
            "descriptor 1 of a message with 1",
        ),
        (wire.RegionIoFds(argsz=16, count=254).pack() + bytes(254 * 40), "254 places with descriptors, limit 253"),
        (wire.RegionIoFds(argsz=16, count=0xFFFFFFFF).pack(), "limit 253"),
        (wire.RegionIoFds(argsz=1 << 20).pack(), "argsz is 1048576 bytes, limit 65536"),
    ],
)
def test_doorbells_that_cannot_be(payload: bytes, why: str) -> None:
    lies = {wire.DEVICE_GET_REGION_IO_FDS: lambda server, asked: server.send(asked.reply(payload), [server.bell])}
    with lied_to(lies) as (device, _):
        with pytest.raises(ProtocolError, match=why):
            device.region(0).doorbell(BELLS[0])
        dead(device, why)


@pytest.mark.parametrize("extra", [b"", bytes(8)])
def test_entries_of_both_lengths(extra: bytes) -> None:
    lies = {
        wire.DEVICE_GET_REGION_IO_FDS: lambda server, asked: server.send(asked.reply(io_fds(BELLS, extra=extra)), [server.bell])
    }
    with lied_to(lies) as (device, server):
        bell = device.region(0).doorbell(BELLS[1])
        assert device.region(0).doorbell(BELLS[0]) == bell
        eventfd.ring(bell)
        assert eventfd.take(server.bell)
        with pytest.raises(UsageError, match="no doorbell register at 0x1008"):
            device.region(0).doorbell(0x1008)


@pytest.mark.parametrize(
    "row",
    [
        wire.SubRegion(offset=0x1000, size=4, type=1),
        wire.SubRegion(offset=0x1000, size=4, type=2),
        wire.SubRegion(offset=0x1000, size=4, flags=1),
        wire.SubRegion(offset=0x1000, size=8),
        wire.SubRegion(offset=0x1002, size=4),
    ],
)
def test_descriptors_of_another_kind_are_no_doorbells(row: wire.SubRegion) -> None:
    payload = wire.RegionIoFds(argsz=56, count=1).pack() + row.pack()
    lies = {wire.DEVICE_GET_REGION_IO_FDS: lambda server, asked: server.send(asked.reply(payload), [server.bell])}
    with lied_to(lies) as (device, _), pytest.raises(UnavailableError, match="write the register instead"):
        device.region(0).doorbell(0x1000)


@pytest.mark.parametrize("kind", ["device", "file", "unsealed"])
def test_a_doorbell_that_is_no_eventfd(kind: str) -> None:
    fd = FILES[kind]()
    try:
        lies = {wire.DEVICE_GET_REGION_IO_FDS: lambda server, asked: server.send(asked.reply(io_fds(BELLS)), [fd])}
        with lied_to(lies) as (device, _), pytest.raises(ProtocolError, match="descriptor 0, for 0x1000, is not an eventfd"):
            device.region(0).doorbell(BELLS[0])
    finally:
        os.close(fd)


def test_a_doorbell_that_is_full_or_blocking_does_not_stop_the_driver() -> None:
    with lied_to() as (device, server):
        os.set_blocking(server.bell, True)
        os.eventfd_write(server.bell, (1 << 64) - 2)
        eventfd.ring(device.region(0).doorbell(BELLS[0]))


# Interrupts and memory.


def test_a_server_that_takes_no_descriptors() -> None:
    with lied_to(capabilities=Capabilities(max_msg_fds=0)) as (device, server):
        with pytest.raises(UnavailableError, match="takes no descriptors"):
            enable(device, server.memory)
        dma_map(device, server.memory)
        assert [asked.fds for asked in server.told if asked.header.command == wire.DMA_MAP] == [[]]


def test_more_maps_than_the_server_takes() -> None:
    with lied_to(capabilities=Capabilities(max_msg_fds=8, max_dma_maps=2)) as (device, server):
        for number in range(2):
            device.dma.map(IOVA + number * PAGE, server.memory.fd, 0, PAGE, 3)
        with pytest.raises(DmaError, match="there are 2 maps, limit 2"):
            device.dma.map(IOVA + 2 * PAGE, server.memory.fd, 0, PAGE, 3)


def test_larger_pages() -> None:
    with lied_to(capabilities=Capabilities(max_msg_fds=8, pgsizes=0x200000 | 0x4000)) as (device, server):
        with pytest.raises(DmaError, match="multiples of 16384 bytes"):
            dma_map(device, server.memory)
        device.dma.map(IOVA, server.memory.fd, 0, 4 * PAGE, 3)


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EINVAL, errno.ENOSPC, errno.ENOMEM])
def test_a_map_that_is_refused_is_none(code: int) -> None:
    with lied_to({wire.DMA_MAP: lambda server, asked: server.send(asked.error(code))}) as (device, server):
        for _ in range(2):
            with pytest.raises(DmaError, match=errno.errorcode[code]):
                dma_map(device, server.memory)
        server.lies.clear()
        dma_map(device, server.memory)


def test_a_map_whose_unmap_is_refused_stays() -> None:
    with lied_to({wire.DMA_UNMAP: lambda server, asked: server.send(asked.error(errno.ENOENT))}) as (device, server):
        with pytest.raises(DmaError, match="ENOENT"):
            dma_unmap(device, server.memory)
        with pytest.raises(DmaError, match="overlaps"):
            dma_map(device, server.memory)
        server.lies.clear()
        device.dma.unmap(IOVA, PAGE)


# The server's own commands.


def dma(server: LyingServer, number: int, iova: int, count: int, data: bytes = b"") -> Asked:
    """A command of the server's, and the client's answer."""
    server.ask(number, wire.DmaAccess(iova=iova, count=count).pack() + data)
    answer = server.receive()
    assert answer is not None
    return answer


def test_memory_is_read_and_written_by_messages_while_a_command_is_under_way() -> None:
    answers: list[Asked] = []

    def lie(server: LyingServer, asked: Asked) -> None:
        answers.append(dma(server, wire.DMA_WRITE, IOVA + 8, 6, b"abcdef"))
        answers.append(dma(server, wire.DMA_READ, IOVA + 10, 4))
        server.answer(asked)

    with SharedMemory(PAGE) as mine, lied_to({wire.REGION_READ: lie, wire.DEVICE_RESET: lie}) as (device, _):
        device.dma.map(IOVA, mine.fd, 0, PAGE, 3)
        assert device.region(0).read(8, 4) == pattern(8, 4)
        device.reset()
        assert device.core.served == 4
    assert [answer.header.error for answer in answers] == [0] * len(answers)
    assert answers[0].payload == wire.DmaAccess(iova=IOVA + 8, count=6).pack()
    assert answers[1].payload == wire.DmaAccess(iova=IOVA + 10, count=4).pack() + b"cdef"


def test_memory_is_read_by_messages_while_nobody_talks() -> None:
    with SharedMemory(PAGE) as mine, lied_to() as (device, server):
        device.dma.map(IOVA, mine.fd, 0, PAGE, 3)
        with mine.map() as mapping:
            mapping.write(0, b"hello")
        heard = threading.Event()

        def reset(server: LyingServer, asked: Asked) -> None:
            server.answer(asked)
            if not heard.is_set():
                for _ in range(100):
                    assert dma(server, wire.DMA_READ, IOVA, 5).payload[16:] == b"hello"
                heard.set()

        server.lies[wire.DEVICE_RESET] = reset
        device.reset()
        assert heard.wait(PATIENCE)
        assert device.core.served == 100


def test_the_servers_end_is_noticed_while_nobody_talks() -> None:
    with SharedMemory(PAGE) as mine, lied_to() as (device, server):
        device.dma.map(IOVA, mine.fd, 0, PAGE, 3)
        server.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ClosedError, match="the server has closed the connection"):
            device.reset()


def test_a_server_that_asks_without_reading_the_answers_does_not_hang_us() -> None:
    def lie(server: LyingServer, asked: Asked) -> None:
        for _ in range(10_000):
            server.ask(wire.DMA_READ, wire.DmaAccess(iova=IOVA, count=PAGE).pack())

    with SharedMemory(PAGE) as mine, lied_to() as (device, server):
        device.dma.map(IOVA, mine.fd, 0, PAGE, 3)
        region = device.region(0)
        server.lies[wire.REGION_READ] = lie
        device.timeout = SHORT
        with pytest.raises(WaitTimeout):
            region.read(0, 4)
        dead(device, r"waited 0\.3 s")


def test_a_server_that_does_not_read_does_not_hang_us() -> None:
    gate = threading.Event()

    def lie(server: LyingServer, asked: Asked) -> None:
        server.answer(asked)
        gate.wait(PATIENCE)

    with lied_to({wire.DEVICE_RESET: lie}, Capabilities(max_data_xfer_size=1 << 20)) as (device, server):
        payload = vfio.RegionInfo(flags=3, index=0, size=1 << 24).pack()
        server.lies[wire.DEVICE_GET_REGION_INFO] = lambda server, asked: server.send(asked.reply(payload))
        region = device.region(0)
        device.reset()
        device.timeout = SHORT
        with pytest.raises(WaitTimeout):
            region.write(0, bytes(1 << 20))
        gate.set()
        dead(device, r"waited 0\.3 s")


def test_a_large_access_and_a_large_question_at_the_same_time() -> None:
    """Each side sends more than the socket holds before it reads."""

    def lie(server: LyingServer, asked: Asked) -> None:
        server.answer(asked)
        size = 1 << 20
        server.ask(wire.DMA_WRITE, wire.DmaAccess(iova=IOVA, count=size).pack() + b"\x5a" * size)

    with (
        SharedMemory(1 << 20) as mine,
        lied_to(capabilities=Capabilities(max_msg_fds=8, max_data_xfer_size=1 << 20)) as (device, server),
    ):
        payload = vfio.RegionInfo(flags=3, index=0, size=1 << 24).pack()
        server.lies[wire.DEVICE_GET_REGION_INFO] = lambda server, asked: server.send(asked.reply(payload))
        region = device.region(0)
        device.dma.map(IOVA, mine.fd, 0, 1 << 20, 3)
        server.lies[wire.DEVICE_SET_IRQS] = lie
        device.irq(2).disable(0)
        region.write(0, bytes(1 << 20))
        with mine.map() as mapping:
            assert mapping.read(0, 1 << 20) == b"\x5a" * (1 << 20)
