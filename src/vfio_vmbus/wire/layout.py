"""One field table per structure: class, size, offsets, numpy dtype, encoder and decoder.

    @struct(size=12)
    class Rescind(Struct):
        message_type: U32 = 2
        padding: U32 = 0
        relid: U32 = 0

    Rescind(relid=7).pack(), Rescind.unpack(data), Rescind.SIZE, Rescind.OFFSETS["relid"], Rescind.DTYPE

Everything is packed and little-endian, whatever the machine. The class is a frozen dataclass with keyword
arguments. A field is annotated with one of the integers below, `Guid`, another struct, a `BitField`,
`Annotated[bytes, Raw(n)]`, `Annotated[tuple[T, ...], Array(T, n)]`, or, last of all, with a `Tail`.
"""

import dataclasses
import struct as _struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.bits import BitField

if TYPE_CHECKING:
    import numpy as np

Buffer: TypeAlias = bytes | bytearray | memoryview
WritableBuffer: TypeAlias = bytearray | memoryview

NIL_GUID = UUID(int=0)


class Codec(Protocol):
    """How one field of `size` bytes is read and written. `dtype` is what numpy makes a dtype from."""

    size: int

    def get(self, buffer: Buffer, offset: int) -> Any: ...
    def put(self, buffer: WritableBuffer, offset: int, value: Any) -> None: ...
    def dtype(self) -> Any: ...


class Int:
    """A little-endian integer, by its letter in Python's struct module."""

    def __init__(self, letter: str) -> None:
        self._struct = _struct.Struct("<" + letter)
        self.size = self._struct.size
        self.signed = letter.islower()
        self.letter = letter

    def get(self, buffer: Buffer, offset: int) -> int:
        value: int = self._struct.unpack_from(buffer, offset)[0]
        return value

    def put(self, buffer: WritableBuffer, offset: int, value: int) -> None:
        self._struct.pack_into(buffer, offset, value)

    def dtype(self) -> str:
        return f"<{'i' if self.signed else 'u'}{self.size}"


