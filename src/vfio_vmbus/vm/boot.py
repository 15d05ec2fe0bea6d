"""Linux's 64-bit boot protocol, sans-IO: a bzImage and what goes with it in, bytes and their places in the guest's memory out.

The first megabyte: descriptor table, zero page, page tables, command line; the ACPI tables at 0xe0000, where firmware has them. The
kernel lies at the address it prefers, the initrd as high as the kernel allows.
Sources: Documentation/arch/x86/boot.rst, zero-page.rst (protocol 2.12 and later).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError
from ..wire import kvm as uapi
from .memory import MIB, Range

GDT: Final = 0x6000
ZERO_PAGE: Final = 0x7000
PAGE_TABLES: Final = 0x9000
"""PML4, PDPT, and four page directories: 4 GiB, each where it is, in pages of 2 MiB."""
CMDLINE: Final = 0x20000
LOW_END: Final = 0x9FC00
"""Below it memory is the kernel's to use; from here to 1 MiB is what firmware keeps."""
FIRMWARE: Final = 0xE0000
FIRMWARE_END: Final = 0x100000

E820_RAM: Final = 1
E820_RESERVED: Final = 2
E820_PMEM: Final = 12
"""Persistent memory from before ACPI knew of it, which Linux makes /dev/pmem of (drivers/nvdimm/e820.c)."""
E820_MOST: Final = 128

_PAGE: Final = 4096
_ENTRY_64: Final = 0x200
_LOAD_HIGH: Final = 1 << 0
_CAN_USE_HEAP: Final = 1 << 7
_KERNEL_64: Final = 1 << 0
_ABOVE_4G: Final = 1 << 1
_LOADER: Final = 0xFF
"""type_of_loader of those that have no number."""

_BOOT_CS, _BOOT_DS = 0x10, 0x18


@dataclass(frozen=True)
class Placement:
    """`data` goes to the guest's memory at `gpa`. what: for errors."""

    gpa: int
    data: bytes
    what: str


@dataclass(frozen=True)
class Header:
    """What the kernel says about itself (boot.rst, "The Real-Mode Kernel Header"). Sizes in bytes.

    setup: the header's own bytes, which the zero page repeats. code_at: where in the file the 64-bit part begins.
    """

    version: int
    setup: bytes
    code_at: int
    load_address: int
    init_size: int
    cmdline_size: int
    initrd_last: int
    above_4g: bool


@dataclass(frozen=True)
class Start:
    """What is in memory and in the first CPU's registers when it starts."""

    placements: tuple[Placement, ...]
    entry: int


def parse(kernel: bytes) -> Header:
    """Look at a bzImage. Raises UsageError with what it lacks."""
    if kernel[:4] == b"\x7fELF":
        raise UsageError("the kernel is an ELF file (vmlinux): take its bzImage (vmlinuz)")
    if kernel[:2] == b"\x1f\x8b" or kernel[:4] == b"\x28\xb5\x2f\xfd":
        raise UsageError("the kernel is a compressed file: take its bzImage, which unpacks itself")
    if len(kernel) < 0x268 or kernel[0x1FE:0x200] != b"\x55\xaa" or kernel[0x202:0x206] != b"HdrS":
        raise UsageError("the kernel is no bzImage: there is no boot header of Linux in it")
    (version,) = struct.unpack_from("<H", kernel, 0x206)
    if version < 0x020C:
        raise UsageError(f"the kernel speaks boot protocol {version >> 8}.{version & 0xFF:02}, need 2.12 (Linux 3.8)")
    if not kernel[0x211] & _LOAD_HIGH:
        raise UsageError("the kernel is a zImage, which loads below 1 MiB: take a bzImage")
    (flags,) = struct.unpack_from("<H", kernel, 0x236)
    if not flags & _KERNEL_64:
        raise UsageError("the kernel is a 32-bit one: take one for x86-64")
    code_at = ((kernel[0x1F1] or 4) + 1) * 512
    (code_size,) = struct.unpack_from("<I", kernel, 0x1F4)
    if len(kernel) < code_at + 16 * code_size or len(kernel) <= code_at + _ENTRY_64:
        need = max(code_at + 16 * code_size, code_at + _ENTRY_64 + 1)
        raise UsageError(f"the kernel's file is cut short: it has {len(kernel)} bytes, its header speaks of {need}")
    load_address, init_size = struct.unpack_from("<QI", kernel, 0x258)
    (initrd_last,) = struct.unpack_from("<I", kernel, 0x22C)
    (cmdline_size,) = struct.unpack_from("<I", kernel, 0x238)
    end = 0x202 + kernel[0x201]
    return Header(
        version,
        bytes(kernel[0x1F1:end]),
        code_at,
        load_address,
        max(init_size, len(kernel) - code_at),
        cmdline_size,
        initrd_last,
        bool(flags & _ABOVE_4G),
    )


