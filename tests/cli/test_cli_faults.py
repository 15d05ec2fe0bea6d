"""Faults as they are ordered on the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vfio_vmbus", *arguments], capture_output=True, text=True, timeout=300)


def test_what_was_done_is_told() -> None:
    orders = ("--fault", "duplicate:completions:0.5:after=20", "--fault-seed", "7")
    done = run("net", "fwd", "--port", "generator", "--seconds", "0.5", *orders, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    (fault,) = told["faults"]
    assert (fault["device"], fault["flow"], fault["fault"]) == ("nic0", "completions", "duplicate:completions:0.5:after=20")
    assert 0 < fault["hits"] < fault["seen"]
    assert 0 < told["counters"]["bad_completions"] <= fault["hits"]
    table = run("net", "fwd", "--port", "generator", "--seconds", "0.1", *orders)
    assert "Faults" in table.stdout
    assert "duplicate:completions:0.5:after=20" in table.stdout


def test_nothing_ordered_nothing_told() -> None:
    done = run("net", "fwd", "--port", "generator", "--seconds", "0.1", "--json")
    assert "faults" not in json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("net", "fwd", "--fault", "drop:frames:1"),
            "--fault drop:frames:1: 'frames' is nothing that drop knows; take messages,",
        ),
        (("net", "capture", "x.pcap", "--fault", "drop:packets:2"), "--fault drop:packets:2: rate '2': take more than 0"),
        (("serve", "--listen", "/nowhere/x", "--fault", "delay:packets:1"), "--fault delay:packets:1: say how long"),
        (
            ("net", "fwd", "--device", "unix:/x", "--hostile"),
            "--fault hostile:all:0.01: the host of unix:/x is not in this process",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vfio-vmbus: {text}")
    assert done.stderr.count("\n") == 1


def test_a_lie_ends_the_command_with_a_line() -> None:
    done = run("net", "fwd", "--port", "generator", "--seconds", "3600", "--fault", "hostile:headers:1:after=30")
    assert done.returncode == 1
    assert done.stderr.startswith("vfio-vmbus: ")
    assert done.stderr.count("\n") == 1
