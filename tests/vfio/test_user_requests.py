"""The catalogue of bad requests: what a vfio-user client may not do, and the errno that it gets.

After each of them the stream is in step, no descriptor is left, and nothing of the device has changed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_user_core import SEEDS, fuzz_user_core, fuzz_user_core_quick
from tests.vfio.user_rig import GREETING, Rig, rig
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire

IOVA = 1 << 32
TOP = 1 << 64
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32
EINVAL = errno.EINVAL


@pytest.fixture
def served() -> Iterator[Rig]:
    with rig() as made:
        assert made.ask(wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=4 * PAGE).pack(), [made.memory.fd]).errno == 0
        yield made


def look(made: Rig) -> object:
    """All that a request might have changed."""
    windows = made.function.windows
    registers = b"".join(windows[0].read(offset, 8) for offset in range(0, 0x40, 8))
    return (
        registers,
        windows[7].read(0, 256),
        made.function.domain.maps,
        [os.fstat(fd).st_ino for fd in made.function.vectors.fds],
    )


def refused(made: Rig, code: int, number: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
    before = look(made)
    answer = made.ask(number, payload, fds)
    assert (answer.errno, answer.payload, answer.fds) == (code, b"", ())
    assert look(made) == before
    assert made.in_step()
    assert not made.core.closed


SHORT = {number: command.request.kind.SIZE for number, command in wire.COMMANDS.items() if command.request.kind}


@pytest.mark.parametrize("number", sorted(SHORT), ids=lambda number: wire.COMMANDS[number].name)
def test_a_request_that_is_too_short(served: Rig, number: int) -> None:
    for length in (0, 1, SHORT[number] - 1):
        refused(served, EINVAL, number, bytes(length))


@pytest.mark.parametrize(
    "number",
    [number for number in sorted(SHORT) if wire.COMMANDS[number].request.behind(wire.COMMANDS[number].request.kind()) == 0],
    ids=lambda number: wire.COMMANDS[number].name,
)
def test_a_request_that_is_too_long(served: Rig, number: int) -> None:
    for more in (1, 8, 4096):
        refused(served, EINVAL, number, wire.COMMANDS[number].request.kind().pack() + bytes(more))


@pytest.mark.parametrize(
    "number",
    [number for number in sorted(SHORT) if "argsz" in wire.COMMANDS[number].request.kind.OFFSETS],
    ids=lambda number: wire.COMMANDS[number].name,
)
def test_an_argsz_that_is_too_small(served: Rig, number: int) -> None:
    for argsz in (0, SHORT[number] - 1):
        refused(served, EINVAL, number, wire.COMMANDS[number].request.kind(argsz=argsz).pack())


NO_FDS = sorted(wire.COMMANDS.keys() - {wire.DMA_MAP, wire.DMA_UNMAP, wire.DEVICE_SET_IRQS})


@pytest.mark.parametrize("number", NO_FDS, ids=lambda number: wire.COMMANDS[number].name)
def test_descriptors_where_none_belong(served: Rig, number: int) -> None:
    kind = wire.COMMANDS[number].request.kind
    refused(served, EINVAL, number, kind().pack() if kind else b"", (served.memory.fd, served.memory.fd))


@pytest.mark.parametrize("number", [0, 14, 19, 99, 0xFFFF])
def test_an_unknown_command(served: Rig, number: int) -> None:
    refused(served, errno.ENOSYS, number, bytes(100), (served.memory.fd,))


@pytest.mark.parametrize("number", [wire.DMA_READ, wire.DMA_WRITE])
def test_a_command_of_the_servers(served: Rig, number: int) -> None:
    refused(served, EINVAL, number, wire.DmaAccess(iova=IOVA).pack())


def test_a_second_version(served: Rig) -> None:
    refused(served, EINVAL, wire.VERSION, GREETING[16:])


@pytest.mark.parametrize(
    ("code", "flags", "iova", "size", "offset"),
    [
        (EINVAL, 0, IOVA * 2, PAGE, 0),
        (EINVAL, 4, IOVA * 2, PAGE, 0),
        (EINVAL, 0x13, IOVA * 2, PAGE, 0),
        (EINVAL, 0x80000003, IOVA * 2, PAGE, 0),
        (EINVAL, 3, IOVA * 2, 0, 0),
        (EINVAL, 3, IOVA * 2 + 1, PAGE, 0),
        (EINVAL, 3, IOVA * 2, PAGE + 1, 0),
        (EINVAL, 3, IOVA * 2, PAGE, 1),
        (EINVAL, 3, TOP - PAGE, 2 * PAGE, 0),
        (EINVAL, 3, TOP - PAGE, PAGE, 0),
        (EINVAL, 3, IOVA * 2, TOP - PAGE, 0),
        (EINVAL, 3, IOVA * 2, PAGE, TOP - PAGE),
        (EINVAL, 3, IOVA * 2, 2 * PAGE, TOP - PAGE),
        (EINVAL, 3, IOVA * 2, PAGE, 8 * PAGE),
        (EINVAL, 3, IOVA * 2, 1 << 39, 0),
        (errno.ENOSPC, 3, IOVA * 2, 1 << 41, 0),
        (errno.EEXIST, 3, IOVA, 4 * PAGE, 0),
        (errno.EEXIST, 3, IOVA + PAGE, PAGE, 0),
        (errno.EEXIST, 3, IOVA - PAGE, 2 * PAGE, 0),
        (errno.EEXIST, 3, IOVA - PAGE, 8 * PAGE, 0),
        (errno.EEXIST, 1, IOVA + 3 * PAGE, 2 * PAGE, 0),
    ],
)
def test_a_map_that_cannot_be(served: Rig, code: int, flags: int, iova: int, size: int, offset: int) -> None:
    value = wire.DmaMap(flags=flags, iova=iova, size=size, offset=offset)
    refused(served, code, wire.DMA_MAP, value.pack(), (served.memory.fd,))


def test_a_map_of_two_files(served: Rig) -> None:
    value = wire.DmaMap(flags=3, iova=IOVA * 2, size=PAGE)
    refused(served, EINVAL, wire.DMA_MAP, value.pack(), (served.memory.fd, served.memory.fd))


def test_rings_are_not_where_only_the_client_can_read(served: Rig) -> None:
    """Such a map is made, as QEMU maps ROMs so; the function's admin ring cannot be there."""
    assert served.ask(wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA * 2, size=4 * PAGE).pack()).errno == 0
    for offset, value in (
        (reg.REG_ADMIN_IOVA + 4, 2),
        (reg.REG_ADMIN_UPSTREAM, 2),
        (reg.REG_ADMIN_DOWNSTREAM, 2),
        (reg.REG_CONTROL, 1),
    ):
        head = wire.RegionAccess(offset=offset, region=0, count=4).pack()
        assert served.ask(wire.REGION_WRITE, head + value.to_bytes(4, "little")).errno == 0
    words = [served.function.read(offset, 4)[0] for offset in (reg.REG_STATUS, reg.REG_ERROR)]
    assert words == [reg.STATUS_FAILED, reg.ERROR_ADMIN_MEMORY]
    assert [fault.reason for fault in served.function.domain.faults()] == ["memory that can be copied only, not mapped"]
    assert served.ask(wire.DMA_UNMAP, wire.DmaUnmap(iova=IOVA * 2, size=4 * PAGE).pack()).errno == 0
    assert len(served.function.domain.maps) == 1


