"""Loads, stores, fences and copies at integer addresses: the only way in which data-plane code touches memory.

Compiled, each is one machine instruction or a few (an LLVM intrinsic). Every scalar access is atomic, so that the compiler can
neither repeat, split nor drop it: what the other side may write is read exactly once. Plain forms are relaxed ("monotonic");
`_acquire` and `_release` order them against other accesses. `_ordered` ones are in order among themselves, too: an ordered load
behind an ordered store comes after it, which otherwise takes a store and a fence, and is one instruction this way (xchg; stlr
and ldar). All values are int64; loads of 8, 16 and 32 bits are zero-extended, `load64` gives the same 64 bits as a signed number.

Interpreted (NUMBA_DISABLE_JIT=1), each access is first checked against the registered memory, `registry`, and raises
`OutOfBounds` where it leaves it. That is the mode in which tests prove that no kernel can be made to leave its memory.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from . import part
from .kernel import INTERPRETED
from .registry import check

inline: Callable[[Any], Any] = register_jitable(forceinline=True, **part.OPTIONS)
"""Marks a helper of kernels: compiled into each kernel that calls it, a plain function everywhere else."""

_INT = types.int64
_BITS = {8: ir.IntType(8), 16: ir.IntType(16), 32: ir.IntType(32), 64: ir.IntType(64)}
_C = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_int64}


def _load(bits: int, ordering: str) -> Any:
    def plain(address: int) -> int:
        check(address, bits // 8)
        return _C[bits].from_address(address).value

    if INTERPRETED:
        return plain

    @intrinsic  # type: ignore[untyped-decorator]
    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], _BITS[bits].as_pointer())
            value = builder.load_atomic(pointer, ordering, align=bits // 8)
            return value if bits == 64 else builder.zext(value, _BITS[64])

        return _INT(_INT), generate

    return load


def _store(bits: int, ordering: str) -> Any:
    def plain(address: int, value: int) -> None:
        check(address, bits // 8)
        _C[bits].from_address(address).value = int(value)

    if INTERPRETED:
        return plain

    @intrinsic  # type: ignore[untyped-decorator]
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], _BITS[bits].as_pointer())
            narrow = args[1] if bits == 64 else builder.trunc(args[1], _BITS[bits])
            builder.store_atomic(narrow, pointer, ordering, align=bits // 8)
            return context.get_dummy_value()

        return types.void(_INT, _INT), generate

    return store


load8 = _load(8, "monotonic")
load16 = _load(16, "monotonic")
load32 = _load(32, "monotonic")
load64 = _load(64, "monotonic")
load32_acquire = _load(32, "acquire")
load64_acquire = _load(64, "acquire")
load32_ordered = _load(32, "seq_cst")
store8 = _store(8, "monotonic")
store16 = _store(16, "monotonic")
store32 = _store(32, "monotonic")
store64 = _store(64, "monotonic")
store32_release = _store(32, "release")
store64_release = _store(64, "release")
store32_ordered = _store(32, "seq_cst")


def _change(operation: str, plainly: Callable[[int, int], int]) -> Any:
    """A change of a 32-bit word; what it was before."""

    def plain(address: int, value: int) -> int:
        check(address, 4)
        word = ctypes.c_uint32.from_address(address)
        before = word.value
        word.value = plainly(before, int(value))
        return before

    if INTERPRETED:
        return plain

    @intrinsic  # type: ignore[untyped-decorator]
    def change(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], _BITS[32].as_pointer())
            before = builder.atomic_rmw(operation, pointer, builder.trunc(args[1], _BITS[32]), "seq_cst")
            return builder.zext(before, _BITS[64])

        return _INT(_INT, _INT), generate

    return change


or32 = _change("or", lambda before, bits: before | bits)
"""Set bits of a 32-bit word that others change at the same time, ordered against all else; the word as it was. Interpreted it is not
atomic."""
and32 = _change("and", lambda before, bits: before & bits)
"""The same, keeping only these bits."""


def _fence() -> Any:
    if INTERPRETED:
        return lambda: None

    @intrinsic  # type: ignore[untyped-decorator]
    def fence(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), generate

    return fence


def _pause() -> Any:
    if INTERPRETED:
        return lambda: None

    @intrinsic  # type: ignore[untyped-decorator]
    def pause(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if platform.machine() == "x86_64":
                name, hint = "llvm.x86.sse2.pause", []
            else:
                name, hint = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in hint])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), hint)
            return context.get_dummy_value()

        return types.void(), generate

    return pause


def _prefetch() -> Any:
    if INTERPRETED:
        return lambda address: None

    @intrinsic  # type: ignore[untyped-decorator]
    def prefetch(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [pointer, *(ir.Constant(number, value) for value in (1, 3, 1))])
            return context.get_dummy_value()

        return types.void(_INT), generate

    return prefetch


prefetch_to_write = _prefetch()
"""Ask for a cache line that will be written soon, so that stores to it need not wait for the other core. Only a hint: any address
will do, and nothing is touched."""
fence = _fence()
"""A full barrier (seq_cst), between publishing an index and looking at the other side's."""
pause = _pause()
"""A spin-wait hint to the CPU."""


