"""Memory whose file is taken away while it is mapped: by truncation, which faults as a device's files do that go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from vfio_vmbus.memory.access import load64
from vfio_vmbus.memory.kernel import step
from vfio_vmbus.memory.mapping import PAGE, Mapping, Piece

SIZE = 4 * PAGE

DIES = """
import os, signal
from vfio_vmbus.memory.mapping import PAGE, Mapping, Piece
fds = [os.memfd_create(name) for name in ("expected", "other")]
for fd in fds:
    os.truncate(fd, PAGE)
expected, other = (Mapping([Piece(fd, 0, PAGE)], vanishes=fd == fds[0]) for fd in fds)
os.truncate(fds[0], 0)
assert expected.read(0, 8) == bytes(8)
{how}
"""


@step("i8(i8)")
def _load(address: int) -> int:
    return load64(address)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("vanishing")
    os.truncate(fd, SIZE)
    os.pwrite(fd, b"\xaa" * SIZE, 0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("touch", [lambda mapping: mapping.read(0, 8), lambda mapping: _load(mapping.address)])
def test_zeros_are_there_instead(fd: int, touch: Callable[[Mapping], object]) -> None:
    before = {b"\xaa" * 8, 0xAAAAAAAAAAAAAAAA - (1 << 64)}
    with Mapping([Piece(fd, 0, SIZE)], wrap_from=PAGE, vanishes=True) as mapping:
        assert touch(mapping) in before
        os.truncate(fd, 0)
        assert touch(mapping) in {bytes(8), 0}
        mapping.write(0, b"private")
        assert mapping.read(0, mapping.span) == b"private".ljust(mapping.span, b"\0")


def test_any_thread_that_runs_a_kernel_goes_on(fd: int) -> None:
    found: list[int] = []
    with Mapping([Piece(fd, 0, SIZE)], vanishes=True) as mapping:
        os.truncate(fd, 0)
        threads = [threading.Thread(target=lambda: found.append(_load(mapping.address + PAGE))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [0] * 8


def test_what_is_unmapped_is_not_looked_after(fd: int) -> None:
    """Its addresses may be somebody else's next."""
    first = Mapping([Piece(fd, 0, SIZE)], vanishes=True)
    first.close()
    second = os.memfd_create("second")
    os.truncate(second, SIZE)
    with Mapping([Piece(second, 0, SIZE)], vanishes=True) as mapping:
        os.truncate(fd, 0)
        mapping.write(0, b"stays")
        assert os.pread(second, 5, 0) == b"stays"
    os.close(second)


@pytest.mark.parametrize(
    "how", ["os.truncate(fds[1], 0); other.read(0, 8)", "os.kill(os.getpid(), signal.SIGBUS); signal.pause()"]
)
def test_everything_else_is_fatal_as_ever(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", DIES.format(how=how)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGBUS, "")