def start(
    kernel: bytes,
    initrd: bytes,
    cmdline: str,
    memory: Sequence[Range],
    pmem: Sequence[tuple[int, int]] = (),
    tables: bytes = b"",
) -> Start:
    """Everything that is in memory at the start.

    memory: `GuestMemory.ranges`. pmem: (gpa, size) of images. tables: ACPI's, made for FIRMWARE, where its RSDP comes first.
    Raises UsageError for what is no bzImage, does not fit into the memory, or is too long.
    """
    header = parse(kernel)
    low = memory[0]
    if header.load_address < MIB or header.load_address + header.init_size > low.end:
        need = (header.load_address + header.init_size + MIB - 1) // MIB
        raise UsageError(f"the kernel needs memory up to {need} MiB, there are {low.end // MIB} MiB below 4 GiB")
    words = cmdline.encode() + b"\0"
    if b"\0" in words[:-1]:
        raise UsageError("the command line has a zero byte in it")
    if len(words) - 1 > min(header.cmdline_size, LOW_END - CMDLINE - 1):
        raise UsageError(f"the command line has {len(words) - 1} bytes, the kernel takes {header.cmdline_size}")
    if len(tables) > FIRMWARE_END - FIRMWARE:
        raise UsageError(
            f"the ACPI tables have {len(tables)} bytes, there is room for {FIRMWARE_END - FIRMWARE}: take fewer CPUs"
        )
    at = initrd_place(header, len(initrd), low)
    placements = [
        Placement(GDT, gdt(), "descriptor table"),
        Placement(ZERO_PAGE, zero_page(header, at, len(initrd), e820(memory, pmem), FIRMWARE if tables else 0), "zero page"),
        Placement(PAGE_TABLES, page_tables(PAGE_TABLES), "page tables"),
        Placement(CMDLINE, words, "command line"),
        Placement(header.load_address, kernel[header.code_at :], "kernel"),
    ]
    if initrd:
        placements.append(Placement(at, initrd, "initrd"))
    if tables:
        placements.append(Placement(FIRMWARE, tables, "ACPI tables"))
    return Start(tuple(placements), header.load_address + _ENTRY_64)


def initrd_place(header: Header, size: int, low: Range) -> int:
    """The highest page-aligned address that an initrd of `size` bytes can have. Raises UsageError where it does not fit."""
    end = low.end if header.above_4g else min(low.end, header.initrd_last + 1)
    at = (end - size) // _PAGE * _PAGE
    floor = header.load_address + header.init_size
    if size and at < floor:
        room = max(end - floor, 0)
        raise UsageError(f"the initrd has {size} bytes, beside the kernel there is room for {room}: take more memory")
    return at


def e820(memory: Sequence[Range], pmem: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int, int]]:
    """The memory map: (gpa, size, type) in order."""
    low, *above = memory
    entries = [
        (0, LOW_END, E820_RAM),
        (LOW_END, FIRMWARE_END - LOW_END, E820_RESERVED),
        (FIRMWARE_END, low.end - FIRMWARE_END, E820_RAM),
        *((one.gpa, one.size, E820_RAM) for one in above),
        *((gpa, size, E820_PMEM) for gpa, size in pmem),
    ]
    if len(entries) > E820_MOST:
        raise UsageError(f"{len(pmem)} pmem images: the memory map has room for {E820_MOST} ranges")
    return entries


def zero_page(header: Header, initrd: int, initrd_size: int, ranges: Sequence[tuple[int, int, int]], rsdp: int) -> bytes:
    """struct boot_params: the kernel's header with our answers, and the memory map (zero-page.rst)."""
    page = bytearray(_PAGE)
    page[0x1F1 : 0x1F1 + len(header.setup)] = header.setup
    struct.pack_into("<Q", page, 0x070, rsdp)
    page[0x210] = _LOADER
    page[0x211] |= _CAN_USE_HEAP
    struct.pack_into("<H", page, 0x224, 0xFE00)  # heap_end_ptr, for code that does not run on this way
    struct.pack_into("<I", page, 0x228, CMDLINE)
    if initrd_size:
        for at, value in ((0x218, initrd), (0x21C, initrd_size)):
            struct.pack_into("<I", page, at, value & 0xFFFFFFFF)
        for at, value in ((0x0C0, initrd), (0x0C4, initrd_size)):
            struct.pack_into("<I", page, at, value >> 32)
    page[0x1E8] = len(ranges)
    for number, (gpa, size, kind) in enumerate(ranges):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * number, gpa, size, kind)
    return bytes(page)


def page_tables(at: int) -> bytes:
    """Tables at `at` that map the first 4 GiB to themselves: present, writable, pages of 2 MiB."""
    tables = bytearray(6 * _PAGE)
    struct.pack_into("<Q", tables, 0, at + _PAGE | 3)
    for gib in range(4):
        struct.pack_into("<Q", tables, _PAGE + 8 * gib, at + (2 + gib) * _PAGE | 3)
    for page in range(4 * 512):
        struct.pack_into("<Q", tables, 2 * _PAGE + 8 * page, page << 21 | 0x83)
    return bytes(tables)


def gdt() -> bytes:
    """Flat 64-bit code at selector 0x10 and flat data at 0x18, as the protocol asks."""
    return struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)


def registers(entry: int) -> uapi.Regs:
    """General registers at the 64-bit entry: the zero page in RSI, interrupts off."""
    return uapi.Regs(rip=entry, rsi=ZERO_PAGE, rsp=ZERO_PAGE, rflags=2)


def special_registers(before: uapi.Sregs) -> uapi.Sregs:
    """Long mode with paging, flat segments; `before` is what KVM had, of which the local APIC's base stays."""
    code = uapi.Segment(limit=0xFFFFFFFF, selector=_BOOT_CS, type=0xB, present=1, s=1, l=1, g=1)
    data = uapi.Segment(limit=0xFFFFFFFF, selector=_BOOT_DS, type=0x3, present=1, s=1, db=1, g=1)
    task = uapi.Segment(limit=0x67, type=0xB, present=1)
    return uapi.Sregs(
        cs=code,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=task,
        ldt=uapi.Segment(type=0x2, unusable=1),
        gdt=uapi.DescriptorTable(base=GDT, limit=4 * 8 - 1),
        idt=uapi.DescriptorTable(),
        cr0=0x80050033,  # PG, AM, WP, NE, ET, MP, PE
        cr3=PAGE_TABLES,
        cr4=0x20,  # PAE
        efer=0x500,  # LMA, LME
        apic_base=before.apic_base,
    )