def _pipe() -> list[int]:
    return list(os.pipe())


@pytest.mark.parametrize(
    "make",
    [
        _pipe,
        lambda: [os.open("/dev/zero", os.O_RDWR)],
        lambda: [os.open("/", os.O_RDONLY)],
        lambda: [os.open("/proc/self/status", os.O_RDONLY)],
        lambda: [os.open("/", os.O_PATH)],
        lambda: [eventfd.make()],
    ],
    ids=["pipe", "device", "directory", "file of procfs", "path", "eventfd"],
)
def test_a_map_of_what_is_neither_memory_nor_a_file(served: Rig, make: Callable[[], list[int]]) -> None:
    fds = make()
    try:
        refused(served, EINVAL, wire.DMA_MAP, wire.DmaMap(flags=1, iova=IOVA * 2, size=PAGE).pack(), (fds[0],))
    finally:
        for fd in fds:
            os.close(fd)


def test_more_maps_than_there_may_be() -> None:
    with rig(max_maps=3) as served:
        for number in range(3):
            value = wire.DmaMap(flags=1, iova=IOVA + 8 * number * PAGE, size=PAGE)
            assert served.ask(wire.DMA_MAP, value.pack(), [served.memory.fd] if number else []).errno == 0
        value = wire.DmaMap(flags=1, iova=IOVA * 2, size=PAGE)
        refused(served, errno.ENOSPC, wire.DMA_MAP, value.pack(), (served.memory.fd,))
        refused(served, errno.ENOSPC, wire.DMA_MAP, value.pack())


