"""A machine where there is no KVM to run it: each reason is one line, and nothing is left. What runs is in tests/guest."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.errors import UnavailableError
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vm.console import PanicWatch
from vfio_vmbus.vm.kvm import Kvm, _why_not
from vfio_vmbus.vm.machine import Machine


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOENT, "no /dev/kvm: load kvm_intel or kvm_amd"),
        (errno.EACCES, "no permission for /dev/kvm: be in its group"),
        (errno.EPERM, "no permission for /dev/kvm"),
        (errno.ENODEV, "no KVM behind it"),
        (errno.EMFILE, "EMFILE"),
    ],
)
def test_why_there_is_no_kvm(code: int, advice: str) -> None:
    text = _why_not("/dev/kvm", OSError(code, os.strerror(code)))
    assert advice in text
    assert "\n" not in text


def test_a_machine_without_kvm(tmp_path: Path) -> None:
    with nothing_left(), pytest.raises(UnavailableError, match=r"no .*/kvm: load"):
        Machine(kernel=tmp_path / "kernel", device=str(tmp_path / "kvm"))


def test_something_else_than_kvm(tmp_path: Path) -> None:
    other = tmp_path / "kvm"
    other.touch()
    with nothing_left(), pytest.raises(UnavailableError, match=r"KVM_GET_API_VERSION.*ENOTTY"):
        Kvm(str(other))


def test_only_a_person_who_may(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open anything; `_why_not` is tested by itself")
    closed = tmp_path / "kvm"
    closed.touch(mode=0)
    with pytest.raises(UnavailableError, match="no permission"):
        Kvm(str(closed))


class Screen:
    def __init__(self) -> None:
        self.shown = b""

    def write(self, data: bytes) -> None:
        self.shown += data


@given(st.lists(st.binary(max_size=50)))
def test_the_console_gets_all_that_goes_by(pieces: list[bytes]) -> None:
    screen = Screen()
    watch = PanicWatch(screen, lambda _: None)
    for piece in pieces:
        watch.write(piece)
    assert screen.shown == b"".join(pieces)


def test_a_panic_is_heard_however_its_bytes_come() -> None:
    stuck: list[str] = []
    watch = PanicWatch(None, stuck.append)
    for byte in b"\rok\n[   4.3] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[   4.4] CPU: 0\r\n":
        watch.write(bytes([byte]))
    assert watch.text == "VFS: Unable to mount root fs"
    assert stuck == []
    watch.write(b"[ 4.5] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n")
    assert stuck == ["VFS: Unable to mount root fs"]


def test_a_line_without_an_end_is_not_kept() -> None:
    watch = PanicWatch(None, lambda _: None)
    for _ in range(100):
        watch.write(bytes(1000))
    assert len(watch._line) <= 1024
