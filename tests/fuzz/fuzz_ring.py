"""Fuzz target of the ring's ends: bytes become operations and hostile writes, on a ring and on the reference in lockstep.

With NUMBA_DISABLE_JIT=1 an access outside of the ring raises at once; compiled, guard pages end the process.
"""

from tests.ring.lockstep import Lockstep, decode

SEEDS = [
    bytes([0, 0, 3]) + bytes([40, 0, 0, 6, 0, 0, 0, 1, 2, 3, 4, 0, 0, 9]) * 3 + bytes([3, 8]),
    bytes([1, 0, 1, 0, 7, 0, 9, 0, 0, 0, 1, 2, 3, 4, 5, 2, 1, 5, 2, 6, 8, 0, 16, 7, 1, 9]),
    bytes([0, 0, 1, 8, 0, 1, 6, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 5, 1, 11, 0, 0, 0, 0, 0, 0, 8, 0, 3, 1, 9]),
    bytes([0, 0, 1, 8, 0, 1, 6, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 10, 2, 255, 255, 3, 1, 11, 0, 0, 16, 0, 0, 1, 3, 1, 9]),
]


def fuzz_ring_ends(data: bytes) -> None:
    """Whatever the other side writes, and when, both ends stay inside the ring and do exactly what the reference does."""
    pages, operations = decode(data)
    with Lockstep(pages) as pair:
        for name, *arguments in operations:
            pair.do(name, *arguments)
