"""Configuration space and MSI-X table: the bytes of docs/pci-personality.md, and which of them can be written."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_vmbus.errors import UsageError
from vfio_vmbus.vfio.config import Identity, Storage, config_space, msix_bar
from vfio_vmbus.vfio.function import PciFunction
from vfio_vmbus.wire.guids import CLASS_BALLOON, CLASS_NETWORK, CLASS_SCSI

INSTANCE = UUID("00112233-4455-6677-8899-aabbccddeeff")


def card() -> Storage:
    return config_space(Identity(CLASS_NETWORK, INSTANCE), 65)


def test_a_card_after_power_on_is_these_bytes() -> None:
    expected = bytearray(256)
    expected[0x00:0x10] = bytes.fromhex("14145642 00001000 01000002 00000000")
    expected[0x2C:0x30] = bytes.fromhex("14140000")
    expected[0x34] = 0x40
    expected[0x40:0x4C] = bytes.fromhex("11504000 02000000 02080000")
    expected[0x50:0x58] = bytes.fromhex("09002801") + b"VMBS"
    expected[0x58:0x68] = bytes.fromhex("63 51 61 f8 3e df c5 46 91 3f f2 d2 f9 65 ed 0e")
    expected[0x68:0x78] = bytes.fromhex("33221100 5544 7766 8899aabbccddeeff")
    assert card().read(0, 256) == expected


def test_only_these_bits_can_be_written() -> None:
    space = card()
    before = space.read(0, 256)
    space.write(0, b"\xff" * 256)
    changed = bytes(a ^ b for a, b in zip(space.read(0, 256), before, strict=True))
    expected = bytearray(256)
    expected[0x04:0x06] = bytes.fromhex("0604")
    expected[0x0C] = 0xFF
    expected[0x10:0x14] = bytes.fromhex("00e0ffff")
    expected[0x18:0x1C] = bytes.fromhex("00f0ffff")
    expected[0x3C] = 0xFF
    expected[0x42:0x44] = bytes.fromhex("00c0")
    assert changed == expected
    space.reset()
    assert space.read(0, 256) == before


@pytest.mark.parametrize(
    ("guid", "code"), [(CLASS_NETWORK, 0x020000), (CLASS_SCSI, 0x010000), (CLASS_BALLOON, 0xFF0000), (UUID(int=0), 0xFF0000)]
)
def test_the_class_code_fits_the_device(guid: UUID, code: int) -> None:
    assert config_space(Identity(guid, INSTANCE), 1).read(9, 3) == code.to_bytes(3, "little")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(min_size=1, max_size=8)), max_size=20))
def test_writes_of_any_width_are_writes_of_bytes(writes: list[tuple[int, bytes]]) -> None:
    wide, narrow = card(), card()
    for offset, data in writes:
        data = data[: 256 - offset]
        wide.write(offset, data)
        for at, value in enumerate(data, offset):
            narrow.write(at, bytes([value]))
    assert wide.read(0, 256) == b"".join(narrow.read(at, 1) for at in range(256))


def test_the_msix_table_begins_masked_and_keeps_what_hardware_keeps() -> None:
    bar = msix_bar(65)
    for vector in (0, 64):
        assert bar.read(16 * vector, 8) + bar.read(16 * vector + 8, 8) == bytes(12) + b"\1\0\0\0"
        for offset in (0, 8):
            bar.write(16 * vector + offset, b"\xff" * 8)
        entry = bar.read(16 * vector, 8) + bar.read(16 * vector + 8, 8)
        assert entry == bytes.fromhex("fcffffff ffffffff ffffffff 01000000")
    for offset in (16 * 65, 0x7F8, 0x800, 0x808, 0xFF8):
        bar.write(offset, b"\xff" * 8)
        assert bar.read(offset, 8) == bytes(8)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 16), (2, 4), (4, 8), (0x1000, 4), (0xFFC, 8), (-4, 4), (0, 0)])
def test_the_msix_table_is_read_in_words(offset: int, size: int) -> None:
    bar = msix_bar(65)
    with pytest.raises(UsageError, match=f"access of {size} bytes at"):
        bar.read(offset, size)
    with pytest.raises(UsageError, match=f"access of {size} bytes at"):
        bar.write(offset, bytes(size))


def test_there_is_room_for_128_vectors() -> None:
    assert msix_bar(128).read(0x7F8, 8) == bytes(4) + b"\1\0\0\0"
    for vectors in (0, 129):
        with pytest.raises(UsageError, match=f"{vectors} vectors: take 1 to 128"):
            PciFunction("function", vectors=vectors)
