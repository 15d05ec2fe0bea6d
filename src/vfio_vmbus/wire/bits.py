"""Integers with named bit fields, which print and decode themselves.

class Flow(BitField, width=16):
    urgent = Bits(0)
    queue = Bits(4, 3)

Flow.of(urgent=1, queue=5)      -> Flow(0x51: urgent=1, queue=5)
Flow(0x51).queue                -> 5
Flow.queue.shift, .mask         -> 4, 0x70     (plain ints, for kernels)
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Self, overload

from vfio_vmbus.errors import UsageError

STORAGE_WIDTHS = (8, 16, 32, 64)


class Bits:
    """One named bit field: `width` bits from bit `shift`. `mask` is in place, `limit` the largest value."""

    def __init__(self, shift: int, width: int = 1) -> None:
        self.shift = shift
        self.width = width
        self.limit = (1 << width) - 1
        self.mask = self.limit << shift

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: int, owner: type) -> int: ...
    def __get__(self, instance: int | None, owner: type) -> Self | int:
        if instance is None:
            return self
        return (int(instance) & self.mask) >> self.shift


class BitField(int):
    """An unsigned integer of WIDTH bits whose parts have names. Unnamed bits are kept as they are."""

    WIDTH: ClassVar[int]
    PARTS: ClassVar[Mapping[str, Bits]]

    def __init_subclass__(cls, *, width: int) -> None:
        super().__init_subclass__()
        parts = {name: part for name, part in vars(cls).items() if isinstance(part, Bits)}
        taken = 0
        for name, part in parts.items():
            if part.mask & taken or part.mask >> width:
                raise TypeError(f"{cls.__name__}.{name}: bits overlap another part or leave {width} bits")
            taken |= part.mask
        if width not in STORAGE_WIDTHS:
            raise TypeError(f"{cls.__name__}: width {width} is none of {STORAGE_WIDTHS}")
        cls.WIDTH = width
        cls.PARTS = MappingProxyType(parts)

    def __new__(cls, value: int = 0) -> Self:
        if not 0 <= value < 1 << cls.WIDTH:
            raise UsageError(f"{cls.__name__}: {value:#x} does not fit {cls.WIDTH} bits")
        return super().__new__(cls, value)

    @classmethod
    def of(cls, **values: int) -> Self:
        """The integer with these parts, all else zero. UsageError for an unknown part or a large value."""
        return cls(0).replace(**values)

    def replace(self, **values: int) -> Self:
        """A copy with these parts changed. Raises UsageError as `of` does."""
        raw = int(self)
        for name, value in values.items():
            part = self.PARTS.get(name)
            if part is None:
                raise UsageError(f"{type(self).__name__} has no part {name!r}, only {', '.join(self.PARTS)}")
            if not 0 <= value <= part.limit:
                raise UsageError(f"{type(self).__name__}.{name}: {value} is not in 0..{part.limit}")
            raw = raw & ~part.mask | value << part.shift
        return type(self)(raw)

    def __repr__(self) -> str:
        values = {name: (int(self) & part.mask) >> part.shift for name, part in self.PARTS.items()}
        named = ", ".join(f"{name}={value}" for name, value in values.items() if value)
        return f"{type(self).__name__}({int(self):#x}{': ' if named else ''}{named})"
