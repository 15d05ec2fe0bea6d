"""Opening a TAP by name, as the command line does, in a network namespace of its own."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from vfio_vmbus.apps.lab import open_tap, probe
from vfio_vmbus.errors import UsageError

PRELUDE = """
import asyncio, os, sys, pathlib
from vfio_vmbus.apps.lab import open_tap
from vfio_vmbus.apps.lab.namespace import enter_namespaces
from vfio_vmbus.errors import UnavailableError
def names():
    return [line.split(":")[0].strip() for line in pathlib.Path("/proc/net/dev").read_text().splitlines()[2:]]
def refused(name, **wanted):
    try:
        open_tap(name, **wanted)
    except UnavailableError as error:
        return str(error)
enter_namespaces()
"""
PERSIST = """
import fcntl
def persistent(name, owner, flags=0x1002):
    with open("/dev/net/tun", "rb+", buffering=0) as tun:
        fcntl.ioctl(tun, 0x400454CA, name.encode().ljust(16, b"\\0") + flags.to_bytes(24, "little"))
        fcntl.ioctl(tun, 0x400454CC, owner)  # TUNSETOWNER
        fcntl.ioctl(tun, 0x400454CB, 1)  # TUNSETPERSIST
"""
WITHOUT_RIGHTS = """
import ctypes
assert ctypes.CDLL(None).prctl(24, 12, 0, 0, 0) == 0  # PR_CAPBSET_DROP, CAP_NET_ADMIN
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def run_python(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def run() -> Callable[..., list[str]]:
    """Runs Python code in a network namespace of its own, and gives the lines that it prints."""
    if (reason := probe()) is not None:
        pytest.skip(f"no namespace to make a TAP in: {reason}")
    return run_python


def test_a_tap_is_created_and_goes_with_its_fd(run: Callable[..., list[str]]) -> None:
    code = """
with open_tap("vmtap0", mac=bytes.fromhex("02aabbccddee"), mtu=9000) as tap:
    print(names(), tap.name, tap.mac.hex(), tap.mtu, tap.fileno() == tap.fd, os.get_blocking(tap.fd))
    print(os.get_inheritable(tap.fd))
print(names(), tap.fd)
tap.close()
"""
    assert run(code) == [
        "['lo', 'vmtap0'] vmtap0 02aabbccddee 9000 True False",
        "False",
        "['lo'] -1",
    ]


def test_mac_and_mtu_are_those_that_the_kernel_has(run: Callable[..., list[str]]) -> None:
    code = """
from pyroute2 import IPRoute
with IPRoute() as route:
    for wanted in ({}, {"mac": bytes.fromhex("02aabbccddee"), "mtu": 1400}):
        with open_tap("vmtap0", **wanted) as tap:
            link = route.get_links(ifname="vmtap0")[0]
            print(tap.mtu, tap.mtu == link.get("mtu"), tap.mac.hex(":") == link.get("address"))
"""
    assert run(code) == ["1500 True True", "1400 True True"]


def test_a_tap_in_an_event_loop(run: Callable[..., list[str]]) -> None:
    code = """
async def main():
    with open_tap("vmtap0", mtu=1400) as tap:
        print(tap.mtu)
asyncio.run(main())
"""
    assert run(code) == ["1400"]


def test_a_persistent_tap_is_opened_and_stays(run: Callable[..., list[str]]) -> None:
    code = """
persistent("vmtap0", 0)
with open_tap("vmtap0", mtu=1400) as tap:
    print(tap.mtu)
    print(refused("vmtap0"))
print(names())
with open_tap("vmtap0") as tap:
    print(tap.mtu)
"""
    assert run(PERSIST + code) == [
        "1400",
        "TAP vmtap0 is in use by another process; close that, or take another name",
        "['lo', 'vmtap0']",
        "1400",
    ]


def test_names_of_other_interfaces(run: Callable[..., list[str]]) -> None:
    code = """
persistent("tun0", 0, 0x1001)
for name in ("lo", "tun0"):
    print(refused(name))
"""
    for line, name in zip(run(PERSIST + code), ("lo", "tun0"), strict=True):
        assert line == f"interface {name} is there, but no single-queue TAP; take another name"


def test_without_rights_only_a_tap_of_ones_own_is_had(run: Callable[..., list[str]]) -> None:
    inner = (
        PRELUDE.replace("enter_namespaces()\n", "")
        + """
print(refused("vmtap1"))
with open_tap("vmtap0") as tap:
    print(tap.mtu)
print(refused("vmtap0", mtu=1400))
print(open_tap("vmtap0", mtu=1500).mtu)
"""
    )
    first, *rest = run(PERSIST + "persistent('vmtap0', 0)" + WITHOUT_RIGHTS, inner)
    assert first == ("TAP vmtap1 cannot be had without CAP_NET_ADMIN; as root, once: ip tuntap add dev vmtap1 mode tap user 0")
    assert rest == ["1500", "TAP vmtap0: another MTU is refused: Operation not permitted", "1500"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "a\0b", "tap%d", "x" * 16, "\N{SNOWMAN}" * 6])
def test_names_that_no_interface_can_have(name: str) -> None:
    with pytest.raises(UsageError, match="1 to 15 bytes"):
        open_tap(name)


@pytest.mark.parametrize(("mac", "mtu"), [(b"", None), (bytes(6), None), (b"\xff" * 6, None), (None, 67), (None, 65522)])
def test_macs_and_mtus_that_no_tap_can_have(mac: bytes | None, mtu: int | None) -> None:
    with pytest.raises(UsageError):
        open_tap("vmtap0", mac=mac, mtu=mtu)
