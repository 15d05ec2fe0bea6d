#!/usr/bin/env python3
"""Read layouts, enumerators and constants out of a kernel's own binaries, and print them as JSON.

The tests compare the declarations in wire/ with these, so that a wrong offset cannot hide: an encoder and a
decoder made from one table agree with each other even where both are wrong.

    apt-get download PACKAGE && dpkg -x PACKAGE.deb ROOT
    tools/btf_extract.py --vmlinuz ROOT/boot/vmlinuz-* --module ROOT/.../hv_vmbus.ko.xz --module ... \
        --package NAME --version VERSION --wanted tests/fixtures/btf/wanted.txt > tests/fixtures/btf/NAME.json

Structures and enumerators come from BTF type data. What the kernel has as macros is in no BTF; but such a
number, or a GUID, stands in the code or data of a module that uses it, so how often it does is counted.

A module's BTF is split: its type numbers and string offsets go on where the kernel's own end. Only the
standard library is used, and the command zstd where a kernel is compressed with it. Format: Documentation/bpf/btf.rst of the
kernel.
"""

import argparse
import gzip
import json
import lzma
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

BTF_MAGIC = 0xEB9F
(INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT) = range(1, 12)
(FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64) = range(12, 20)
WRAPPERS = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}
TAIL_BYTES = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}  # behind the 12 bytes of every type
BYTES_PER_ENTRY = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}


@dataclass
class Type:
    """One BTF type: `size_or_type` is a size in bytes or the number of another type, by kind."""

    name: str
    kind: int
    kind_flag: bool
    size_or_type: int
    entries: list[tuple[int, ...]] = field(default_factory=list)


