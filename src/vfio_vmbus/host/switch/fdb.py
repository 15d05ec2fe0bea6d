"""The forwarding database: which port an address was last seen at. A table of buckets, each of WAYS entries."""

from __future__ import annotations

from ...memory.access import inline
from ...memory.kernel import kernel, step
from .state import BUCKETS, ENTRY_SIZE, FLOOD, STATIC, WAYS, entry_at, switch_at


@inline
def bucket_of(fdb: int, mac: int) -> int:
    """Address of the bucket of an address. (Products of 24 by 23 bits, so that no interpreter overflows.)"""
    mixed = (mac & 0xFFFFFF) * 0x5E3779 + (mac >> 24) * 0x45EBCB
    return fdb + ((mixed >> 17) & (BUCKETS - 1)) * (WAYS * ENTRY_SIZE)


@step("i8(i8, i8)")
def fdb_lookup(address: int, mac: int) -> int:
    """The port of an address, or FLOOD when it is unknown or has not been seen for longer than the switch remembers."""
    switch = switch_at(address)
    bucket = bucket_of(switch.fdb, mac)
    for way in range(WAYS):
        entry = entry_at(bucket + way * ENTRY_SIZE)
        if entry.mac == mac:
            return entry.port if switch.now - entry.seen <= switch.age_ns else FLOOD
    return FLOOD


@step("i8(i8, i8, i8)")
def fdb_learn(address: int, mac: int, port: int) -> int:
    """Note that `mac` is at `port` now; 1 if a lookup can have another answer than before. Static entries stay."""
    switch = switch_at(address)
    bucket = bucket_of(switch.fdb, mac)
    place = 0
    oldest = STATIC
    for way in range(WAYS):
        entry = entry_at(bucket + way * ENTRY_SIZE)
        if entry.mac == mac:
            if entry.seen == STATIC:
                return 0
            moved = entry.port != port or switch.now - entry.seen > switch.age_ns
            entry.port = port
            entry.seen = switch.now
            return 1 if moved else 0
        age = entry.seen if entry.mac != 0 else -1
        if age < oldest:
            oldest = age
            place = bucket + way * ENTRY_SIZE
    if place == 0:  # nothing but static entries
        return 0
    entry = entry_at(place)
    if entry.mac != 0 and switch.now - entry.seen <= switch.age_ns:
        switch.evicted += 1
    entry.mac = mac
    entry.port = port
    entry.seen = switch.now
    return 1


@kernel("i8(i8, i8, i8)")
def fdb_pin(address: int, mac: int, port: int) -> int:
    """Make `mac` a static entry of `port`, for the worker's owner while it is parked. 0 if its bucket is full of such."""
    fdb_learn(address, mac, port)
    switch = switch_at(address)
    bucket = bucket_of(switch.fdb, mac)
    for way in range(WAYS):
        entry = entry_at(bucket + way * ENTRY_SIZE)
        if entry.mac == mac:
            entry.port = port
            entry.seen = STATIC
            return 1
    return 0
