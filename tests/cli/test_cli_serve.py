"""`vfio-vmbus serve` as a user meets it, and as a program that starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.cli.commands import Process, started
from tests.vfio.raw_client import RawClient
from vfio_vmbus.vfio.registers import MAGIC


def line(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def rest(process: Process) -> tuple[str, str]:
    return process.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_one_line_when_it_is_ready_and_ends_well_by_a_signal(tmp_path: Path, number: int) -> None:
    with started("serve", "--listen", tmp_path / "a") as process:
        assert line(process) == f"serving embedded:nic0 at {tmp_path}/a\n"
        with RawClient(tmp_path / "a") as client:
            assert client.read(0, 0, 4) == MAGIC
            assert line(process) == f"{tmp_path}/a: process {os.getpid()} of user {os.geteuid()} has the device\n"
            process.send_signal(number)
            assert client.ended()
        assert rest(process)[0] == ""
        assert process.returncode == 0
    assert not (tmp_path / "a").exists()


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    cards = ["embedded:left", "embedded:right"]
    places = ["--socket-path", tmp_path / "a", "--listen", tmp_path / "b"]
    with started("serve", *cards, *places, "--json", fresh=True) as process:
        for name in ("a", "b"):
            assert json.loads(line(process)) == {"event": "listening", "at": str(tmp_path / name)}
        with RawClient(tmp_path / "b"):
            attached = json.loads(line(process))
            assert attached == {"event": "attached", "at": str(tmp_path / "b"), "pid": os.getpid(), "uid": os.geteuid()}
            with RawClient(tmp_path / "b") as second:
                assert second.greeted[0] == 16
            assert "has a client already" in json.loads(line(process))["reason"]
        assert json.loads(line(process)) == {
            **attached,
            "event": "detached",
            "reason": "the client has closed the connection",
            "faults": 0,
        }
        process.terminate()
        assert rest(process) == ("", "")
        assert process.returncode == 0


def test_an_inherited_connection_is_served_until_it_ends() -> None:
    ours, theirs = socket.socketpair()
    with started("serve", "--fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        with RawClient(ours) as client:
            assert client.read(0, 0, 4) == MAGIC
        assert rest(process)[0].startswith("serving embedded:nic0 at descriptor ")
        assert process.returncode == 0


def test_limits_and_mode(tmp_path: Path) -> None:
    options = ["--max-maps", "1", "--max-message", "4096", "--max-fds", "2", "--mode", "0660", "--seconds", "60"]
    with started("serve", "--listen", tmp_path / "a", *options) as process:
        line(process)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o660
        with RawClient(tmp_path / "a") as client:
            told = json.loads(client.greeted[1][4:-1])["capabilities"]
            assert (told["max_dma_maps"], told["max_data_xfer_size"], told["max_msg_fds"]) == (1, 4096, 2)


def test_it_ends_by_itself_after_a_time(tmp_path: Path) -> None:
    with started("serve", "--listen", tmp_path / "a", "--seconds", "0.1") as process:
        assert rest(process)[0].count("\n") == 1
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--listen PATH or --fd N"),
        (["a", "b", "--listen", "x"], "2 devices for 1 sockets"),
        (["pci:0", "--listen", "x"], "embedded:NAME"),
        (["embedded:a", "embedded", "--listen", "x"], "2 devices for 1"),
        (["embedded:a", "embedded:a", "--listen", "x", "--listen", "y"], "same device twice"),
        (["--listen", "/no/such/folder/x"], "No such file"),
        (["--listen", __file__], "not a socket"),
        (["--listen", "x" * 200], "too long"),
        (["--listen", "x", "--mode", "rw"], "octal"),
        (["--listen", "x", "--mode", "7777"], "octal"),
        (["--listen", "x", "--port", "replay:x"], "before a client"),
        (["--listen", "x", "--max-maps", "0"], "--max-maps"),
        (["--fd", "0"], "not a socket"),
        (["--fd", "77"], "not open"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    with started("serve", *arguments, cwd=tmp_path) as process:
        out, said = rest(process)
        assert (process.returncode, out) == (2, "")
        assert said.startswith("vfio-vmbus: ")
        assert says in said
        assert said.count("\n") == 1


def test_a_place_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(tmp_path / "a"))
        other.listen()
        with started("serve", "--listen", tmp_path / "a") as process:
            assert "another server listens there" in rest(process)[1]
            assert process.returncode == 2
