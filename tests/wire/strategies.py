"""Hypothesis strategies that come from the field tables, so that no structure can be forgotten."""

import importlib
import pkgutil
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

import vfio_vmbus.wire
from vfio_vmbus.wire.layout import Array, BitsCodec, Codec, GuidCodec, Int, Nested, Raw, Struct, Tail
from vfio_vmbus.wire.table import Numbered


def all_structs() -> list[type[Struct]]:
    """Every structure that wire/ declares, headers and bases of messages included."""
    for module in pkgutil.iter_modules(vfio_vmbus.wire.__path__):
        importlib.import_module(f"vfio_vmbus.wire.{module.name}")
    found = [kind for kind in _below(Struct) if kind.__module__.startswith("vfio_vmbus.wire.") and kind.FIELDS]
    return sorted(set(found), key=lambda kind: (kind.__module__, kind.__name__))


def _below(kind: type[Struct]) -> Iterator[type[Struct]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _below(sub)


def raw_bytes(size: int) -> st.SearchStrategy[bytes]:
    """Exactly so many bytes; many of them come from a seed, as hypothesis wants its examples small."""
    if size > 256:
        return st.integers(0, 1 << 32).map(lambda seed: random.Random(seed).randbytes(size))
    return st.binary(min_size=size, max_size=size)


def values(codec: Codec) -> st.SearchStrategy[Any]:
    """Any value that a field can hold."""
    if isinstance(codec, Int):
        bits = 8 * codec.size
        low = -(1 << bits - 1) if codec.signed else 0
        return st.integers(low, low + (1 << bits) - 1)
    if isinstance(codec, BitsCodec):
        return st.integers(0, (1 << codec.kind.WIDTH) - 1).map(codec.kind)
    if isinstance(codec, Raw):
        return raw_bytes(codec.size)
    if isinstance(codec, GuidCodec):
        return st.uuids()
    if isinstance(codec, Nested):
        return structs(codec.kind)
    if isinstance(codec, Array):
        return st.tuples(*[values(codec.element)] * codec.count)
    assert isinstance(codec, Tail)
    return st.lists(values(codec.element), max_size=min(codec.limit, 20)).map(tuple)


@st.composite
def structs(draw: st.DrawFn, kind: type[Struct]) -> Struct:
    """Any structure of a kind; a message keeps its number, and the count of a tail says its length."""
    fields: dict[str, Any] = {}
    for field in kind.FIELDS:
        if issubclass(kind, Numbered) and field.offset == 0:
            continue
        fields[field.name] = draw(values(field.codec))
    if kind.TAIL is not None and isinstance(kind.TAIL.codec, Tail) and kind.TAIL.codec.count:
        fields[kind.TAIL.codec.count] = len(fields[kind.TAIL.name])
    return kind(**fields)
