"""Compiled kernels are kept on disk, apart for each state of the sources, and work where nothing can be kept; steps of kernels."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vfio_vmbus.memory.kernel import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are never compiled, so nothing is kept")

PROGRAM = """
from vfio_vmbus.memory.kernel import kernel

@kernel("i8(i8)")
def double(number):
    return 2 * number

stats = double.stats
print(double(21), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def run(script: Path, cache: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, **options)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_the_second_start_compiles_nothing(script: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = run(script, cache), run(script, cache)
    assert (first.stdout, first.stderr) == ("42 0 1\n", "")
    assert (second.stdout, second.stderr) == ("42 1 0\n", "")
    assert len(list(cache.glob("vfio-vmbus/kernels-*/*.nbc"))) == 1


def test_a_changed_file_is_compiled_anew(script: Path, tmp_path: Path) -> None:
    assert run(script, tmp_path).stdout == "42 0 1\n"
    script.write_text(PROGRAM.replace("2 * number", "number + number + 1"))
    assert run(script, tmp_path).stdout == "43 0 1\n"


def test_old_folders_are_dropped(script: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for number in range(12):
        folder = cache / "vfio-vmbus" / f"kernels-{number}"
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    assert run(script, cache).stdout == "42 0 1\n"
    left = {path.name for path in cache.glob("vfio-vmbus/kernels-*")}
    assert len(left) == 8
    assert {f"kernels-{number}" for number in range(5, 12)} < left


def test_without_a_writable_folder_it_warns_and_works(script: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = run(script, tmp_path / "file")
    assert done.stdout.startswith("42 0 ")
    assert "RuntimeWarning: compiled kernels are not kept" in done.stderr
    assert "set XDG_CACHE_HOME to a writable folder" in done.stderr
    assert "Traceback" not in done.stderr


def without_roots_privilege() -> None:
    """Root may write everywhere, unless it lacks CAP_DAC_OVERRIDE (1)."""
    prctl_bounding_set_drop = 24
    ctypes.CDLL(None).prctl(prctl_bounding_set_drop, 1)


def test_a_folder_that_cannot_be_written_is_read_and_one_that_cannot_be_read_does_no_harm(script: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(script, cache).stdout == "42 0 1\n"
    (folder,) = cache.glob("vfio-vmbus/kernels-*")
    folder.chmod(0o555)
    kept = run(script, cache, preexec_fn=without_roots_privilege)
    assert (kept.stdout, kept.stderr) == ("42 1 0\n", "")
    folder.chmod(0)
    script.write_text(PROGRAM.replace("double", "twice") + PROGRAM.replace("double", "again"))
    anew = run(script, cache, preexec_fn=without_roots_privilege)
    folder.chmod(0o755)
    assert anew.stdout == "42 0 1\n" * 2
    assert anew.stderr.count(f"RuntimeWarning: compiled kernels are not kept ({folder}: Permission denied)") == 1


STEPS = """
from vfio_vmbus.memory.access import inline
from vfio_vmbus.memory.kernel import kernel, step

@inline
def bounded(number, limit):
    return number % limit if limit else number

@step("i8(i8, i8)")
def scaled(number, factor):
    return bounded(number * factor, 1000)

@kernel("i8(i8, i8)")
def twice(number, factor):
    return scaled(number, factor) + scaled(number, 2)

print(twice(300, 5), scaled(300, 5), scaled.__name__)
"""


def test_a_step_is_built_into_kernels_and_compiled_by_itself_once_python_calls_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    called, uncalled = tmp_path / "called" / "program.py", tmp_path / "uncalled" / "program.py"
    for script, program in ((called, STEPS), (uncalled, STEPS.replace("scaled(300, 5), scaled", "scaled"))):
        script.parent.mkdir()
        script.write_text(program)
    first = run(uncalled, cache)
    assert (first.stdout, first.stderr) == ("1100 scaled\n", "")
    assert [path.name.split("-")[0] for path in cache.rglob("*.nbc")] == ["program.twice"]
    for _ in range(2):  # the second time out of the cache
        done = run(called, cache)
        assert (done.stdout, done.stderr) == ("1100 500 scaled\n", "")
    assert sorted(path.name.split("-")[0] for path in cache.rglob("*.nbc")) == [
        "program.scaled",
        "program.twice",
        "program.twice",
    ]
