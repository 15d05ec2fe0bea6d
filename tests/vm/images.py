"""bzImages that nobody could boot, for what is looked at in them."""

from __future__ import annotations

import struct
from typing import Any


def bzimage(
    *,
    version: int = 0x020F,
    setup_sectors: int = 4,
    code: int = 8192,
    loadflags: int = 1,
    xloadflags: int = 3,
    load_address: int = 0x1000000,
    init_size: int = 0x2000000,
    initrd_last: int = 0x7FFFFFFF,
    cmdline_size: int = 2047,
    magic: bytes = b"HdrS",
) -> bytes:
    """A file with the header of Linux's boot protocol, and `code` bytes behind its setup part that say where they are."""
    image = bytearray(((setup_sectors or 4) + 1) * 512)

    def put(at: int, form: str, value: Any) -> None:
        struct.pack_into("<" + form, image, at, value)

    put(0x1F1, "B", setup_sectors)
    put(0x1F4, "I", code // 16)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x6a"  # a jump over the header, whose second byte says where it ends
    image[0x202:0x206] = magic
    put(0x206, "H", version)
    put(0x211, "B", loadflags)
    put(0x22C, "I", initrd_last)
    put(0x236, "H", xloadflags)
    put(0x238, "I", cmdline_size)
    put(0x258, "Q", load_address)
    put(0x260, "I", init_size)
    return bytes(image) + b"".join(struct.pack("<Q", at) for at in range(0, code, 8))
