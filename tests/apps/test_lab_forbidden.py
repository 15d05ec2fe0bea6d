"""Machines that allow no lab, and users without rights: each a process in namespaces made like that."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vfio_vmbus.apps.lab import probe
from vfio_vmbus.apps.lab.reasons import namespace_refused, tun_refused

PRELUDE = """
import ctypes, os, pathlib, sys
from vfio_vmbus.apps.lab.namespace import unshare
NEWNS, NEWUSER, NEWNET = 0x20000, 0x10000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)

def become(uid):
    outer, group = os.geteuid(), os.getegid()
    unshare(NEWUSER)
    files = {"setgroups": "deny", "uid_map": f"{uid} {outer} 1", "gid_map": f"{uid} {group} 1"}
    for name, text in files.items():
        pathlib.Path("/proc/self", name).write_text(text)

def mount(source, target, kind, flags=0):
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None) != 0:
        raise OSError(ctypes.get_errno(), target)
"""
AS_A_USER = (  # a fresh program of uid 1000 has no capability at all
    PRELUDE + "become(1000)\nos.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
)
PROBE = "\nfrom vfio_vmbus.apps.lab import probe\nprint(probe())"
PING = """
from pathlib import Path
from vfio_vmbus.apps.lab import Lab
import os
assert os.geteuid() != 0
assert "CapEff:\\t0000000000000000" in Path("/proc/self/status").read_text()
with Lab.pair() as lab:
    left, right = lab.namespaces
    print(left.ping(left.address, count=3, interval=0).received)
    print(left.ping(right.address, count=1, timeout=0.1).received)
    print(os.read(left.tap.fd, 2000)[12:14].hex())  # the frame that asks who has right's address
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def run() -> Callable[..., str]:
    """Runs Python code in a process of its own, and gives what it prints."""
    if (reason := probe()) is not None:
        pytest.skip(f"no namespaces to forbid things in: {reason}")
    return run_python


def test_a_user_without_any_capability_has_a_lab(run: Callable[..., str]) -> None:
    assert run(AS_A_USER, PING).split() == ["3", "0", "0806"]


@pytest.mark.parametrize("kind", ["user", "net"])
def test_a_limit_of_zero_namespaces(run: Callable[..., str], kind: str) -> None:
    limit = f"max_{kind}_namespaces"
    code = f"become(0)\npathlib.Path('/proc/sys/user/{limit}').write_text('0')"
    what = {"user": "user", "net": "network"}[kind]
    assert run(PRELUDE + code + PROBE) == (
        f"the {what} namespace is refused: the limit user.{limit} (0 here) is reached; as root: sysctl user.{limit}=10000"
    )


def test_a_chroot_where_user_namespaces_are_not_permitted(run: Callable[..., str], tmp_path: Path) -> None:
    code = f"""
become(0)
unshare(NEWNS)
mount("/", {str(tmp_path)!r}, "none", 0x1000 | 0x4000)  # MS_BIND | MS_REC
os.chroot({str(tmp_path)!r})
os.chdir("/")
"""
    assert run(PRELUDE + code + PROBE).startswith(
        "the user namespace is refused: not permitted, as in a chroot or in a container"
    )


def test_a_machine_without_tun(run: Callable[..., str]) -> None:
    code = "become(0)\nunshare(NEWNS)\nmount('none', '/dev/net', 'tmpfs')"
    assert run(PRELUDE + code + PROBE) == (
        "/dev/net/tun does not exist; as root: modprobe tun (for a container: --device /dev/net/tun)"
    )


def test_something_else_in_the_place_of_tun(run: Callable[..., str]) -> None:
    code = """
become(0)
unshare(NEWNS)
mount("none", "/dev/net", "tmpfs")
open("/dev/net/tun", "w").close()
"""
    assert run(PRELUDE + code + PROBE) == "TAP tap0 cannot be opened: Inappropriate ioctl for device"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_tun_that_others_may_not_open(run: Callable[..., str]) -> None:
    code = """
unshare(NEWNS)
mount("none", "/", "none", 0x44000)  # MS_REC | MS_PRIVATE
mount("none", "/dev/net", "tmpfs")
os.mknod("/dev/net/tun", 0o20600, os.makedev(10, 200))
os.setgroups([]); os.setgid(65534)
from vfio_vmbus.apps.lab import probe
os.setuid(65534)
print(probe())
"""
    assert run(PRELUDE + code) == (
        "/dev/net/tun may not be opened by uid 65534 (mode crw-------, owner uid 0); "
        "as root: chmod 0666 /dev/net/tun (for a container: --device /dev/net/tun)"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make device nodes")
def test_a_tun_without_its_driver(run: Callable[..., str]) -> None:
    code = """
unshare(NEWNS)
mount("none", "/", "none", 0x44000)  # MS_REC | MS_PRIVATE
mount("none", "/dev/net", "tmpfs")
os.mknod("/dev/net/tun", 0o20666, os.makedev(10, 254))  # a misc device that nobody registers
"""
    assert run(PRELUDE + code + PROBE) == "/dev/net/tun has no driver behind it; as root: modprobe tun"


def test_system_calls_that_kill(run: Callable[..., str]) -> None:
    """A sandbox that answers unshare(2) with SIGSYS ends the worker, and that is a reason as well."""
    number = {"x86_64": 272, "aarch64": 97}.get(os.uname().machine)
    if number is None:
        pytest.skip(f"the number of unshare(2) on {os.uname().machine} is not known here")
    code = f"""
import resource, struct
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
filter = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0),  # load the number of the system call
    (0x15, 0, 1, {number}),  # unshare?
    (0x06, 0, 0, 0x80000000),  # SECCOMP_RET_KILL_PROCESS
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
))
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(text := ctypes.create_string_buffer(filter)))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
"""
    assert run(PRELUDE + code + PROBE) == (
        "a lab's worker cannot do its work here: namespace probe: its worker ended (status -31): no word"
    )


@pytest.mark.parametrize(
    ("sysctls", "says"),
    [
        ({"kernel.unprivileged_userns_clone": 0}, "kernel.unprivileged_userns_clone=1"),
        (
            {"kernel.unprivileged_userns_clone": 1, "kernel.apparmor_restrict_unprivileged_userns": 1},
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ({"kernel.apparmor_restrict_unprivileged_userns": 0}, "--security-opt seccomp=unconfined"),
        ({}, "--security-opt seccomp=unconfined"),
    ],
)
def test_which_rule_forbids_it_is_told_by_the_sysctls(sysctls: dict[str, int], says: str) -> None:
    """This machine's kernel has neither rule; the words at least can be looked at."""
    for number in (errno.EPERM, errno.EACCES):
        text = namespace_refused("user namespace", number, sysctls)
        assert text.startswith("the user namespace is refused: ")
        assert says in text
        assert "\n" not in text


def test_a_kernel_without_namespaces() -> None:
    assert namespace_refused("network namespace", errno.EINVAL, {}).endswith("(CONFIG_NET_NS)")
    assert namespace_refused("user namespace", errno.EINVAL, {}).endswith("(CONFIG_USER_NS)")


def test_every_other_error_keeps_its_own_words() -> None:
    assert re.search("Cannot allocate memory$", namespace_refused("user namespace", errno.ENOMEM, {}))
    assert tun_refused(OSError(errno.EMFILE, "Too many open files")).endswith(": Too many open files")