class Btf:
    """The types of a kernel, or of a module on top of a kernel's."""

    def __init__(self, data: bytes, base: "Btf | None" = None) -> None:
        magic, _version, _flags, header = struct.unpack_from("<HBBI", data)
        if magic != BTF_MAGIC:
            raise SystemExit(f"not little-endian BTF: magic {magic:#x}, need {BTF_MAGIC:#x}")
        type_offset, type_length, string_offset, string_length = struct.unpack_from("<4I", data, 8)
        self.base = base
        self.first_string: int = base.string_end if base else 0
        self.strings = data[header + string_offset : header + string_offset + string_length]
        self.string_end: int = self.first_string + string_length
        self.first_type: int = base.type_end if base else 1
        self.types: list[Type] = []
        self._parse(data[header + type_offset : header + type_offset + type_length])
        self.type_end: int = self.first_type + len(self.types)

    def _parse(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            name, info, size_or_type = struct.unpack_from("<3I", data, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            made = Type(self.string(name), kind, bool(info >> 31), size_or_type)
            at += 12
            if kind in BYTES_PER_ENTRY:
                width = BYTES_PER_ENTRY[kind]
                form = f"<{width // 4}I"
                made.entries = [struct.unpack_from(form, data, at + i * width) for i in range(count)]
                at += count * width
            elif kind in TAIL_BYTES:
                made.entries = [struct.unpack_from(f"<{TAIL_BYTES[kind] // 4}I", data, at)]
                at += TAIL_BYTES[kind]
            self.types.append(made)

    def string(self, offset: int) -> str:
        if self.base and offset < self.first_string:
            return self.base.string(offset)
        start = offset - self.first_string
        return self.strings[start : self.strings.index(0, start)].decode()

    def type(self, number: int) -> Type:
        """A type by number, its typedefs and qualifiers taken off."""
        if self.base and number < self.first_type:
            return self.base.type(number)
        found = self.types[number - self.first_type]
        return self.type(found.size_or_type) if found.kind in WRAPPERS else found

    def size(self, number: int) -> int:
        """Bytes that a type takes."""
        found = self.type(number)
        if found.kind == PTR:
            return 8
        if found.kind == ARRAY:
            element, _index, count = found.entries[0]
            return self.size(element) * count
        return found.size_or_type

    def members(self, owner: Type, prefix: str = "", base_bits: int = 0) -> dict[str, tuple[int, int]]:
        """Dotted path -> (offset, size) in bits, nested members included; unnamed ones are left out of paths."""
        found: dict[str, tuple[int, int]] = {}
        for name_offset, number, position in owner.entries:
            name = self.string(name_offset)
            bits = position >> 24 if owner.kind_flag else 0
            offset = base_bits + (position & 0xFFFFFF if owner.kind_flag else position)
            path = f"{prefix}{name}" if name else prefix.removesuffix(".")
            kind = self.type(number)
            if name:
                found[path] = (offset, bits or 8 * self.size(number))
            if kind.kind in (STRUCT, UNION):
                found |= self.members(kind, f"{path}." if path else "", offset)
        return found


@dataclass
class Section:
    """A section of an ELF file; `loaded` when it is in memory as the file has it."""

    name: str
    loaded: bool
    data: bytes


def sections(elf: bytes) -> list[Section]:
    """The sections of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SystemExit("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    width, count, names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * width) for i in range(count)]
    names_at = headers[names][4]
    found = []
    for name, kind, flags, _address, offset, size in headers:
        start = names_at + name
        text = elf[start : elf.index(0, start)].decode()
        found.append(Section(text, kind == 1 and bool(flags & 2), elf[offset : offset + size]))
    return found


def btf_section(elf: bytes) -> bytes:
    """The BTF data of a kernel or module."""
    for found in sections(elf):
        if found.name == ".BTF":
            return found.data
    raise SystemExit("no section .BTF")


def occurrences(elf: bytes, wanted: set[str]) -> dict[str, int]:
    """How often each wanted constant ("0x...", 32 bits) or GUID stands in code and data."""
    loaded = [found.data for found in sections(elf) if found.loaded]
    counts = {}
    for text in wanted:
        if text.startswith("0x"):
            pattern = int(text, 16).to_bytes(4, "little")
        elif text.count("-") == 4:
            pattern = UUID(text).bytes_le
        else:
            continue
        counts[text] = sum(data.count(pattern) for data in loaded)
    return counts


def vmlinux(path: Path) -> bytes:
    """The ELF file inside an x86 bzImage, or the file itself if it is one."""
    image = path.read_bytes()
    if image[:4] == b"\x7fELF":
        return image
    if image[0x202:0x206] != b"HdrS":
        raise SystemExit(f"{path}: neither ELF nor an x86 bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<2I", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if payload[:6] == b"\xfd7zXZ\x00":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    if payload[:2] == b"\x1f\x8b":
        return gzip.decompress(payload[:-4])
    if payload[:4] == b"\x28\xb5\x2f\xfd":
        return unzstd(payload[:-4])
    raise SystemExit(f"{path}: compressed with {payload[:4].hex()}, unknown here; unpack it and pass the ELF file")


def unzstd(data: bytes) -> bytes:
    """Python has zstd from 3.14 on; before that the command of this name does it."""
    command = shutil.which("zstd")
    if command is None:
        raise SystemExit("the kernel is compressed with zstd: install the package zstd")
    return subprocess.run([command, "-dc"], input=data, capture_output=True, check=True).stdout


def module(path: Path) -> bytes:
    """A kernel module, compressed or not."""
    return lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()


def structs(btf: Btf, wanted: set[str]) -> dict[str, dict[str, object]]:
    """The wanted structures and unions by name."""
    return {
        made.name: {"size": made.size_or_type, "members": btf.members(made)}
        for made in btf.types
        if made.kind in (STRUCT, UNION) and made.name in wanted
    }


def enumerators(btf: Btf, wanted: set[str]) -> dict[str, int]:
    """All enumerators of the enums that have a wanted name, or a wanted enumerator where they have none."""
    found: dict[str, int] = {}
    for made in btf.types:
        if made.kind == ENUM:
            values = {btf.string(name): value for name, value in made.entries}
            if made.name in wanted or (not made.name and wanted & values.keys()):
                found |= values
    return found


def extract(vmlinuz: Path, modules: list[Path], wanted: set[str]) -> dict[str, object]:
    """Structures, enumerators (the first one found counts) and constants."""
    base = Btf(btf_section(vmlinux(vmlinuz)))
    found_structs: dict[str, dict[str, object]] = {}
    found_values: dict[str, int] = {}
    counts: Counter[str] = Counter()
    images = [module(path) for path in modules]
    for image in images:
        counts.update(occurrences(image, wanted))
    for btf in [*(Btf(btf_section(image), base) for image in images), base]:
        found_structs = {**structs(btf, wanted), **found_structs}
        found_values = {**enumerators(btf, wanted), **found_values}
    return {
        "structs": dict(sorted(found_structs.items())),
        "enumerators": dict(sorted(found_values.items())),
        "constants": dict(sorted(counts.items())),
    }


def to_json(output: dict[str, object]) -> str:
    """JSON with one structure or enumerator a line, so that a change shows in a diff."""
    parts = []
    for name, value in output.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--vmlinuz", type=Path, required=True, help="bzImage, or vmlinux as ELF")
    parser.add_argument("--module", type=Path, action="append", default=[], help=".ko or .ko.xz, repeatable")
    parser.add_argument("--package", required=True, help="name of the package, written into the output")
    parser.add_argument("--version", required=True, help="version of the package, written into the output")
    parser.add_argument("--wanted", type=Path, required=True, help="file of names, one a line, # for remarks")
    arguments = parser.parse_args()
    lines = (line.partition("#")[0].strip() for line in arguments.wanted.read_text().splitlines())
    wanted = {line for line in lines if line}
    output = {
        "package": arguments.package,
        "version": arguments.version,
        "modules": [path.name for path in arguments.module],
        **extract(arguments.vmlinuz, arguments.module, wanted),
    }
    print(to_json(output))


if __name__ == "__main__":
    main()
