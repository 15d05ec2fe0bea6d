"""The ACPI tables, taken apart again as an operating system does; the encoding of AML and resources against the specification's examples.

iasl (20200925) reads them all, and finds fault with one thing: VMBUS is no name of seven or eight characters. It is Hyper-V's.
"""

from __future__ import annotations

import struct

import pytest

from vfio_vmbus.vm import acpi

AT = 0xE0000


def read(at: int, data: bytes) -> bytes:
    """The table at an address."""
    start = at - AT
    (size,) = struct.unpack_from("<I", data, start + 4)
    table = data[start : start + size]
    assert len(table) == size
    return table


@pytest.fixture(params=[1, 2, 254])
def found(request: pytest.FixtureRequest) -> dict[bytes, bytes]:
    """The tables by signature, found from the RSDP on; "cpus" is how many they are for."""
    data = acpi.tables(AT, request.param)
    assert data[:8] == b"RSD PTR "
    assert sum(data[:20]) % 256 == sum(data[:36]) % 256 == 0
    assert data[15] == 2
    (xsdt_at,) = struct.unpack_from("<Q", data, 24)
    xsdt = read(xsdt_at, data)
    tables = {b"XSDT": xsdt, b"cpus": bytes([request.param])}
    for (at,) in struct.iter_unpack("<Q", xsdt[36:]):
        table = read(at, data)
        tables[table[:4]] = table
    fadt = tables[b"FACP"]
    (dsdt_at,) = struct.unpack_from("<I", fadt, 40)
    (facs_at,) = struct.unpack_from("<I", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (facs_at, dsdt_at)
    tables[b"DSDT"], tables[b"FACS"] = read(dsdt_at, data), read(facs_at, data)
    assert facs_at % 64 == 0
    return tables


def test_every_table_has_its_length_and_its_checksum(found: dict[bytes, bytes]) -> None:
    for name, table in found.items():
        if name not in (b"FACS", b"cpus"):  # the first has no checksum
            assert table[:4] == name
            assert sum(table) % 256 == 0, name
    assert len(found[b"FACP"]) == 276
    assert len(found[b"FACS"]) == 64


def test_the_madt_has_every_cpu(found: dict[bytes, bytes]) -> None:
    (cpus,) = found[b"cpus"]
    entries: dict[int, list[bytes]] = {}
    rest = found[b"APIC"][44:]
    while rest:
        entries.setdefault(rest[0], []).append(rest[2 : rest[1]])
        rest = rest[rest[1] :]
    assert [(entry[0], entry[1], entry[2]) for entry in entries[0]] == [(cpu, cpu, 1) for cpu in range(cpus)]
    ((io_apic_id, _, address, base),) = [struct.unpack("<BBII", entry) for entry in entries[1]]
    assert (address, base) == (0xFEC00000, 0)
    assert io_apic_id == cpus, "a number that no CPU has"
    assert [struct.unpack("<BBIH", entry) for entry in entries[2]] == [(0, 9, 9, 0xD)], "none for the timer's interrupt 0"


def test_the_fadt_says_how_to_power_off_and_to_reset(found: dict[bytes, bytes]) -> None:
    fadt = found[b"FACP"]
    assert struct.unpack_from("<H", fadt, 46) == (acpi.SCI,)
    assert struct.unpack_from("<I", fadt, 48) == (0,), "no SMI: ACPI is on"
    assert struct.unpack_from("<I", fadt, 56) + struct.unpack_from("<I", fadt, 64) == (0x600, 0x604)
    assert fadt[88:90] == b"\x04\x02"
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags >> 10 & 1, "the reset register is there"
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    assert struct.unpack_from("<BBBBQ", fadt, 148) == (1, 32, 0, 3, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 2, 0x604)
    (boot_flags,) = struct.unpack_from("<H", fadt, 109)
    assert not boot_flags & 1 << 1, "no keyboard controller"
    assert not boot_flags & 1 << 5, "there is a clock"


def test_the_dsdt_has_the_vmbus_within_a_module_with_a_window(found: dict[bytes, bytes]) -> None:
    body = found[b"DSDT"][36:]
    assert body[:5] == b"\x08_S5_"
    assert body[5:].startswith(bytes.fromhex("12 08 04 0a05 0a05 00 00"))
    module = body.index(b"VMOD")
    assert body.index(b"ACPI0004\0") < body.index(b"_CRS") < body.index(b"VMBS") < body.index(b"VMBUS\0")
    assert module < body.index(b"ACPI0004\0")
    start, size = acpi.VMBUS_WINDOW
    window = struct.pack("<IIIII", 0, start, start + size - 1, 0, size)
    assert b"\x87\x17\x00" in body
    assert window + b"\x79\x00" in body


@pytest.mark.parametrize(
    ("payload", "encoded"),
    [(0, "01"), (62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001"), (1 << 20, "c4000001")],
)
def test_package_lengths_count_themselves(payload: int, encoded: str) -> None:
    data = acpi._length(payload)
    assert data == bytes.fromhex(encoded)
    total = data[0] & 0x3F if len(data) == 1 else data[0] & 0xF | sum(byte << 4 + 8 * at for at, byte in enumerate(data[1:]))
    assert total == len(data) + payload
    assert data[0] >> 6 == len(data) - 1


def test_integers_take_as_few_bytes_as_they_can() -> None:
    values = {0: "00", 1: "01", 2: "0a02", 255: "0aff", 256: "0b0001", 65536: "0c00000100", 1 << 32: "0e0000000001000000"}
    assert {value: acpi.integer(value).hex() for value in values} == values


def test_the_tables_for_most_cpus_fit_where_firmware_is() -> None:
    assert len(acpi.tables(AT, acpi.MOST_CPUS)) < 0x20000