class Raw:
    """Exactly `size` bytes. A shorter value is padded with zeros when the structure is made."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get(self, buffer: Buffer, offset: int) -> bytes:
        return bytes(buffer[offset : offset + self.size])

    def put(self, buffer: WritableBuffer, offset: int, value: bytes) -> None:
        buffer[offset : offset + self.size] = value

    def dtype(self) -> Any:
        return ("u1", (self.size,))


class GuidCodec:
    """A GUID: its first three parts are little-endian, the rest is in the order of the text."""

    size = 16

    def get(self, buffer: Buffer, offset: int) -> UUID:
        return UUID(bytes_le=bytes(buffer[offset : offset + 16]))

    def put(self, buffer: WritableBuffer, offset: int, value: UUID) -> None:
        buffer[offset : offset + 16] = value.bytes_le

    def dtype(self) -> Any:
        return ("u1", (16,))


class BitsCodec:
    """A BitField, stored as the integer of its width."""

    def __init__(self, kind: type[BitField]) -> None:
        self.kind = kind
        self._int = Int({8: "B", 16: "H", 32: "I", 64: "Q"}[kind.WIDTH])
        self.size = self._int.size

    def get(self, buffer: Buffer, offset: int) -> BitField:
        return self.kind(self._int.get(buffer, offset))

    def put(self, buffer: WritableBuffer, offset: int, value: int) -> None:
        self._int.put(buffer, offset, value)

    def dtype(self) -> str:
        return self._int.dtype()


class Nested:
    """A structure inside another."""

    def __init__(self, kind: "type[Struct]") -> None:
        self.kind = kind
        self.size = kind.SIZE

    def get(self, buffer: Buffer, offset: int) -> "Struct":
        return self.kind.unpack(buffer, offset)

    def put(self, buffer: WritableBuffer, offset: int, value: "Struct") -> None:
        value.pack_into(buffer, offset)

    def dtype(self) -> Any:
        return self.kind.DTYPE


class Array:
    """Exactly `count` elements of one type, as a tuple."""

    def __init__(self, element: Any, count: int) -> None:
        self.element = codec_of(element)
        self.count = count
        self.size = self.element.size * count

    def get(self, buffer: Buffer, offset: int) -> tuple[Any, ...]:
        return get_many(self.element, buffer, offset, self.count)

    def put(self, buffer: WritableBuffer, offset: int, value: tuple[Any, ...]) -> None:
        if len(value) != self.count:
            raise ValueError(f"{len(value)} elements, need {self.count}")
        put_many(self.element, buffer, offset, value)

    def dtype(self) -> Any:
        return (self.element.dtype(), (self.count,))


class Tail:
    """A last field of variable length, outside of SIZE and DTYPE.

    With `count`, the field of that name says how many elements there are, at most `limit`. Without it the
    tail takes every whole element up to the buffer's end (a ring pads packets to 8 bytes, so bytes too few
    for an element are padding).
    """

    size = 0

    def __init__(self, element: Any, *, limit: int, count: str | None = None) -> None:
        self.element = codec_of(element)
        self.limit = limit
        self.count = count

    def get(self, buffer: Buffer, offset: int) -> tuple[Any, ...]:
        return get_many(self.element, buffer, offset, (len(buffer) - offset) // self.element.size)

    def put(self, buffer: WritableBuffer, offset: int, value: tuple[Any, ...]) -> None:
        put_many(self.element, buffer, offset, value)

    def dtype(self) -> Any:
        raise TypeError("a tail has no fixed dtype")

    def checked_count(self, owner: str, values: Mapping[str, Any], room: int) -> int:
        """How many elements to read from `room` bytes; ProtocolError beyond `limit` or `room`."""
        fits = room // self.element.size
        count: int = values[self.count] if self.count else fits
        if count > self.limit:
            raise ProtocolError(f"{owner}: {self.count or 'tail'} is {count} elements, limit {self.limit}")
        if count > fits:
            raise ProtocolError(f"{owner}: {self.count} is {count}, need {count * self.element.size} bytes, have {room}")
        return count


def get_many(element: Codec, buffer: Buffer, offset: int, count: int) -> tuple[Any, ...]:
    """`count` elements, read in one go where they are integers."""
    if isinstance(element, Int):
        return _struct.unpack_from(f"<{count}{element.letter}", buffer, offset)
    return tuple(element.get(buffer, offset + i * element.size) for i in range(count))


def put_many(element: Codec, buffer: WritableBuffer, offset: int, values: tuple[Any, ...]) -> None:
    """The opposite of `get_many`."""
    if isinstance(element, Int):
        _struct.pack_into(f"<{len(values)}{element.letter}", buffer, offset, *values)
        return
    for i, value in enumerate(values):
        element.put(buffer, offset + i * element.size, value)


U8 = Annotated[int, Int("B")]
U16 = Annotated[int, Int("H")]
U32 = Annotated[int, Int("I")]
U64 = Annotated[int, Int("Q")]
S32 = Annotated[int, Int("i")]
Guid = Annotated[UUID, GuidCodec()]


def codec_of(hint: Any) -> Codec:
    """The codec that an annotation stands for; TypeError where there is none."""
    if get_origin(hint) is Annotated:
        for extra in get_args(hint)[1:]:
            if hasattr(extra, "get") and hasattr(extra, "put"):
                codec: Codec = extra
                return codec
    if isinstance(hint, type) and issubclass(hint, Struct):
        return Nested(hint)
    if isinstance(hint, type) and issubclass(hint, BitField):
        return BitsCodec(hint)
    raise TypeError(f"no layout for {hint!r}")


@dataclasses.dataclass(frozen=True)
class Field:
    """A row of a structure's table: `offset` and `size` in bytes."""

    name: str
    offset: int
    codec: Codec

    @property
    def size(self) -> int:
        return self.codec.size


class _LazyDtype:
    """`cls.DTYPE`, made on first use, so that declaring a structure needs no numpy."""

    def __get__(self, instance: object, owner: "type[Struct]") -> "np.dtype[Any]":
        made = _DTYPES.get(owner)
        if made is None:
            made = _DTYPES[owner] = _make_dtype(owner)
        return made


_DTYPES: "dict[type[Struct], np.dtype[Any]]" = {}


def _make_dtype(cls: "type[Struct]") -> "np.dtype[Any]":
    import numpy as np

    fixed = [field for field in cls.FIELDS if not isinstance(field.codec, Tail)]
    spec = {
        "names": [field.name for field in fixed],
        "formats": [field.codec.dtype() for field in fixed],
        "offsets": [field.offset for field in fixed],
        "itemsize": cls.SIZE,
    }
    return np.dtype(spec)  # type: ignore[call-overload, no-any-return, unused-ignore]