def _block_copy(width: int) -> Any:
    """A copy of exactly `width` bytes through one vector register."""

    def plain(target: int, source: int) -> None:
        check(source, width)
        check(target, width)
        ctypes.memmove(target, source, width)

    if INTERPRETED:
        return plain

    @intrinsic  # type: ignore[untyped-decorator]
    def block(typing_context: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = ir.VectorType(ir.IntType(8), width).as_pointer()
            value = builder.load(builder.inttoptr(args[1], vector), align=1)
            builder.store(value, builder.inttoptr(args[0], vector), align=1)
            return context.get_dummy_value()

        return types.void(_INT, _INT), generate

    return block


def _long_copy() -> Any:
    def plain(target: int, source: int, size: int) -> None:
        check(source, size)
        check(target, size)
        ctypes.memmove(target, source, size)

    if INTERPRETED:
        return plain

    @intrinsic  # type: ignore[untyped-decorator]
    def long_copy(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointers = [builder.inttoptr(value, cgutils.voidptr_t) for value in args[:2]]
            cgutils.raw_memcpy(builder, pointers[0], pointers[1], args[2], 1)
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT), generate

    return long_copy


copy64 = _block_copy(64)
copy32 = _block_copy(32)
copy16 = _block_copy(16)
copy8 = _block_copy(8)
_memcpy = _long_copy()


@inline
def copy(target: int, source: int, size: int) -> None:
    """Copy `size` bytes between areas that do not overlap; short ones without a call."""
    if size > 512:
        _memcpy(target, source, size)
    elif size >= 64:
        end = size - 64
        at = 0
        while at < end:
            copy64(target + at, source + at)
            at += 64
        copy64(target + end, source + end)
    elif size >= 32:
        copy32(target, source)
        copy32(target + size - 32, source + size - 32)
    elif size >= 16:
        copy16(target, source)
        copy16(target + size - 16, source + size - 16)
    elif size >= 8:
        copy8(target, source)
        copy8(target + size - 8, source + size - 8)
    else:
        for at in range(size):
            store8(target + at, load8(source + at))


def _structure(dtype: np.dtype[Any]) -> Any:
    """The ctypes type of a dtype of int64 fields: its fields are Python integers, which neither wrap around nor warn."""
    if dtype.subdtype is not None:
        element, shape = dtype.subdtype
        kind = _structure(element)
        for length in reversed(shape):
            kind = kind * length
        return kind
    if dtype.fields is None:
        if dtype != np.int64:
            raise TypeError(f"a record that kernels share has a field of {dtype}: make it int64")
        return ctypes.c_int64
    names = dtype.names or ()
    kind = type("Record", (ctypes.Structure,), {"_fields_": [(name, _structure(dtype[name])) for name in names]})
    if ctypes.sizeof(kind) != dtype.itemsize:
        raise TypeError(f"a record that kernels share has gaps: {dtype}")
    return kind


def viewer(dtype: np.dtype[Any]) -> Any:
    """A function from an address to the record there, for private state: fields read and written by name, plain accesses.

    Every field must be int64, an array or a record of it; TypeError if not. For memory that the other side can write use the
    loads above, once.
    """
    structure = _structure(dtype)

    def plain(address: int) -> Any:
        check(address, dtype.itemsize)
        return structure.from_address(address)

    if INTERPRETED:
        return plain
    record = numba.from_dtype(dtype)

    @intrinsic  # type: ignore[untyped-decorator]
    def view(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(_INT), generate

    return view