def test_more_bytes_than_may_be_mapped() -> None:
    with rig(max_bytes=4 * PAGE) as served:
        for code, pages in ((0, 3), (errno.ENOSPC, 2), (0, 1)):
            value = wire.DmaMap(flags=1, iova=IOVA * (5 - pages), size=pages * PAGE)
            assert served.ask(wire.DMA_MAP, value.pack(), [served.memory.fd]).errno == code


@pytest.mark.parametrize(
    ("flags", "iova", "size", "behind"),
    [
        (0, IOVA, 0, 0),
        (0, IOVA + 1, PAGE, 0),
        (0, IOVA, PAGE + 1, 0),
        (0, IOVA, PAGE, 0),
        (0, IOVA + PAGE, PAGE, 0),
        (0, IOVA - PAGE, 2 * PAGE, 0),
        (0, TOP - PAGE, 2 * PAGE, 0),
        (0, PAGE, TOP - PAGE, 0),
        (1, IOVA, 4 * PAGE, 16),
        (1, IOVA, 4 * PAGE, 0),
        (0, IOVA, 4 * PAGE, 16),
        (2, IOVA, 0, 0),
        (2, 0, PAGE, 0),
        (3, 0, 0, 0),
        (4, IOVA, 4 * PAGE, 0),
    ],
)
def test_an_unmap_that_cannot_be(served: Rig, flags: int, iova: int, size: int, behind: int) -> None:
    refused(served, EINVAL, wire.DMA_UNMAP, wire.DmaUnmap(flags=flags, iova=iova, size=size).pack() + bytes(behind))


