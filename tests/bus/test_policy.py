"""The one door to unsafe ways: who passes, who does not and what he is told, and what is left behind for others to see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.trees import INITIAL, RAWIO, machine, process, put
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.policy import SWITCH, allow_unsafe, unsafe_uses
from vfio_vmbus.errors import UnavailableError, UnsafeError


class WithKernel(Machine):
    """A machine whose kernel takes taints, as kernel/sysctl.c does: what is written is or-ed to what is there."""

    def write(self, path: Path, text: str) -> None:
        assert path == self.proc / "sys/kernel/tainted"
        path.write_text(f"{int(path.read_text()) | int(text)}\n")


class WithoutAdmin(Machine):
    """A machine whose kernel takes no taint of this process."""

    def write(self, path: Path, text: str) -> None:
        raise UnavailableError(f"{path}: not permitted")


def prepared(root: Path, kind: type[Machine] = WithKernel, **status: object) -> Machine:
    made = machine(root)
    process(made, **status)  # type: ignore[arg-type]
    put(made.proc / "sys/kernel/tainted", "4096\n")
    put(made.dev / "kmsg")
    return kind(**vars(made))


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests: marks go into this folder."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_who_may_passes_and_everybody_can_see_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = prepared(tmp_path, capabilities=RAWIO)
    use = allow_unsafe("uio_hv_generic of eth1", enabled=True, machine=here)
    assert (use.pid, use.what, use.logged, use.tainted) == (os.getpid(), "uio_hv_generic of eth1", True, True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "WARNING: uio_hv_generic of eth1 is unsafe" in said.err
    assert "tainted now" in said.err
    assert (here.proc / "sys/kernel/tainted").read_text() == f"{4096 | 64}\n"
    assert (here.dev / "kmsg").read_text() == (
        f"<4>vfio-vmbus: uio_hv_generic of eth1 opened by user (driver:{os.getpid()}): unsafe, nothing confines its DMA\n"
    )
    assert unsafe_uses(here) == [use]


def test_without_the_switch_nothing_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = prepared(tmp_path)
    with pytest.raises(UnsafeError, match=f"eth1 is unsafe.*only with {SWITCH}"):
        allow_unsafe("eth1", enabled=False, machine=here)
    nothing_happened(here, capsys)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"capabilities": 0}, "CAP_SYS_RAWIO, which this process .* lacks: run as root, or"),
        ({"capabilities": ~RAWIO & (1 << 41) - 1}, "CAP_SYS_RAWIO"),
        ({"namespace": "user:[4026532000]"}, "held in a user namespace only"),
    ],
)
def test_without_the_capability_nothing_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: dict[str, object], says: str
) -> None:
    here = prepared(tmp_path, **status)  # type: ignore[arg-type]
    with pytest.raises(UnsafeError, match=says):
        allow_unsafe("eth1", enabled=True, machine=here)
    nothing_happened(here, capsys)


def test_where_no_mark_can_be_left_nothing_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = prepared(tmp_path)
    put(here.run, "a file where the folder should be")
    with pytest.raises(UnsafeError, match=r"must leave a mark, but .* cannot be written"):
        allow_unsafe("eth1", enabled=True, machine=here)
    nothing_happened(here, capsys)


def nothing_happened(here: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert capsys.readouterr() == ("", "")
    assert (here.proc / "sys/kernel/tainted").read_text() == "4096\n"
    assert (here.dev / "kmsg").read_text() == ""
    assert unsafe_uses(here) == []


def test_a_kernel_that_takes_no_taint_and_no_log_stops_nobody_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = prepared(tmp_path, WithoutAdmin)
    (here.dev / "kmsg").unlink()
    use = allow_unsafe("eth1", enabled=True, machine=here)
    assert (use.logged, use.tainted) == (False, False)
    assert "could not be tainted" in capsys.readouterr().err
    assert unsafe_uses(here) == [use]


def test_a_taint_that_is_there_already_counts(tmp_path: Path) -> None:
    here = prepared(tmp_path, WithoutAdmin)
    put(here.proc / "sys/kernel/tainted", "64\n")
    assert allow_unsafe("eth1", enabled=True, machine=here).tainted


def test_the_log_has_one_line_whatever_a_device_is_called(tmp_path: Path) -> None:
    here = prepared(tmp_path)
    use = allow_unsafe("eth1\n<0>kernel panic\x00 " + "x" * 4000, enabled=True, machine=here)
    logged = (here.dev / "kmsg").read_bytes()
    assert logged.count(b"\n") <= 1
    assert len(logged) <= 900
    assert unsafe_uses(here) == [use]


def test_all_of_a_process_are_in_its_mark(tmp_path: Path) -> None:
    here = prepared(tmp_path)
    uses = [allow_unsafe(f"eth{index}", enabled=True, machine=here) for index in range(20)]
    assert unsafe_uses(here) == uses


def test_a_mark_goes_with_its_process_however_it_ends(tmp_path: Path) -> None:
    here = prepared(tmp_path)
    script = (
        "import os, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\n"
        "from tests.bus.test_policy import WithKernel, machine, allow_unsafe\n"
        "os.geteuid = lambda: 0\n"
        "allow_unsafe('eth1', enabled=True, machine=WithKernel(**vars(machine(Path(sys.argv[1])))))\n"
        "print('there', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        assert [(use.pid, use.what) for use in unsafe_uses(here)] == [(child.pid, "eth1")]
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert unsafe_uses(here) == []
    assert list((here.run / "vfio-vmbus").iterdir()) == []


def test_marks_that_are_none_of_ours_hide_no_others(tmp_path: Path) -> None:
    here = prepared(tmp_path)
    use = allow_unsafe("eth1", enabled=True, machine=here)
    folder = here.run / "vfio-vmbus"
    os.mkfifo(folder / "unsafe-1.json")
    (folder / "unsafe-2.json").mkdir()
    (folder / "unsafe-3.json").symlink_to("/dev/zero")
    put(folder / f"unsafe-{os.getpid()}.json.new", "{")
    assert unsafe_uses(here) == [use]


@given(content=st.binary(max_size=300))
def test_a_damaged_mark_never_raises(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    here = prepared(tmp_path_factory.mktemp("machine"))
    allow_unsafe("eth1", enabled=True, machine=here)
    with open(here.run / f"vfio-vmbus/unsafe-{os.getpid()}.json", "r+b") as file:
        file.write(content)
    for use in unsafe_uses(here):
        json.dumps(use.what)


@given(content=st.binary(max_size=200))
def test_a_status_that_makes_no_sense_is_no_capability(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    here = prepared(tmp_path_factory.mktemp("machine"))
    put(here.proc / "self/status", b"Name: x\nCapEff:\tzz" + content)
    with pytest.raises(UnsafeError):
        allow_unsafe("eth1", enabled=True, machine=here)


def test_the_initial_namespace_is_known_by_its_number() -> None:
    """As the kernel fixes it; a machine on which this test runs in a container has another one, and then is told so."""
    here = os.readlink("/proc/self/ns/user")
    whole = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    assert (here == INITIAL) <= whole
