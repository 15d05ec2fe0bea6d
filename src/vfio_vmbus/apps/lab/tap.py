"""A TAP interface: Ethernet frames of the kernel's network stack through a file descriptor.

One frame a read or write, nothing before it (IFF_NO_PI, no virtio header), no offloads: checksums are
complete and no frame is longer than MTU + 14 bytes (18 with a VLAN tag). Numbers from linux/if_tun.h.
"""

import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vfio_vmbus.apps.lab.reasons import TUN_PATH, tun_refused
from vfio_vmbus.errors import UnavailableError, UsageError

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
SIOCGIFMTU, SIOCSIFMTU = 0x8921, 0x8922  # linux/sockios.h
SIOCSIFHWADDR, SIOCGIFHWADDR = 0x8924, 0x8927
WHAT = {
    SIOCGIFMTU: "a look at its MTU",
    SIOCSIFMTU: "another MTU",
    SIOCSIFHWADDR: "another MAC",
    SIOCGIFHWADDR: "a look at its MAC",
}
ARPHRD_ETHER = 1
IFREQ_FLAGS = struct.Struct("=16sH22x")  # struct ifreq (linux/if.h) of 64-bit machines: a name and 24 bytes
IFREQ_MTU = struct.Struct("=16si20x")
IFREQ_MAC = struct.Struct("=16sH6s16x")
assert IFREQ_FLAGS.size == IFREQ_MTU.size == IFREQ_MAC.size == 40
MTU_LEAST, MTU_MOST = 68, 65521  # IPv4's least; tun's most (65535 less the Ethernet header)


@dataclass
class Tap:
    """An open TAP. Its fd is non-blocking, close-on-exec, and works in any namespace."""

    fd: int
    name: str
    mac: bytes
    mtu: int

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Closes the fd, and with it a TAP that is not persistent. End the threads that use it first."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_tap(name: str, *, mac: bytes | None = None, mtu: int | None = None) -> Tap:
    """Opens the TAP of that name in the current network namespace, or creates it there until it is closed.

    mac (6 bytes) and mtu (bytes) are set if they differ from what the interface has. Creating and setting
    need CAP_NET_ADMIN; a persistent TAP made for this user (`ip tuntap add ... user ...`) needs nothing.

    Raises UnavailableError where machine or rights do not allow it, UsageError for a wrong name, MAC or MTU.
    """
    check_name(name)
    if mac is not None:
        check_mac(mac)
    if mtu is not None:
        check_mtu(mtu)
    try:
        fd = os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(tun_refused(error)) from None
    try:
        _attach(fd, name)
        return Tap(fd, name, *_settle(name, mac, mtu))
    except BaseException:
        os.close(fd)
        raise


def _attach(fd: int, name: str) -> None:
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ_FLAGS.pack(name.encode(), IFF_TAP | IFF_NO_PI))
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0)  # a persistent TAP keeps what its last user set
    except OSError as error:
        raise _attach_refused(name, error) from None


def _attach_refused(name: str, error: OSError) -> UnavailableError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return UnavailableError(
            f"TAP {name} cannot be had without CAP_NET_ADMIN; "
            f"as root, once: ip tuntap add dev {name} mode tap user {os.geteuid()}"
        )
    if error.errno == errno.EBUSY:
        return UnavailableError(f"TAP {name} is in use by another process; close that, or take another name")
    if error.errno == errno.EINVAL:
        return UnavailableError(f"interface {name} is there, but no single-queue TAP; take another name")
    return UnavailableError(f"TAP {name} cannot be opened: {error.strerror}")


def _settle(name: str, mac: bytes | None, mtu: int | None) -> tuple[bytes, int]:
    """Sets what differs; returns the interface's MAC and MTU as they are then.

    By ioctl, see netdevice(7): pyroute2 cannot be called where an event loop runs, and costs 0.2 s to import.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        has_mac = IFREQ_MAC.unpack(_ask(sock, SIOCGIFHWADDR, IFREQ_MAC.pack(name.encode(), 0, b"")))[2]
        has_mtu = IFREQ_MTU.unpack(_ask(sock, SIOCGIFMTU, IFREQ_MTU.pack(name.encode(), 0)))[1]
        if mac is not None and mac != has_mac:
            _ask(sock, SIOCSIFHWADDR, IFREQ_MAC.pack(name.encode(), ARPHRD_ETHER, mac))
            has_mac = mac
        if mtu is not None and mtu != has_mtu:
            _ask(sock, SIOCSIFMTU, IFREQ_MTU.pack(name.encode(), mtu))
            has_mtu = mtu
    return has_mac, has_mtu


def _ask(sock: socket.socket, request: int, ifreq: bytes) -> bytes:
    try:
        return fcntl.ioctl(sock, request, ifreq)
    except OSError as error:
        name = ifreq[:16].rstrip(b"\0").decode()
        raise UnavailableError(f"TAP {name}: {WHAT[request]} is refused: {error.strerror}") from None


def check_name(name: str) -> None:
    """Raises UsageError for what the kernel would not take as the name of an interface."""
    size = len(name.encode())
    if not 1 <= size <= 15 or name in (".", "..") or any(c in "/:%\0" or c.isspace() for c in name):
        raise UsageError(f"interface name {name!r}: 1 to 15 bytes, no space, '/', ':' or '%'; for example tap0")


def check_mac(mac: bytes) -> None:
    """Raises UsageError unless mac is the 6 bytes of a station's address."""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise UsageError(f"MAC {mac.hex(':')!r}: 6 bytes, not a group's, not zero; for example 02:00:00:00:00:01")


def check_mtu(mtu: int) -> None:
    """Raises UsageError for an MTU that a TAP cannot have."""
    if not MTU_LEAST <= mtu <= MTU_MOST:
        raise UsageError(f"MTU {mtu}: {MTU_LEAST} to {MTU_MOST} bytes")
