"""The ACPI tables: as few as Linux needs to find CPUs, the VMBus, and the way to power off.

RSDP, XSDT, FADT, FACS, MADT, DSDT. The DSDT has a module device (ACPI0004) with a memory window, in it the VMBUS device, as Hyper-V's
second generation has them, and the sleep state S5. Sources: ACPI specification 6.5, sections 5.2 (tables), 20.2 (AML), 6.4 (resources);
drivers/hv/vmbus_drv.c for what Linux wants of the VMBUS device.
"""

from __future__ import annotations

import struct
from typing import Final

VMBUS_WINDOW: Final = (0xE0000000, 0x18000000)
"""Address and size of the window for devices on VMBus; a memory range without anything behind it."""

PM1_EVENT: Final = 0x600
PM1_CONTROL: Final = 0x604
RESET_PORT: Final = 0xCF9
RESET_VALUE: Final = 0x06
SCI: Final = 9
S5_TYPE: Final = 5
CENTURY: Final = 0x32

MOST_CPUS: Final = 254
"""APIC ids of 8 bits, of which 255 means all."""

_OEM: Final = b"VFIOVM"
_OEM_TABLE: Final = b"VFIOVMBU"
_CREATOR: Final = b"VVMB"
_LOCAL_APIC: Final = 0xFEE00000
_IO_APIC: Final = 0xFEC00000
_ALIGN: Final = 64


def tables(at: int, cpus: int) -> bytes:
    """All tables, made to lie at `at`, a multiple of 64; the RSDP comes first."""
    xsdt_size = 36 + 2 * 8
    sizes: list[int] = [36, xsdt_size, 64]
    dsdt = table(b"DSDT", 2, aml())
    apic = madt(cpus)
    sizes += [len(dsdt), len(apic), 276]
    places = []
    for size in sizes:
        places.append(at)
        at += -(-size // _ALIGN) * _ALIGN
    _, xsdt_at, facs_at, dsdt_at, madt_at, fadt_at = places
    parts = [
        rsdp(xsdt_at),
        table(b"XSDT", 1, struct.pack("<QQ", fadt_at, madt_at)),
        facs(),
        dsdt,
        apic,
        fadt(facs_at, dsdt_at),
    ]
    return b"".join(part.ljust(-(-len(part) // _ALIGN) * _ALIGN, b"\0") for part in parts)


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes zero."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header (section 5.2.6)."""
    head = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    data = bytearray(head + body)
    data[9] = checksum(data)
    return bytes(data)


def rsdp(xsdt: int) -> bytes:
    """Section 5.2.5.3. The first checksum is that of its first 20 bytes."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def facs() -> bytes:
    """Section 5.2.10: the firmware's own; nobody sleeps here."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _port(address: int, width: int) -> bytes:
    """A generic address (section 5.2.3.2) in I/O space; width in bits."""
    return struct.pack("<BBBBQ", 1, width, 0, width // 8 if width < 32 else 3, address)


def fadt(facs_at: int, dsdt_at: int) -> bytes:
    """Section 5.2.9, revision 6. There is no SMI: ACPI is on from the start. No power button that is fixed hardware, no timer."""
    flags = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10  # WBINVD, C1, no fixed buttons for power and sleep, a reset register
    boot_flags = 1 << 2  # no VGA, and no keyboard controller; there is an RTC
    body = struct.pack(
        "<IIBBHIBBBBIIIIIIII",
        *(facs_at, dsdt_at, 0, 0, SCI, 0, 0, 0, 0, 0),
        *(PM1_EVENT, 0, PM1_CONTROL, 0, 0, 0, 0, 0),
    )
    body += struct.pack(
        "<BBBBBBBBHHHHBBBBBHBI",
        *(4, 2, 0, 0, 0, 0, 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0, 0),
        *(0, 0, CENTURY, boot_flags, 0, flags),
    )
    body += _port(RESET_PORT, 8) + struct.pack("<BHB", RESET_VALUE, 0, 5)
    none = bytes(12)
    body += struct.pack("<QQ", facs_at, dsdt_at)
    body += _port(PM1_EVENT, 32) + none + _port(PM1_CONTROL, 16) + none * 7
    return table(b"FACP", 6, body + bytes(8))


def madt(cpus: int) -> bytes:
    """Section 5.2.12: a local APIC for each CPU, whose APIC id is its number; one I/O APIC; the SCI is level-triggered."""
    body = struct.pack("<II", _LOCAL_APIC, 1)
    body += b"".join(struct.pack("<BBBBI", 0, 8, cpu, cpu, 1) for cpu in range(cpus))
    body += struct.pack("<BBBBII", 1, 12, cpus, 0, _IO_APIC, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, 0xD)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # every CPU's LINT1 is its NMI
    return table(b"APIC", 5, body)


# ---- AML (section 20.2)


def aml() -> bytes:
    """The DSDT's definition block."""
    start, size = VMBUS_WINDOW
    vmbus = device(b"VMBS", name(b"_HID", string("VMBUS")) + name(b"_UID", integer(0)))
    module = device(
        b"VMOD",
        name(b"_HID", string("ACPI0004")) + name(b"_UID", integer(0)) + name(b"_CRS", buffer(memory_window(start, size))) + vmbus,
    )
    sleep = name(b"_S5_", package(integer(S5_TYPE), integer(S5_TYPE), integer(0), integer(0)))
    return sleep + scope(b"\\_SB_", module)


def _length(payload: int) -> bytes:
    """PkgLength: its own bytes count (section 20.2.4)."""
    if payload + 1 < 0x40:
        return bytes([payload + 1])
    for more in (1, 2, 3):
        total = payload + 1 + more
        if total < 1 << (4 + 8 * more):
            return bytes([more << 6 | total & 0xF, *((total >> (4 + 8 * byte)) & 0xFF for byte in range(more))])
    raise ValueError(f"{payload} bytes are too many for a package of AML")


def integer(value: int) -> bytes:
    """A constant of the least size."""
    if value in (0, 1):
        return bytes([value])
    for prefix, form in ((0x0A, "<B"), (0x0B, "<H"), (0x0C, "<I")):
        if value < 1 << 8 * struct.calcsize(form):
            return bytes([prefix]) + struct.pack(form, value)
    return b"\x0e" + struct.pack("<Q", value)


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def buffer(data: bytes) -> bytes:
    size = integer(len(data))
    return b"\x11" + _length(len(size) + len(data)) + size + data


def package(*elements: bytes) -> bytes:
    body = bytes([len(elements)]) + b"".join(elements)
    return b"\x12" + _length(len(body)) + body


def name(what: bytes, value: bytes) -> bytes:
    return b"\x08" + what + value


def scope(where: bytes, body: bytes) -> bytes:
    return b"\x10" + _length(len(where) + len(body)) + where + body


def device(what: bytes, body: bytes) -> bytes:
    return b"\x5b\x82" + _length(len(what) + len(body)) + what + body


def memory_window(start: int, size: int) -> bytes:
    """A resource template: a 32-bit window of memory that is handed on, writable, not cached (6.4.3.5.2), and the end tag (6.4.2.9)."""
    window = struct.pack("<BHBBBIIIII", 0x87, 23, 0, 0x0C, 0x01, 0, start, start + size - 1, 0, size)
    return window + b"\x79\x00"
