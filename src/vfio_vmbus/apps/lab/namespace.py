"""Namespaces of one's own, for the process that calls this: the worker of a lab.

A user namespace in which it is root, a network namespace inside of it, a TAP with an address.
unshare(CLONE_NEWUSER) works only in a process with a single thread (EINVAL otherwise), hence the worker.
"""

import ctypes
import errno
import ipaddress
import os
import signal
from pathlib import Path

from vfio_vmbus.apps.lab.messages import Setup
from vfio_vmbus.apps.lab.reasons import namespace_refused, read_sysctls
from vfio_vmbus.apps.lab.tap import Tap, open_tap
from vfio_vmbus.errors import UnavailableError

CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1  # linux/prctl.h
QUEUE_FRAMES = 2000  # that wait in the TAP for its reader; with the default of 500 one fast TCP stream loses some

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """unshare(2), which os has only from Python 3.12 on. Raises OSError."""
    if _libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def exit_with(parent: int) -> None:
    """Makes this process exit when the process `parent`, which must be its parent, ends.

    The signal comes when the *thread* that started us ends, hence the look whether the process did.
    """

    def hang_up(_signal: int, _frame: object) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGHUP, hang_up)
    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0) != 0 or os.getppid() != parent:
        os._exit(0)


def enter_namespaces() -> None:
    """Moves this process into a new user namespace, as its root, and into a new network namespace.

    Raises UnavailableError where that is forbidden. Rules of the maps: user_namespaces(7).
    """
    uid, gid = os.geteuid(), os.getegid()
    sysctls = read_sysctls()  # now, because a new user namespace has limits of its own
    step = "user namespace"
    try:
        unshare(CLONE_NEWUSER)
        step = "map of user ids"
        Path("/proc/self/setgroups").write_text("deny")  # else an unprivileged process may not write gid_map
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        step = "network namespace"
        unshare(CLONE_NEWNET)
    except OSError as error:
        raise UnavailableError(namespace_refused(step, error.errno or 0, sysctls)) from None


def furnish(setup: Setup) -> Tap:
    """Brings up lo, and makes the TAP with its MAC, MTU and IPv4 address, up. Returns the TAP.

    Raises UnavailableError; a security module may let us into namespaces and then deny the rights in them.
    """
    from pyroute2 import IPRoute, NetlinkError

    interface = ipaddress.IPv4Interface(setup.address)
    tap = open_tap(setup.tap, mac=setup.mac, mtu=setup.mtu)
    _quiet(setup.tap)
    try:
        with IPRoute() as route:
            route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
            index = route.link_lookup(ifname=setup.tap)[0]
            route.link("set", index=index, txqlen=QUEUE_FRAMES)
            route.addr(
                "add",
                index=index,
                address=str(interface.ip),
                prefixlen=interface.network.prefixlen,
                broadcast=str(interface.network.broadcast_address),
            )
            route.link("set", index=index, state="up")
    except NetlinkError as error:
        tap.close()
        number = error.code if error.code > 0 else errno.EIO
        raise UnavailableError(namespace_refused("set-up of the network namespace", number, read_sysctls())) from None
    return tap


def _quiet(name: str) -> None:
    """Keeps IPv6 from sending solicitations and reports; where /proc is read-only they just come."""
    try:
        Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")
    except OSError:
        return
