"""tools/btf_extract.py on type data made by hand: a kernel's, and a module's on top of it."""

import importlib.util
import struct
from pathlib import Path
from uuid import UUID

import pytest

PATH = Path(__file__).parents[2] / "tools/btf_extract.py"
SPEC = importlib.util.spec_from_file_location("btf_extract", PATH)
btf_extract = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(btf_extract)


def blob(types: bytes, strings: bytes) -> bytes:
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def one(
    name: int, kind: int, size_or_type: int, entries: list[tuple[int, ...]] = (), *, flag: int = 0, vlen: int | None = None
) -> bytes:
    count = len(entries) if vlen is None else vlen
    words = [word for entry in entries for word in entry]
    return struct.pack(f"<{3 + len(words)}I", name, flag << 31 | kind << 24 | count, size_or_type, *words)


KERNEL_STRINGS = b"\0u32\0u8\0inner\0a\0b\0"
KERNEL = blob(
    one(1, 1, 4, [(32,)], vlen=0)  # 1: u32
    + one(5, 1, 1, [(8,)], vlen=0)  # 2: u8
    + one(0, 3, 0, [(2, 1, 6)], vlen=0)  # 3: u8[6]
    + one(8, 4, 12, [(14, 1, 0), (16, 3, 32)]),  # 4: struct inner {u32 a; u8 b[6]}
    KERNEL_STRINGS,
)
# String offsets of the module go on where the kernel's end, and so do its types: 5, 6, ...
FIRST = len(KERNEL_STRINGS)
MODULE_STRINGS = b"outer\0in\0low\0high\0kind\0ONE\0TWO\0word\0"
MODULE = blob(
    one(0, 5, 4, [(FIRST + 9, 1, 5 << 24 | 0), (FIRST + 13, 1, 3 << 24 | 5)], flag=1)  # 5: union of bit fields
    + one(FIRST, 4, 20, [(FIRST + 6, 8, 0), (0, 5, 96), (14, 7, 128)])  # 6: struct outer
    + one(0, 10, 4)  # 7: const inner
    + one(FIRST + 31, 8, 7)  # 8: typedef of 7
    + one(FIRST + 18, 6, 4, [(FIRST + 23, 1), (FIRST + 27, 2)])  # 9: enum kind
    + one(0, 6, 4, [(FIRST + 27, 7)]),  # 10: an enum without a name
    MODULE_STRINGS,
)


@pytest.fixture
def split():
    return btf_extract.Btf(MODULE, btf_extract.Btf(KERNEL))


def test_a_modules_types_go_on_where_the_kernels_end(split):
    assert split.first_type == 5
    assert split.type(4).name == "inner"
    assert split.type(8).name == "inner"
    assert split.size(3) == 6


def test_members_are_found_through_wrappers_arrays_and_unnamed_unions(split):
    assert btf_extract.structs(split, {"outer"}) == {
        "outer": {
            "size": 20,
            "members": {
                "in": (0, 96),
                "in.a": (0, 32),
                "in.b": (32, 48),
                "low": (96, 5),
                "high": (101, 3),
                "a": (128, 96),
                "a.a": (128, 32),
                "a.b": (160, 48),
            },
        }
    }


def test_enums_are_found_by_name_and_unnamed_ones_by_an_enumerator(split):
    assert btf_extract.enumerators(split, {"kind"}) == {"ONE": 1, "TWO": 2}
    assert btf_extract.enumerators(split, {"TWO"}) == {"TWO": 7}


def test_other_data_is_refused():
    with pytest.raises(SystemExit, match="not little-endian BTF: magic 0x9feb"):
        btf_extract.Btf(KERNEL[1::-1] + KERNEL[2:])
    with pytest.raises(SystemExit, match="not a 64-bit little-endian ELF file"):
        btf_extract.sections(b"MZ" + bytes(100))


def elf(sections: list[tuple[str, int, int, bytes]]) -> bytes:
    """An ELF file of (name, type, flags, data), the names being in the last section."""
    names = b"\0".join(name.encode() for name, *_ in sections) + b"\0.names\0"
    everything = [*sections, (".names", 3, 0, names)]
    body, headers, at = b"", b"", 64
    for name, kind, flags, data in everything:
        headers += struct.pack("<IIQQQQ", names.index(name.encode()), kind, flags, 0, at, len(data)) + bytes(24)
        body += data
        at += len(data)
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, at)
    struct.pack_into("<3H", head, 0x3A, 64, len(everything), len(everything) - 1)
    return bytes(head) + body + headers


def test_constants_are_counted_where_they_are_loaded():
    guid = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
    number = (0xFC01020D).to_bytes(4, "little")
    image = elf(
        [
            (".text", 1, 6, b"\x90" + number * 2),
            (".rodata", 1, 2, guid.bytes_le),
            (".debug", 1, 0, number),
            (".BTF", 1, 0, MODULE),
        ]
    )
    assert btf_extract.occurrences(image, {"0xfc01020d", str(guid), "0x00000077", "a_struct"}) == {
        "0xfc01020d": 2,
        str(guid): 1,
        "0x00000077": 0,
    }
    assert btf_extract.btf_section(image) == MODULE
