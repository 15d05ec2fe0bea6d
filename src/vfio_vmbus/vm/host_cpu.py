"""What this machine's own CPU says about itself: is it one that QEMU emulates?

Guests that use XSAVE were seen to fail there, nested as they are (Linux boots with it in QEMU 11.1), so `Machine` hides it. A real CPU's
virtualization has no such fault, nested or not, and its guests keep AVX.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

_HYPERVISOR: Final = 0x40000000
_EMULATOR: Final = b"TCGTCGTCGTCG"
"""What QEMU says there unless it uses KVM."""

# void cpuid(uint32_t leaf, uint32_t registers[4])
_CODE: Final = bytes.fromhex(
    "53"  # push rbx
    "89f8"  # mov eax, edi
    "31c9"  # xor ecx, ecx
    "0fa2"  # cpuid
    "8906"  # mov [rsi], eax
    "895e04"  # mov [rsi + 4], ebx
    "894e08"  # mov [rsi + 8], ecx
    "89560c"  # mov [rsi + 12], edx
    "5b"  # pop rbx
    "c3"  # ret
)


def cpuid(leaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX for a leaf, subleaf 0. There is no system call for it. Raises OSError where no code may be made."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as code:
        code[: len(_CODE)] = _CODE
        registers = (ctypes.c_uint32 * 4)()
        start = ctypes.c_char.from_buffer(code)
        call = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_void_p)(ctypes.addressof(start))
        call(leaf, ctypes.addressof(registers))
        del call, start  # or the mapping could not be closed
        return registers[0], registers[1], registers[2], registers[3]


def emulated() -> bool:
    """Is this CPU emulated by QEMU? No where that cannot be told."""
    try:
        _, *name = cpuid(_HYPERVISOR)
    except OSError:
        return False
    return b"".join(part.to_bytes(4, "little") for part in name) == _EMULATOR