class Struct:
    """Base of all structures. SIZE is the fixed part; OFFSETS has nested fields as "offer.flags" too."""

    SIZE: ClassVar[int] = 0
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    OFFSETS: ClassVar[Mapping[str, int]] = MappingProxyType({})
    TAIL: ClassVar[Field | None] = None
    DTYPE: ClassVar[_LazyDtype] = _LazyDtype()

    def __post_init__(self) -> None:
        for field in self.FIELDS:
            if isinstance(field.codec, Raw):
                value = getattr(self, field.name)
                if len(value) > field.size:
                    raise UsageError(self._name(field.name, f"{len(value)} bytes, limit {field.size}"))
                object.__setattr__(self, field.name, bytes(value).ljust(field.size, b"\0"))

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, the tail included."""
        tail = self.TAIL
        if tail is None or not isinstance(tail.codec, Tail):
            return self.SIZE
        return self.SIZE + len(getattr(self, tail.name)) * tail.codec.element.size

    def pack(self) -> bytes:
        """The bytes. Raises UsageError where a value does not fit its field."""
        out = bytearray(self.nbytes)
        self.pack_into(out)
        return bytes(out)

    def pack_into(self, buffer: WritableBuffer, offset: int = 0) -> int:
        """Write at `offset`; returns the number of bytes. UsageError as for `pack`, or for want of room."""
        size = self.nbytes
        if offset < 0 or len(buffer) - offset < size:
            raise UsageError(self._name("", f"{len(buffer) - offset} bytes of room, need {size}"))
        self._check_tail()
        for field in self.FIELDS:
            value = getattr(self, field.name)
            try:
                field.codec.put(buffer, offset + field.offset, value)
            except (_struct.error, AttributeError, TypeError, ValueError) as error:
                raise UsageError(self._name(field.name, f"{value!r} does not fit: {error}")) from error
        return size

    @classmethod
    def unpack(cls, buffer: Buffer, offset: int = 0) -> Self:
        """Decode at `offset`. ProtocolError when there are too few bytes or a count is beyond its limit."""
        have = len(buffer) - offset
        if offset < 0 or have < cls.SIZE:
            raise ProtocolError(f"{cls.__name__}: have {have} bytes, need {cls.SIZE}")
        values: dict[str, Any] = {}
        for field in cls.FIELDS:
            at = offset + field.offset
            if isinstance(field.codec, Tail):
                count = field.codec.checked_count(cls.__name__, values, len(buffer) - at)
                values[field.name] = get_many(field.codec.element, buffer, at, count)
            else:
                values[field.name] = field.codec.get(buffer, at)
        return cls(**values)

    def __repr__(self) -> str:
        """Only what differs from the defaults: most of a message is zero."""
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _check_tail(self) -> None:
        if self.TAIL is None or not isinstance(self.TAIL.codec, Tail):
            return
        count, codec = len(getattr(self, self.TAIL.name)), self.TAIL.codec
        if count > codec.limit:
            raise UsageError(self._name(self.TAIL.name, f"{count} elements, limit {codec.limit}"))
        if codec.count and getattr(self, codec.count) != count:
            said = getattr(self, codec.count)
            raise UsageError(self._name(self.TAIL.name, f"{count} elements, but {codec.count} says {said}"))

    def _name(self, field: str, text: str) -> str:
        return f"{type(self).__name__}{'.' if field else ''}{field}: {text}"


StructT = TypeVar("StructT", bound=Struct)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def struct(*, size: int) -> Callable[[type[StructT]], type[StructT]]:
    """Class decorator: a frozen dataclass with a layout, checked at import to have `size` bytes."""

    def build(cls: type[StructT]) -> type[StructT]:
        made = dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
        hints = get_type_hints(made, include_extras=True)
        fields: list[Field] = []
        end = 0
        for name in (field.name for field in dataclasses.fields(made)):  # type: ignore[arg-type, unused-ignore]
            if fields and isinstance(fields[-1].codec, Tail):
                raise TypeError(f"{cls.__name__}.{name} stands behind a tail")
            fields.append(Field(name, end, codec_of(hints[name])))
            end += fields[-1].size
        if end != size:
            raise TypeError(f"{cls.__name__}: the fields take {end} bytes, declared {size}")
        made.SIZE = size
        made.FIELDS = tuple(fields)
        made.OFFSETS = MappingProxyType(dict(_offsets(fields)))
        made.TAIL = fields[-1] if fields and isinstance(fields[-1].codec, Tail) else None
        return made

    return build


def _offsets(fields: list[Field]) -> Iterator[tuple[str, int]]:
    for field in fields:
        yield field.name, field.offset
        if isinstance(field.codec, Nested):
            for name, offset in field.codec.kind.OFFSETS.items():
                yield f"{field.name}.{name}", field.offset + offset
