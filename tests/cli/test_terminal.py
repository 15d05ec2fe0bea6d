"""The command line at a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading


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
