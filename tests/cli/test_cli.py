"""The command line as a user meets it: a process, its output, its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import one_line, run
from vfio_vmbus.apps.lab import probe
from vfio_vmbus.demo.replayed import write_capture

BROADCAST = b"\xff" * 6


COMMANDS = ["", "demo", "list", "serve", "bind", "unbind", "net", "net tap", "net fwd", "net capture", "net replay", "net bench"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options_and_gives_an_example(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert f"Usage: vfio-vmbus {command}".rstrip() in done.stdout
    if command not in ("", "net"):
        assert f"Example: vfio-vmbus {command}" in done.stdout
        assert "--json" in done.stdout


def test_help_needs_neither_numba_nor_numpy() -> None:
    program = (
        "import sys; sys.argv = ['vfio-vmbus', '--help']\n"
        "from vfio_vmbus.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'numba', 'numpy', 'pyroute2'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], "No such command"),
        (["net", "tap"], "Missing argument"),
        (["bind"], "Missing argument"),
        (["bind", "nic0"], "no device nic0: take an instance GUID"),
        (["bind", "ffff:ff:1f.7"], "no PCI device ffff:ff:1f.7"),
        (["unbind", "ffff:ff:1f.7", "--json"], "no PCI device ffff:ff:1f.7"),
        (["net", "fwd", "--mtu", "5"], "--mtu"),
        (["net", "fwd", "--poll", "never"], "busy, adaptive, interrupt"),
        (["net", "fwd", "--device", "pci:0"], "embedded"),
        (["net", "fwd", "--port", "carrier-pigeon"], "generator"),
        (["net", "fwd", "--port", "sink:3"], "no argument"),
        (["net", "fwd", "--port", "replay"], "an argument"),
        (["net", "fwd", "--port", "sink", "--port", "sink"], "twice"),
        (["net", "fwd", "--port", "generator:many"], "number of bytes"),
        (["net", "tap", "a-name-that-is-too-long"], "1 to 15 bytes"),
        (["net", "replay", "/does/not/exist"], "/does/not/exist: No such file"),
        (["net", "capture", "/does/not/exist"], "/does/not/exist: No such file"),
        (["net", "replay", __file__], "not a pcap"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in one_line(done)


def test_no_arguments_show_the_help() -> None:
    done = run()
    assert done.returncode == 2
    assert "Commands:" in done.stderr


def test_a_missing_tun_is_one_line_and_status_2() -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding /dev/net/tun from a process takes a mount namespace of root's")
    program = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None): sys.exit(77)\n"
        "if libc.mount(b'tmpfs', b'/dev/net', b'tmpfs', 0, None): sys.exit(77)\n"
        "sys.argv = ['vfio-vmbus', 'net', 'tap', 'vm0']\n"
        "from vfio_vmbus.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("mount namespaces are forbidden here")
    assert done.returncode == 2
    assert "/dev/net/tun" in one_line(done)


def test_list_for_people_and_for_machines() -> None:
    assert "software IOMMU" in run("list").stdout
    (device, *_) = json.loads(run("list", "--json").stdout)
    assert device["device"] == "embedded:nic0"
    assert device["class"] == "network"


def test_replay_and_capture_carry_a_file_unchanged(tmp_path: Path) -> None:
    source, seen, captured = tmp_path / "in.pcap", tmp_path / "seen.pcap", tmp_path / "captured.pcap"
    write_capture(source, BROADCAST, 500)
    done = run("net", "replay", source, "--port", f"capture:{seen}", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["frames"] == 500
    assert said["counters"]["tx_frames"] == 500
    done = run("net", "capture", captured, "--port", f"replay:{seen}", "--count", 500, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 500
    assert frames(captured) == frames(source)


def frames(path: Path) -> list[bytes]:
    import dpkt

    with open(path, "rb") as file:
        return [data for _, data in dpkt.pcap.UniversalReader(file)]


def test_fwd_sends_back_what_comes() -> None:
    done = run("net", "fwd", "--port", "generator:64", "--seconds", "0.3", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["sent"] > 0
    assert said["sent"] + said["dropped"] == said["received"]
    assert said["ports"]["nic0"]["spoofed"] == 0


def test_bench_says_a_rate_each_way() -> None:
    done = run("net", "bench", "--size", "64", "--seconds", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["results"]
    assert row["size"] == 64
    assert row["tx_mpps"] > 0
    assert row["rx_mpps"] > 0


def check_attacks(said: dict[str, Any]) -> None:
    assert said["attacks"]["tried"] > 10
    assert said["attacks"]["stopped"] == said["attacks"]["tried"]
    assert said["attacks"]["bytes_touched"] == 0


def test_the_demo_without_namespaces() -> None:
    done = run("demo", "--replay", "--json", fresh=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ping"] is None
    assert said["replay"]["sha256_match"]
    assert said["nic"]["isolation"] == "vfio-user server"
    assert said["processes"]["driver"] != said["processes"]["host"]
    check_attacks(said)


def test_the_demo() -> None:
    why = probe()
    if why is not None:
        pytest.skip(f"no namespaces: {why}")
    done = run("demo", "--json", fresh=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ping"]["sent"] == said["ping"]["received"] > 0
    assert said["http"] == {"bytes": 64 << 20, "sha256_match": True}
    assert said["tcp"]["gbit_per_s"] > 0
    assert said["meanwhile"]["sent"] == said["meanwhile"]["received"] > 0
    check_attacks(said)
