"""The driver's side: IOVAs that never overlap, a page free behind each buffer, and nothing left whatever the device answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_vmbus.errors import ClosedError, DmaError, UsageError, WaitTimeout
from vfio_vmbus.iommu.dma import FIRST_IOVA, LAST_IOVA, DmaBuffer, DmaSpace
from vfio_vmbus.iommu.domain import Domain
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left


class Refusing:
    """A device that maps into a domain until it is told to refuse."""

    def __init__(self) -> None:
        self.domain = Domain("client")
        self.refuse_maps = False
        self.refuse_unmaps: set[int] = set()

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        if self.refuse_maps:
            raise DmaError("no")
        self.domain.map(iova, fd, offset, size, access)

    def unmap(self, iova: int, size: int) -> None:
        if iova in self.refuse_unmaps:
            raise WaitTimeout("the worker", 5)
        self.domain.unmap(iova, size)


@pytest.fixture
def device() -> Iterator[Refusing]:
    with nothing_left(objects=False):
        device = Refusing()
        yield device
        device.domain.close()


def test_a_buffer_is_the_same_memory_on_both_sides(device: Refusing) -> None:
    space = DmaSpace(device)
    with space.buffer(5000, READ | WRITE, "both") as buffer:
        assert buffer.size == 2 * PAGE
        assert buffer.pfns == (buffer.iova // PAGE, buffer.iova // PAGE + 1)
        buffer.mapping.write(4999, b"!")
        assert device.domain.read(buffer.iova + 4999, 1) == b"!"
    assert buffer.closed
    assert device.domain.maps == ()
    buffer.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.sampled_from([1, PAGE, PAGE + 1, 3 * PAGE])),
            st.tuples(st.just("give"), st.integers(0, 20)),
        ),
        max_size=40,
    )
)
def test_buffers_never_touch_each_other(steps: list[tuple[str, int]]) -> None:
    domain = Domain("client")
    space = DmaSpace(domain)
    held = []
    for what, number in steps:
        if what == "take":
            held.append(space.buffer(number, READ))
        elif held:
            held.pop(number % len(held)).close()
        ranges = sorted((buffer.iova, buffer.iova + buffer.size) for buffer in held)
        assert all(end + PAGE <= start for (_, end), (start, _) in pairwise(ranges))
        assert all(start >= FIRST_IOVA and end < LAST_IOVA for start, end in ranges)
        assert [(entry.iova, entry.end) for entry in domain.maps] == ranges
    space.close()
    assert domain.maps == ()


@pytest.mark.parametrize("size", [0, -1, -PAGE])
def test_a_buffer_has_a_size(device: Refusing, size: int) -> None:
    with pytest.raises(UsageError):
        DmaSpace(device).buffer(size, READ)


def test_the_space_ends(device: Refusing) -> None:
    with pytest.raises(DmaError, match="IOVA space"):
        DmaSpace(device).buffer(LAST_IOVA - FIRST_IOVA, READ)


def test_a_device_that_does_not_map_leaves_nothing() -> None:
    with nothing_left():
        device = Refusing()
        device.refuse_maps = True
        space = DmaSpace(device)
        for access in (READ, 0):
            with pytest.raises(DmaError):
                space.buffer(PAGE, access)
            device.refuse_maps = False
        with space.buffer(PAGE, READ) as buffer:
            assert buffer.iova == FIRST_IOVA
        del device, space, buffer


def test_iovas_that_were_not_given_back_stay_taken(device: Refusing) -> None:
    """Else each further buffer would be refused, because it overlaps."""
    space = DmaSpace(device)
    stuck = space.buffer(PAGE, READ)
    device.refuse_unmaps.add(stuck.iova)
    with pytest.raises(WaitTimeout):
        stuck.close()
    assert space.buffer(PAGE, READ).iova != stuck.iova
    space.close()
    assert [entry.iova for entry in device.domain.maps] == [stuck.iova]


def test_closing_goes_on_behind_a_buffer_that_raises(device: Refusing) -> None:
    space = DmaSpace(device)
    buffers = [space.buffer(PAGE, READ) for _ in range(5)]
    device.refuse_unmaps = {buffers[0].iova, buffers[3].iova}
    with pytest.raises(WaitTimeout):
        space.close()
    assert [entry.iova for entry in device.domain.maps] == [buffers[0].iova, buffers[3].iova]
    assert all(buffer.mapping.closed and buffer.memory.fd < 0 for buffer in buffers)


def test_a_device_that_is_closed_has_given_back_everything() -> None:
    class Closed(Refusing):
        def unmap(self, iova: int, size: int) -> None:
            raise ClosedError("the device is closed")

    with nothing_left():
        device = Closed()
        buffer = DmaSpace(device).buffer(PAGE, READ)
        device.domain.close()
        buffer.close()
        assert buffer.mapping.closed
        del device, buffer, Closed


RANGES = st.lists(st.integers(0, 1 << 14), min_size=2, max_size=8, unique=True).map(
    lambda edges: tuple((PAGE * 1024 * a, PAGE * 1024 * b) for a, b in zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


def test_iovas_are_taken_from_what_the_iommu_translates_above_4_gib_first(device: Refusing) -> None:
    ranges = ((0, 0xFEE00000), (0xFEF00000, FIRST_IOVA + 16 * PAGE), (1 << 39, 1 << 40))
    space = DmaSpace(device, ranges)
    found = [space.buffer(6 * PAGE, READ).iova for _ in range(4)]
    assert found == [FIRST_IOVA, FIRST_IOVA + 7 * PAGE, 1 << 39, (1 << 39) + 7 * PAGE]
    space.close()


def test_where_there_is_little_it_is_taken_from_below_but_never_the_first_page(device: Refusing) -> None:
    space = DmaSpace(device, [(0, 4 * PAGE)])
    with space.buffer(PAGE, READ) as buffer:
        assert buffer.iova == PAGE
        with pytest.raises(DmaError, match=r"no 8192 bytes of IOVA space left in \[0x1000, 0x4000\)"):
            space.buffer(PAGE, READ)
    assert space.buffer(2 * PAGE, READ).iova == PAGE
    space.close()
    with pytest.raises(DmaError, match="the device has no IOVAs"):
        DmaSpace(device, [(0, PAGE)]).buffer(PAGE, READ)


@settings(max_examples=40, deadline=None)
@given(ranges=RANGES, sizes=st.lists(st.integers(1, 3000), max_size=12), drops=st.randoms(use_true_random=False))
def test_buffers_lie_within_the_ranges_and_apart(ranges: tuple[tuple[int, int], ...], sizes: list[int], drops: Random) -> None:
    device = Refusing()
    space = DmaSpace(device, ranges)
    buffers: list[DmaBuffer] = []
    for pages in sizes:
        try:
            buffers.append(space.buffer(pages * PAGE, READ))
        except DmaError:
            parts = [part for start, end in ranges for part in ((start, min(end, FIRST_IOVA)), (max(start, FIRST_IOVA), end))]
            free = [end - max(start, PAGE) for start, end in parts]
            assert buffers or max(free) < (pages + 1) * PAGE
        if buffers and drops.random() < 0.3:
            buffers.pop(drops.randrange(len(buffers))).close()
        for buffer in buffers:
            assert any(max(start, PAGE) <= buffer.iova and buffer.iova + buffer.size <= end for start, end in ranges)
        for low, high in pairwise(sorted(buffers, key=lambda buffer: buffer.iova)):
            assert low.iova + low.size + PAGE <= high.iova
    space.close()
