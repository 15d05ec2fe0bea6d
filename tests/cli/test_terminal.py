"""The command line at a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import one_line
from vfio_vmbus.cli.output import print_table


def read_all(fd: int, into: list[bytes]) -> None:
    try:
        while data := os.read(fd, 4096):
            into.append(data)
    except OSError:  # EIO: nobody has the other end any more
        pass


def test_what_is_printed_goes_to_stdout_though_a_spinner_turns_on_the_terminal() -> None:
    terminal, theirs = os.openpty()
    command = [sys.executable, "-m", "vfio_vmbus", "net", "fwd", "--port", "generator", "--seconds", "0.2", "--json"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(terminal, shown))
    reader.start()
    printed, _ = process.communicate(timeout=120)
    reader.join()
    os.close(terminal)
    assert process.returncode == 0
    assert json.loads(printed)["sent"] > 0
    assert b"starting" in b"".join(shown)


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A new process, as a shell would start it."""
    return subprocess.run([sys.executable, "-m", "vfio_vmbus", *arguments], text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["audit", "--json"], ["doctor"]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = command(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "vfio-vmbus: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["list", "list --watch --json --seconds 0.01", "console embedded:balloon --seconds 0.01"])
def test_started_with_streams_closed(words: str, closed: str) -> None:
    line = f'"{sys.executable}" -m vfio_vmbus {words} {closed}'
    done = subprocess.run(["/bin/sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)


def test_watching_ends_when_nobody_reads_any_more() -> None:
    """As with `list --watch | grep -m1 uio0`, on a machine where nothing changes."""
    process = subprocess.Popen([sys.executable, "-m", "vfio_vmbus", "list", "--watch", "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (0, 1)


def test_what_cannot_be_kept_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    done = command("balloon", "--seconds", "0.01", env=environment, capture_output=True)
    assert done.returncode == 0
    assert next(line for line in done.stderr.splitlines() if "compiled kernels are not kept" in line).startswith("vfio-vmbus: ")
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.parametrize("word", ["a" * 100_000, "\x1b[31m", "a\nb", os.fsdecode(b"\xff\xfe")])
def test_whatever_is_typed_is_one_line_that_no_terminal_obeys(word: str) -> None:
    done = command("console", word, capture_output=True)
    assert done.returncode == 2
    assert one_line(done)[:-1].isprintable()
    assert len(done.stderr) < 2000


class Terminal(io.StringIO):
    """It says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "table"), [(40, False), (57, False), (58, True), (200, True)])
def test_on_a_narrow_terminal_names_stay_whole(monkeypatch: pytest.MonkeyPatch, columns: int, table: bool) -> None:
    guid = "ed963694-e847-4b2a-85af-bc9cfc11d6f3"
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    print_table("", ("device", "class", "rings"), [(guid, "network", "-")])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue()).splitlines()  # type: ignore[attr-defined]
    assert [line.split() for line in lines if guid in line] == [[guid, "network", "-"] if table else [guid]]
    assert table or lines == [guid, "  class network"]
    assert max(map(len, lines)) <= columns


def test_what_is_no_terminal_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ("device", "shows"), [("x" * 60, "y" * 300)])
    assert f"{'x' * 60}   {'y' * 300}" in capsys.readouterr().out