@pytest.mark.parametrize("index", [9, 10, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_region_that_is_not_there(served: Rig, index: int) -> None:
    refused(served, EINVAL, wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(index=index).pack())
    refused(served, EINVAL, wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096, index=index).pack())
    refused(served, EINVAL, wire.REGION_READ, wire.RegionAccess(region=index, count=4).pack())
    refused(served, EINVAL, wire.REGION_WRITE, wire.RegionAccess(region=index, count=4).pack() + bytes(4))


@pytest.mark.parametrize("index", [5, 6, 0xFFFFFFFF])
def test_an_interrupt_that_is_not_there(served: Rig, index: int) -> None:
    refused(served, EINVAL, wire.DEVICE_GET_IRQ_INFO, vfio.IrqInfo(index=index).pack())
    refused(served, EINVAL, wire.DEVICE_SET_IRQS, vfio.IrqSet(flags=NONE | TRIGGER, index=index).pack())


def test_descriptors_of_a_region_with_flags_or_a_count(served: Rig) -> None:
    for value in (wire.RegionIoFds(argsz=4096, flags=1), wire.RegionIoFds(argsz=4096, count=1)):
        refused(served, EINVAL, wire.DEVICE_GET_REGION_IO_FDS, value.pack())


@pytest.mark.parametrize(
    ("code", "flags", "index", "start", "count", "behind"),
    [
        (EINVAL, 0, 2, 0, 1, 0),
        (EINVAL, NONE, 2, 0, 1, 0),
        (EINVAL, TRIGGER, 2, 0, 1, 0),
        (EINVAL, NONE | BOOL | TRIGGER, 2, 0, 1, 1),
        (EINVAL, BOOL | EVENTFD | TRIGGER, 2, 0, 1, 0),
        (EINVAL, NONE | MASK | UNMASK, 2, 0, 1, 0),
        (EINVAL, NONE | TRIGGER | 64, 2, 0, 1, 0),
        (EINVAL, NONE | TRIGGER | 1 << 31, 2, 0, 1, 0),
        (EINVAL, NONE | TRIGGER, 0, 0, 0, 0),
        (EINVAL, NONE | TRIGGER, 1, 0, 1, 0),
        (EINVAL, NONE | TRIGGER, 2, 65, 0, 0),
        (EINVAL, NONE | TRIGGER, 2, 65, 1, 0),
        (EINVAL, NONE | TRIGGER, 2, 64, 2, 0),
        (EINVAL, NONE | TRIGGER, 2, 0, 66, 0),
        (EINVAL, NONE | TRIGGER, 2, 1, 0, 0),
        (EINVAL, NONE | TRIGGER, 2, 1, 0xFFFFFFFF, 0),
        (EINVAL, NONE | TRIGGER, 2, 0xFFFFFFFF, 1, 0),
        (EINVAL, BOOL | TRIGGER, 2, 0, 0, 0),
        (EINVAL, BOOL | TRIGGER, 2, 0, 3, 2),
        (EINVAL, BOOL | TRIGGER, 2, 0, 3, 4),
        (EINVAL, EVENTFD | TRIGGER, 2, 0, 0, 0),
        (EINVAL, EVENTFD | TRIGGER, 2, 0, 1, 4),
        (errno.ENOTTY, NONE | MASK, 2, 0, 1, 0),
        (errno.ENOTTY, NONE | UNMASK, 2, 0, 1, 0),
        (errno.ENOTTY, BOOL | MASK, 2, 0, 2, 2),
    ],
)
def test_interrupts_that_cannot_be_set(
    served: Rig, code: int, flags: int, index: int, start: int, count: int, behind: int
) -> None:
    value = vfio.IrqSet(flags=flags, index=index, start=start, count=count)
    refused(served, code, wire.DEVICE_SET_IRQS, value.pack() + bytes(behind))


@pytest.mark.parametrize(
    ("flags", "count", "given"), [(EVENTFD, 2, 1), (EVENTFD, 1, 2), (NONE, 1, 1), (NONE, 0, 1), (BOOL, 1, 1)]
)
def test_another_number_of_descriptors_than_of_vectors(served: Rig, flags: int, count: int, given: int) -> None:
    mine = eventfd.make()
    try:
        value = vfio.IrqSet(flags=flags | TRIGGER, index=2, count=count).pack() + bytes(count if flags == BOOL else 0)
        refused(served, EINVAL, wire.DEVICE_SET_IRQS, value, (mine,) * given)
    finally:
        os.close(mine)


def test_an_interrupt_to_what_is_no_eventfd_sets_none_of_them(served: Rig) -> None:
    mine = eventfd.make()
    try:
        value = vfio.IrqSet(flags=EVENTFD | TRIGGER, index=2, count=2).pack()
        refused(served, EINVAL, wire.DEVICE_SET_IRQS, value, (mine, served.memory.fd))
        eventfd.ring(served.function.vectors.fds[0])
        assert not eventfd.take(mine)
    finally:
        os.close(mine)


ACCESSES = [
    (0, 0, 0),
    (0, 0, 1),
    (0, 0, 16),
    (0, 2, 4),
    (0, 0x2000, 4),
    (0, 0x1FFC, 8),
    (0, TOP - 4, 4),
    (0, TOP - 4, 8),
    (1, 0, 4),
    (2, 0, 2),
    (2, 0xFFC, 8),
    (6, 0, 4),
    (7, 0, 257),
    (7, 0xFF, 2),
    (7, 0x100, 1),
    (8, 0, 4),
]


@pytest.mark.parametrize(("region", "offset", "count"), ACCESSES)
def test_a_read_that_cannot_be(served: Rig, region: int, offset: int, count: int) -> None:
    refused(served, EINVAL, wire.REGION_READ, wire.RegionAccess(region=region, offset=offset, count=count).pack())


@pytest.mark.parametrize(("region", "offset", "count"), ACCESSES)
def test_a_write_that_cannot_be(served: Rig, region: int, offset: int, count: int) -> None:
    head = wire.RegionAccess(region=region, offset=offset, count=count)
    refused(served, EINVAL, wire.REGION_WRITE, head.pack() + b"\xff" * count)


@pytest.mark.parametrize("count", [(1 << 16) + 1, 1 << 20, 0xFFFFFFFF])
def test_a_read_of_more_than_was_agreed(served: Rig, count: int) -> None:
    refused(served, EINVAL, wire.REGION_READ, wire.RegionAccess(region=7, count=count).pack())


@pytest.mark.parametrize("count", [0, 1, 3, 5, 0xFFFFFFFF])
def test_a_write_with_other_data_than_announced(served: Rig, count: int) -> None:
    refused(served, EINVAL, wire.REGION_WRITE, wire.RegionAccess(region=7, offset=4, count=count).pack() + bytes(4))


@pytest.mark.parametrize(
    ("region", "offset", "count"), [(0, 0x2000, 4), (9, 0, 4), (7, 4, 9), (7, 4, 0), (6, 0, 1), (7, 0xFD, 4)]
)
def test_one_bad_write_of_many(served: Rig, region: int, offset: int, count: int) -> None:
    good = wire.WriteEntry(offset=4, region=7, count=2, data=b"\6\4")
    bad = wire.WriteEntry(offset=offset, region=region, count=count)
    refused(served, EINVAL, wire.REGION_WRITE_MULTI, wire.WriteMulti(count=2, writes=(good, bad)).pack())


def test_other_counts_of_writes_than_there_are(served: Rig) -> None:
    entries = wire.WriteEntry(offset=4, region=7, count=2).pack() * 2
    for count in (0, 1, 3, 257, 1 << 32, TOP - 1):
        refused(served, EINVAL, wire.REGION_WRITE_MULTI, count.to_bytes(8, "little") + entries)


def test_a_reset_with_data(served: Rig) -> None:
    refused(served, EINVAL, wire.DEVICE_RESET, b"\0")


@pytest.mark.parametrize(
    ("code", "flags"),
    [
        (errno.ENOTTY, vfio.FEATURE_GET | vfio.FEATURE_MIGRATION),
        (errno.ENOTTY, vfio.FEATURE_PROBE | vfio.FEATURE_GET | vfio.FEATURE_MIGRATION),
        (errno.ENOTTY, vfio.FEATURE_SET | vfio.FEATURE_DMA_LOGGING_START),
        (errno.ENOTTY, vfio.FEATURE_PROBE | 0xFFFF),
        (EINVAL, vfio.FEATURE_MIGRATION),
        (EINVAL, vfio.FEATURE_GET | vfio.FEATURE_SET | vfio.FEATURE_MIGRATION),
        (EINVAL, vfio.FEATURE_GET | 1 << 19),
    ],
)
def test_features_that_are_not_there(served: Rig, code: int, flags: int) -> None:
    refused(served, code, wire.DEVICE_FEATURE, vfio.Feature(argsz=64, flags=flags).pack() + bytes(56))


def test_migration(served: Rig) -> None:
    refused(served, errno.EOPNOTSUPP, wire.MIG_DATA_READ, wire.MigrationData(size=100).pack())
    refused(served, errno.EOPNOTSUPP, wire.MIG_DATA_WRITE, wire.MigrationData(size=3).pack() + bytes(3))


# The stream itself.


@pytest.mark.parametrize("flags", [2, 15, 0x40, 0x20, 0x80000000])
def test_flags_that_cannot_be(served: Rig, flags: int) -> None:
    header = wire.Header(message_id=5, command=wire.DEVICE_RESET, message_size=24, flags=wire.HeaderFlags(flags)).pack()
    (answer,) = served.feed(header + bytes(8), [served.memory.fd])
    assert (answer.message_id, answer.errno) == (5, EINVAL)
    assert not served.given
    assert served.in_step()


@pytest.mark.parametrize("flags", [1, 0x21, 0x11, 0x41])
def test_a_reply_that_nobody_asked_for(served: Rig, flags: int) -> None:
    for number in (wire.DMA_READ, wire.VERSION, 99):
        header = wire.Header(command=number, message_size=24, flags=wire.HeaderFlags(flags)).pack()
        assert served.feed(header + bytes(8), [served.memory.fd]) == []
    assert not served.given
    assert served.core.unasked_replies == 3
    assert served.in_step()


def test_descriptors_that_were_lost_on_the_way(served: Rig) -> None:
    mine = eventfd.make()
    value = vfio.IrqSet(flags=EVENTFD | TRIGGER, index=2, count=1).pack()
    (answer,) = served.feed(wire.encode_request(1, wire.DEVICE_SET_IRQS, value), [mine], lost=True)
    os.close(mine)
    assert answer.errno == EINVAL
    assert not served.given
    assert served.in_step()


def test_more_descriptors_than_were_announced(served: Rig) -> None:
    mine = eventfd.make()
    try:
        value = vfio.IrqSet(flags=EVENTFD | TRIGGER, index=2, count=17).pack()
        refused(served, EINVAL, wire.DEVICE_SET_IRQS, value, (mine,) * 17)
    finally:
        os.close(mine)


@pytest.mark.parametrize("size", [0, 1, 15, (1 << 16) + 33, 0xFFFFFFFF])
def test_a_size_that_cannot_be_is_the_end(served: Rig, size: int) -> None:
    header = wire.Header(message_id=5, command=wire.REGION_READ, message_size=size).pack()
    (answer,) = served.feed(header + GREETING, [served.memory.fd])
    assert (answer.message_id, answer.errno) == (5, EINVAL)
    assert served.reasons == [f"message size {size} bytes, need 16 to {served.core.max_size}"]
    assert served.feed(GREETING, [served.memory.fd]) == []
    assert not served.given


def test_a_reply_of_a_size_that_cannot_be_is_the_end_without_an_answer(served: Rig) -> None:
    assert served.feed(wire.Header(message_size=3, flags=wire.HeaderFlags(1)).pack()) == []
    assert served.core.closed
    assert len(served.reasons) == 1


@pytest.mark.parametrize(
    "first",
    [
        wire.encode_request(5, wire.DEVICE_GET_INFO, wire.DeviceInfo().pack()),
        wire.encode_request(5, 99),
        wire.encode_request(5, wire.VERSION),
        wire.encode_request(5, wire.VERSION, b"\0\0\0"),
        wire.encode_request(5, wire.VERSION, wire.Version(major=1).pack()),
        wire.encode_request(5, wire.VERSION, wire.Version(major=0xFFFF).pack()),
        wire.encode_request(5, wire.VERSION, wire.Version().pack() + b"{"),
        wire.encode_request(5, wire.VERSION, wire.Version().pack() + b'{"capabilities":{"max_msg_fds":-1}}\0'),
        wire.encode_request(5, wire.VERSION, wire.Version().pack() + b" " * 5000),
    ],
)
def test_a_wrong_beginning_is_the_end(first: bytes) -> None:
    with rig(greeted=False) as made:
        (answer,) = made.feed(first + GREETING, [made.memory.fd])
        assert (answer.message_id, answer.errno) == (5, EINVAL)
        assert len(made.reasons) == 1
        assert not made.given


def test_a_version_with_descriptors_is_the_end() -> None:
    with rig(greeted=False) as made:
        (answer,) = made.feed(GREETING, [made.memory.fd])
        assert (answer.errno, made.reasons) == (EINVAL, ["VERSION: 1 descriptors, limit 0"])
        assert not made.given


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.tuples(st.sampled_from(SEEDS), st.integers(0, 60), st.binary(max_size=6)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
)
def test_the_fuzz_target_for_a_moment(data: bytes) -> None:
    fuzz_user_core(data)


ACCESS_STREAMS = st.lists(
    st.builds(
        lambda number, region, offset, count, data, no_reply: wire.encode_request(
            7, number, wire.RegionAccess(region=region, offset=offset, count=count).pack() + data, no_reply=no_reply
        ),
        st.sampled_from([wire.REGION_READ, wire.REGION_WRITE, wire.DEVICE_GET_INFO]),
        st.sampled_from([0, 0, 2, 7, 7, 8, 9]),
        st.sampled_from([0, 4, 0x24, 0x30, 0x3C, 0x1000, TOP - 4]),
        st.sampled_from([0, 1, 2, 4, 4, 8, 1 << 17]),
        st.sampled_from([b"", b"", b"\1\0\0\0", bytes(8)]),
        st.booleans(),
    )
    | st.binary(max_size=40),
    max_size=6,
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(ACCESS_STREAMS)
def test_the_short_way_and_the_long_way_are_the_same(stream: bytes) -> None:
    fuzz_user_core_quick(stream)


def test_the_fuzz_targets_take_their_seeds() -> None:
    for seed in SEEDS:
        fuzz_user_core(seed)
        fuzz_user_core_quick(seed[1:])
