"""What is in memory when Linux starts, against the numbers of its boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst)."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import bzimage

from vfio_vmbus.errors import UsageError
from vfio_vmbus.vm import acpi, boot
from vfio_vmbus.vm.memory import ABOVE, GIB, HOLE, MIB, UNIT, Range, layout
from vfio_vmbus.wire.kvm import Sregs

ONE_GIB = layout(GIB)


def u32(data: bytes, at: int) -> int:
    value: int = struct.unpack_from("<I", data, at)[0]
    return value


def u64(data: bytes, at: int) -> int:
    value: int = struct.unpack_from("<Q", data, at)[0]
    return value


def placed(what: str, *arguments: Any, **options: Any) -> boot.Placement:
    return next(one for one in boot.start(*arguments, **options).placements if one.what == what)


def test_the_kernel_lies_where_it_wants_to_and_is_entered_at_its_64_bit_entry() -> None:
    image = bzimage(load_address=0x1400000)
    start = boot.start(image, b"", "", ONE_GIB)
    kernel = next(one for one in start.placements if one.what == "kernel")
    assert kernel.gpa == 0x1400000
    assert kernel.data == image[5 * 512 :]
    assert start.entry == 0x1400200
    registers = boot.registers(start.entry)
    assert (registers.rip, registers.rsi, registers.rflags) == (0x1400200, boot.ZERO_PAGE, 2)


def test_no_setup_sectors_are_four() -> None:
    assert boot.parse(bzimage(setup_sectors=0)).code_at == 5 * 512
    assert boot.parse(bzimage(setup_sectors=39)).code_at == 40 * 512


def test_the_zero_page_has_the_header_with_our_answers() -> None:
    image = bzimage()
    page = placed("zero page", image, b"initrd", "quiet", ONE_GIB, tables=b"RSD PTR ").data
    assert page[0x1FE:0x211] == image[0x1FE:0x210] + b"\xff"  # a loader without a number
    assert page[0x211] & 0x81 == 0x81
    assert u32(page, 0x228) == boot.CMDLINE
    assert u64(page, 0x070) == boot.FIRMWARE
    assert (u32(page, 0x218), u32(page, 0x21C)) == (GIB - 4096, 6)
    assert page[0x264:0x26C] == bytes(8)  # behind the header nothing of the file


def test_without_initrd_and_tables_the_zero_page_names_none() -> None:
    page = placed("zero page", bzimage(), b"", "", ONE_GIB).data
    assert [u32(page, at) for at in (0x218, 0x21C, 0x0C0, 0x0C4, 0x070)] == [0] * 5


def test_the_memory_map_is_in_the_zero_page() -> None:
    page = placed("zero page", bzimage(), b"", "", layout(4 * GIB), pmem=[(5 * GIB, 2 * MIB)]).data
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]
    assert entries == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (0x100000, 3 * GIB - MIB, 1),
        (4 * GIB, GIB, 1),
        (5 * GIB, 2 * MIB, 12),
    ]


@given(st.integers(32, 64 * 512).map(lambda units: units * UNIT))
def test_memory_is_all_there_and_never_in_the_hole(size: int) -> None:
    ranges = layout(size)
    assert sum(one.size for one in ranges) == size
    assert [one.offset for one in ranges] == [0, HOLE][: len(ranges)]
    for one in ranges:
        assert one.end <= HOLE or one.gpa >= ABOVE
    entries = boot.e820(ranges)
    assert all(first[0] + first[1] <= second[0] for first, second in pairwise(entries))
    assert sum(entry[1] for entry in entries if entry[2] == boot.E820_RAM) == size - (boot.FIRMWARE_END - boot.LOW_END)


def test_nothing_lies_on_anything_else() -> None:
    tables = acpi.tables(boot.FIRMWARE, 254)
    start = boot.start(bzimage(), bytes(5 * MIB), "x" * 2000, layout(64 * MIB), tables=tables)
    ranges = sorted((one.gpa, one.gpa + len(one.data)) for one in start.placements)
    assert len(ranges) == 7
    assert all(first[1] <= second[0] for first, second in pairwise(ranges))
    low = [one for one in start.placements if one.gpa < MIB and one.what != "ACPI tables"]
    assert all(one.gpa >= 0x1000 and one.gpa + len(one.data) <= boot.LOW_END for one in low)


def test_the_initrd_lies_as_high_as_the_kernel_allows() -> None:
    assert placed("initrd", bzimage(), b"i" * 5000, "", ONE_GIB).gpa == GIB - 8192
    assert placed("initrd", bzimage(xloadflags=1), b"i" * 5000, "", layout(4 * GIB)).gpa == (2 * GIB - 5000) // 4096 * 4096
    assert placed("initrd", bzimage(), b"i" * 5000, "", layout(4 * GIB)).gpa == 3 * GIB - 8192


def test_page_tables_map_the_first_4_gib_to_themselves() -> None:
    tables = boot.page_tables(boot.PAGE_TABLES)

    def walk(address: int) -> int:
        at = boot.PAGE_TABLES
        for shift in (39, 30):
            entry = u64(tables, at - boot.PAGE_TABLES + 8 * (address >> shift & 511))
            assert entry & 0x83 == 3, "present, writable, a table"
            at = entry & ~0xFFF
        entry = u64(tables, at - boot.PAGE_TABLES + 8 * (address >> 21 & 511))
        assert entry & 0x83 == 0x83, "present, writable, a page of 2 MiB"
        return (entry & ~0x1FFFFF) | (address & 0x1FFFFF)

    for address in (0, 0x7000, 0x1000200, HOLE - 1, 0xFEE00000, 4 * GIB - 1):
        assert walk(address) == address


def test_segments_are_what_the_protocol_asks_for() -> None:
    registers = boot.special_registers(Sregs(apic_base=0xFEE00900))
    assert (registers.cs.selector, registers.ds.selector, registers.ss.selector) == (0x10, 0x18, 0x18)
    assert (registers.cs.l, registers.cs.db, registers.cr3) == (1, 0, boot.PAGE_TABLES)
    assert registers.apic_base == 0xFEE00900
    code, data = u64(boot.gdt(), 0x10), u64(boot.gdt(), 0x18)
    assert code >> 40 & 0xFF == 0x9B, "present, code, execute and read, accessed"
    assert code >> 52 & 0xF == 0xA, "granularity 4 KiB, 64-bit"
    assert data >> 40 & 0xFF == 0x93, "present, data, read and write, accessed"


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (b"", "no bzImage"),
        (b"MZ" + bytes(4096), "no bzImage"),
        (bzimage(magic=b"HdrX"), "no bzImage"),
        (bzimage()[:0x250], "no bzImage"),
        (b"\x7fELF" + bytes(4096), "ELF"),
        (b"\x1f\x8b" + bytes(4096), "compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(4096), "compressed"),
        (bzimage(version=0x020B), "2.11"),
        (bzimage(loadflags=0), "zImage"),
        (bzimage(xloadflags=2), "32-bit"),
        (bzimage()[:-1000], "cut short"),
        (bzimage(code=0), "cut short"),
    ],
)
def test_what_is_no_bzimage_is_told_with_the_reason(kernel: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        boot.parse(kernel)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=2048), st.integers(0, 4096))
def test_any_bytes_are_a_kernel_or_none(noise: bytes, at: int) -> None:
    image = bytearray(bzimage())
    image[at : at + len(noise)] = noise
    try:
        header = boot.parse(bytes(image))
    except UsageError:
        return
    assert header.code_at + 0x200 < len(image)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel": bzimage(init_size=65 * MIB)}, "memory up to 81 MiB, there are 64"),
        ({"kernel": bzimage(load_address=0x100)}, "kernel needs memory"),
        ({"kernel": bzimage(load_address=1 << 63)}, "kernel needs memory"),
        ({"initrd": bytes(20 * MIB)}, "room for 16777216"),
        ({"cmdline": "x" * 2048}, "2048 bytes, the kernel takes 2047"),
        ({"cmdline": "a\0b"}, "zero byte"),
        ({"tables": bytes(0x20001)}, "ACPI tables"),
    ],
)
def test_what_does_not_fit_is_told_with_numbers(options: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {"kernel": bzimage(), "initrd": b"", "cmdline": "", "memory": layout(64 * MIB), **options}
    with pytest.raises(UsageError, match=reason):
        boot.start(**arguments)


def test_more_images_than_the_map_has_room_for() -> None:
    images = [(ABOVE + number * UNIT, UNIT) for number in range(126)]
    with pytest.raises(UsageError, match="126 pmem images"):
        boot.e820([Range(0, GIB, 0)], images)
    assert len(boot.e820([Range(0, GIB, 0)], images[:-1])) == 128


@pytest.mark.parametrize("size", [0, -UNIT, 62 * MIB, 64 * MIB + 4096])
def test_a_size_that_cannot_be(size: int) -> None:
    with pytest.raises(UsageError, match="multiple of 2 MiB"):
        layout(size)
