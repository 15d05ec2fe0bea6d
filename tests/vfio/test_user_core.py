"""The vfio-user server's core over a real function: every command, the stream cut in every way, and what is released."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vfio.user_rig import GREETING, PEER, Rig, rig
from vfio_vmbus.errors import (
    ClosedError,
    DmaError,
    IsolationFault,
    ProtocolError,
    RefusedError,
    RingError,
    UnavailableError,
    UsageError,
    WaitTimeout,
)
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.function import Window
from vfio_vmbus.vfio.user.core import KEPT_REFUSALS, errno_of
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire
from vfio_vmbus.wire.vfio_user_version import Capabilities, decode_version

IOVA = 1 << 32
NONE, BOOL, EVENTFD, MASK, TRIGGER = 1, 2, 4, 8, 32


def map_it(made: Rig, iova: int = IOVA, pages: int = 8, flags: int = 3) -> int:
    value = wire.DmaMap(flags=flags, iova=iova, size=pages * PAGE)
    return made.ask(wire.DMA_MAP, value.pack(), [made.memory.fd]).errno


def irqs(made: Rig, flags: int, start: int, count: int, data: bytes = b"", fds: tuple[int, ...] = ()) -> int:
    return made.ask(wire.DEVICE_SET_IRQS, vfio.IrqSet(flags=flags, index=2, start=start, count=count).pack() + data, fds).errno


def read(made: Rig, region: int, offset: int, count: int) -> bytes:
    head = wire.RegionAccess(offset=offset, region=region, count=count).pack()
    answer = made.ask(wire.REGION_READ, head)
    assert (answer.errno, answer.payload[:16]) == (0, head)
    return answer.payload[16:]


def write(made: Rig, region: int, offset: int, data: bytes) -> None:
    head = wire.RegionAccess(offset=offset, region=region, count=len(data)).pack()
    assert made.ask(wire.REGION_WRITE, head + data).payload == head


# What a client does that does nothing wrong.


def test_the_first_answer_says_what_the_server_can_do() -> None:
    with rig(greeted=False) as made:
        (answer,) = made.feed(GREETING)
        assert (answer.number, answer.errno, answer.fds) == (wire.VERSION, 0, ())
        assert len(answer.payload) + 16 <= 214
        version, capabilities = decode_version(answer.payload)
        assert (version.major, version.minor) == (0, 0)
        assert capabilities == Capabilities(max_msg_fds=16, max_data_xfer_size=1 << 16, max_dma_maps=65535, write_multiple=True)
        assert made.core.peer == PEER


@pytest.mark.parametrize("minor", [0, 1, 2, 0xFFFF])
def test_a_version_without_json_and_with_a_newer_minor_will_do(minor: int) -> None:
    with rig(greeted=False) as made:
        (answer,) = made.feed(wire.encode_request(0, wire.VERSION, wire.Version(minor=minor).pack()))
        assert decode_version(answer.payload)[0].minor == 0
        assert made.core.peer == Capabilities()
        assert made.in_step()


def test_regions_and_interrupts_are_those_of_a_pci_device() -> None:
    with rig() as made:
        assert made.in_step()
        for index in range(9):
            answer = made.ask(wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(index=index).pack())
            size = {0: 0x2000, 2: 0x1000, 7: 0x100}.get(index, 0)
            assert answer.payload == vfio.RegionInfo(flags=3 if size else 0, index=index, size=size).pack()
        for index in range(5):
            answer = made.ask(wire.DEVICE_GET_IRQ_INFO, vfio.IrqInfo(index=index).pack())
            count = 65 if index == 2 else 0
            assert answer.payload == vfio.IrqInfo(flags=1 if count else 0, index=index, count=count).pack()


def test_a_question_may_be_as_long_as_spdks() -> None:
    with rig() as made:
        answer = made.ask(wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=4064, index=7).pack().ljust(4064, b"\0"))
        assert (answer.errno, len(answer.payload)) == (0, 32)


def test_regions_are_read_and_written() -> None:
    with rig() as made:
        assert read(made, 0, 0, 4) == b"VMBS"
        assert read(made, 7, 0, 256)[:4] == bytes.fromhex("14145642")
        write(made, 0, reg.REG_ADMIN_IOVA, bytes(range(8)))
        assert read(made, 0, reg.REG_ADMIN_IOVA, 8) == bytes(range(8))
        write(made, 7, 4, b"\x06")
        assert read(made, 7, 4, 1) == b"\x06"


def test_several_writes_in_one_message() -> None:
    with rig() as made:
        entries = (
            wire.WriteEntry(offset=reg.REG_ADMIN_UPSTREAM, region=0, count=4, data=b"\7\0\0\0"),
            wire.WriteEntry(offset=4, region=7, count=2, data=b"\6\4"),
        )
        answer = made.ask(wire.REGION_WRITE_MULTI, wire.WriteMulti(count=2, writes=entries).pack())
        assert answer.payload == (2).to_bytes(8, "little")
        assert (read(made, 0, reg.REG_ADMIN_UPSTREAM, 4), read(made, 7, 4, 2)) == (b"\7\0\0\0", b"\6\4")


def test_memory_is_mapped_and_taken_back() -> None:
    with rig() as made:
        assert map_it(made) == 0
        (entry,) = made.function.domain.maps
        assert (entry.iova, entry.size, entry.access) == (IOVA, 8 * PAGE, 3)
        asked = wire.DmaUnmap(iova=IOVA, size=8 * PAGE).pack()
        answer = made.ask(wire.DMA_UNMAP, asked, [made.memory.fd])  # with a descriptor, as SPDK does
        assert (answer.errno, answer.payload) == (0, asked)
        assert made.function.domain.maps == ()


def test_an_unmap_takes_all_within_and_may_find_nothing() -> None:
    with rig() as made:
        assert [map_it(made, IOVA + 16 * n * PAGE, 4) for n in range(3)] == [0, 0, 0]
        assert made.ask(wire.DMA_UNMAP, wire.DmaUnmap(iova=IOVA, size=20 * PAGE).pack()).errno == 0
        assert [entry.iova for entry in made.function.domain.maps] == [IOVA + 32 * PAGE]
        assert made.ask(wire.DMA_UNMAP, wire.DmaUnmap(iova=1 << 40, size=1 << 40).pack()).errno == 0
        assert made.ask(wire.DMA_UNMAP, wire.DmaUnmap(flags=wire.UNMAP_ALL).pack()).errno == 0
        assert made.function.domain.maps == ()


def test_an_interrupt_begins_and_ends_as_qemu_does_it() -> None:
    with rig() as made:
        first, second = eventfd.make(), eventfd.make()
        assert irqs(made, EVENTFD | TRIGGER, 0, 1) == 0  # nobody, before there was anybody
        assert irqs(made, EVENTFD | TRIGGER, 1, 2, fds=(first, second)) == 0
        eventfd.ring(made.function.vectors.fds[2])
        assert (eventfd.take(first), eventfd.take(second)) == (False, True)
        assert irqs(made, EVENTFD | TRIGGER, 2, 1) == 0
        eventfd.ring(made.function.vectors.fds[2])
        assert not eventfd.take(second)
        assert irqs(made, NONE | TRIGGER, 1, 1) == 0  # fire
        assert eventfd.take(first)
        assert irqs(made, BOOL | TRIGGER, 0, 2, b"\1\0") == 0
        assert not eventfd.take(first)
        assert irqs(made, BOOL | TRIGGER, 0, 2, b"\0\1") == 0
        assert eventfd.take(first)
        assert irqs(made, NONE | TRIGGER, 0, 0) == 0  # the end of all
        eventfd.ring(made.function.vectors.fds[1])
        assert not eventfd.take(first)
        os.close(first)
        os.close(second)


def test_a_reset_resets() -> None:
    with rig() as made:
        assert map_it(made) == 0
        write(made, 0, reg.REG_ADMIN_UPSTREAM, b"\7\0\0\0")
        answer = made.ask(wire.DEVICE_RESET)
        assert (answer.errno, answer.payload) == (0, b"")
        assert read(made, 0, reg.REG_ADMIN_UPSTREAM, 4) == bytes(4)
        assert len(made.function.domain.maps) == 1


def test_doorbells_have_descriptors() -> None:
    with rig() as made:
        short = made.ask(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(index=0).pack())
        head = wire.RegionIoFds.unpack(short.payload)
        assert (head.argsz, head.count, len(short.payload), short.fds) == (16 + 16 * 40, 16, 16, ())
        answer = made.ask(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=head.argsz, index=0).pack())
        assert len(answer.payload) == head.argsz
        assert len(answer.fds) == 16
        for place in range(16):
            row = wire.SubRegion.unpack(answer.payload, 16 + 40 * place)
            assert row == wire.SubRegion(offset=0x1000 + 4 * place, size=4, fd_index=place)
            assert answer.fds[place] == made.function.doorbell(place)
        none = made.ask(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096, index=7).pack())
        assert none.payload == wire.RegionIoFds(argsz=16, index=7).pack()


def test_what_wants_no_reply_gets_none() -> None:
    with rig() as made:
        head = wire.RegionAccess(offset=reg.REG_ADMIN_UPSTREAM, region=0, count=4).pack()
        assert made.feed(wire.encode_request(1, wire.REGION_WRITE, head + b"\5\0\0\0", no_reply=True)) == []
        assert made.feed(wire.encode_request(1, wire.REGION_WRITE, head, no_reply=True)) == []
        assert read(made, 0, reg.REG_ADMIN_UPSTREAM, 4) == b"\5\0\0\0"
        assert made.core.refusal_count == 1


# The stream.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30))
def test_the_stream_may_be_cut_anywhere(cuts: list[int]) -> None:
    stream = GREETING
    for number in range(5):
        stream += wire.encode_request(number, wire.REGION_READ, wire.RegionAccess(region=7, offset=number, count=4).pack())
    with rig(greeted=False) as made:
        found = []
        for size in cuts:
            found += made.feed(stream[:size]) if stream else []
            stream = stream[size:]
        found += made.feed(stream) if stream else []
        assert [answer.errno for answer in found] == [0] * 6
        assert [answer.message_id for answer in found[1:]] == [0, 1, 2, 3, 4]
        assert [answer.payload[16:] for answer in found[1:]] == [made.function.windows[7].read(n, 4) for n in range(5)]


def test_descriptors_belong_to_the_last_message_that_begins_with_them() -> None:
    question = wire.encode_request(1, wire.DEVICE_GET_INFO, wire.DeviceInfo().pack())
    for cut in (None, 20, 47):
        with rig() as made:
            mapping = wire.encode_request(2, wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=PAGE).pack())
            found = made.feed(question + mapping[:cut], [made.memory.fd])
            found += made.feed(mapping[cut:]) if cut else []
            assert [(answer.number, answer.errno) for answer in found] == [(wire.DEVICE_GET_INFO, 0), (wire.DMA_MAP, 0)]
            assert len(made.function.domain.maps) == 1


def test_descriptors_beside_the_body_belong_to_it_too() -> None:
    with rig() as made:
        mapping = wire.encode_request(2, wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=PAGE).pack())
        assert made.feed(mapping[:16]) == []
        assert made.feed(mapping[16:], [made.memory.fd])[0].errno == 0
        assert len(made.function.domain.maps) == 1


def test_a_client_that_goes_in_the_middle_leaves_no_descriptor() -> None:
    with rig() as made:
        mapping = wire.encode_request(2, wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=PAGE).pack())
        assert made.feed(mapping[:20], [made.memory.fd] * 3) == []
        assert len(made.given) == 3
        assert made.feed(b"") == []
        assert made.given == set()
        assert made.core.closed
        assert made.feed(mapping, [made.memory.fd]) == []
        assert made.given == set()


def test_a_defect_of_the_device_is_logged_and_the_client_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with rig() as made:

        def broken(offset: int, data: bytes) -> None:
            raise KeyError("defect")

        made.function.windows[7] = Window(0x100, made.function.windows[7].read, broken)
        answer = made.ask(wire.REGION_WRITE, wire.RegionAccess(region=7, count=1).pack() + b"x")
        assert answer.errno == errno.EIO
        assert "defect of the device" in caplog.text
        assert made.in_step()


def test_only_the_latest_refusals_are_kept() -> None:
    with rig() as made:
        for _ in range(KEPT_REFUSALS + 5):
            made.ask(99)
        assert (len(made.core.refusals), made.core.refusal_count) == (KEPT_REFUSALS, KEPT_REFUSALS + 5)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ProtocolError("x"), errno.EINVAL),
        (RingError("x"), errno.EINVAL),
        (UsageError("x"), errno.EINVAL),
        (DmaError("x"), errno.EINVAL),
        (IsolationFault("x", 0, 1, "read", "not mapped"), errno.EFAULT),
        (UnavailableError("x"), errno.EOPNOTSUPP),
        (ClosedError("x"), errno.ENODEV),
        (WaitTimeout("x", 1), errno.ETIMEDOUT),
        (RefusedError("x", errno.EEXIST), errno.EEXIST),
        (RefusedError("x", 0xC0000001), errno.EIO),
        (RefusedError("x"), errno.EIO),
        (OSError(errno.EMFILE, "x"), errno.EMFILE),
        (OSError("x"), errno.EIO),
        (KeyError("x"), errno.EIO),
    ],
    ids=repr,
)
def test_errors_have_numbers(error: Exception, number: int) -> None:
    assert errno_of(error) == number
