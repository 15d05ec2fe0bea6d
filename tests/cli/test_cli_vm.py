"""`vfio-vmbus vm` as far as it goes without a guest: its words, and what it says where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.commands import one_line, run
from vfio_vmbus.cli.vm import Card, _panic, parse_nic, parse_size, parse_version
from vfio_vmbus.errors import UsageError

MAC = bytes.fromhex("00155d010203")


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("none", Card(None)),
        ("tap=vm0", Card("tap:vm0")),
        ("tap:vm0", Card("tap:vm0")),
        ("pcap=out.pcap", Card("capture:out.pcap")),
        ("capture:/tmp/a=b", Card("capture:/tmp/a=b")),
        ("none,mac=00:15:5d:01:02:03", Card(None, MAC)),
        ("tap=vm0,mac=00-15-5D-01-02-03", Card("tap:vm0", MAC)),
    ],
)
def test_cards_in_words(text: str, card: Card) -> None:
    assert parse_nic(text) == card


@pytest.mark.parametrize(
    "text", ["", "tap", "tap=", "user", "none=1", "tap=a,", "tap=a,mac", "tap=a,mac=00:15:5d", "none,mtu=9000"]
)
def test_cards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--nic"):
        parse_nic(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512 << 20), ("512M", 512 << 20), ("2g", 2 << 30), ("2GiB", 2 << 30), ("1T", 1 << 40), ("64MB", 64 << 20)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1_0", "1K", "0x10", "\u0661", "9" * 13])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_size(text)


def test_versions_in_words() -> None:
    assert (parse_version("5.3"), parse_version("2.4")) == (5 << 16 | 3, 2 << 16 | 4)
    for text in ("", "6.0", "5", "5.30", "05.3"):
        with pytest.raises(UsageError, match=r"take one of 5\.3, .*2\.4"):
            parse_version(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option"),
        (["--nic", "user"], "take tap=NAME, pcap=FILE or none"),
        (["--nic", "tap=a", "--nic", "tap:a"], "the same port twice"),
        (["--port", "carrier-pigeon"], "take one of tap:NAME"),
        (["--memory", "lots"], "take a number of MiB"),
        (["--max-version", "1.1"], "take one of 5.3"),
        (["--cpus", "0"], "--cpus"),
        (["--timeout", "0"], "--timeout"),
        (["--console", "/does/not/exist"], "--console /does/not/exist: No such file"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], says: str) -> None:
    done = run("vm", *(["--kernel", "/does/not/exist"] if arguments else []), *arguments)
    assert done.returncode == 2
    assert says in one_line(done)


def test_help_gives_an_example() -> None:
    done = run("vm", "--help")
    assert done.returncode == 0
    assert "Example: vfio-vmbus vm --kernel" in done.stdout


def test_without_kvm_it_is_one_line_and_status_2() -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding /dev/kvm from a process takes a mount namespace of root's")
    program = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None): sys.exit(77)\n"
        "if libc.mount(b'tmpfs', b'/dev', b'tmpfs', 0, None): sys.exit(77)\n"
        "os.mkdir('/dev/shm'); os.mknod('/dev/null', 0o20666, os.makedev(1, 3)); os.mknod('/dev/urandom', 0o20666, os.makedev(1, 9))\n"
        "sys.argv = ['vfio-vmbus', 'vm', '--kernel', '/etc/hostname', '--nic', 'none']\n"
        "from vfio_vmbus.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("mount namespaces are forbidden here")
    assert done.returncode == 2
    assert "no /dev/kvm: load kvm_intel or kvm_amd" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it did not say why"),
        ("sysrq triggered crash", "sysrq triggered crash"),
        (
            "[1] up\n[2] Kernel panic - not syncing: no init\n[3] trace",
            "no init\n[1] up\n[2] Kernel panic - not syncing: no init\n[3] trace",
        ),
    ],
)
def test_a_panics_reason_comes_first(text: str, said: str) -> None:
    assert _panic(text) == said
