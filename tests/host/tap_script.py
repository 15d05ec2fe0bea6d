"""Two TAP devices and a switch between them. Run by test_ports_tap in namespaces of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

from pyroute2 import IPRoute
from switch_rig import BROADCAST, eventually, frame, mac

from vfio_vmbus.host.switch.switch import Switch

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
ETH_P_EXPERIMENT = 0x88B5


def tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


def set_link(name: str, state: str) -> None:
    with IPRoute() as routes:
        routes.link("set", index=socket.if_nametoindex(name), state=state)


def station(name: str) -> socket.socket:
    """Frames of the experimental EtherType, as the kernel's end of the TAP sees them."""
    own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_EXPERIMENT))
    own.bind((name, ETH_P_EXPERIMENT))
    own.settimeout(20)
    return own


def main() -> None:
    fds = tap("left"), tap("right")
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    for name in ("left", "right"):
        set_link(name, "up")
    with Switch() as switch, station("left") as left, station("right") as right:
        ports = [switch.add_tap(fd, name) for fd, name in zip(fds, ("left", "right"), strict=True)]
        for number in range(200):
            left.send(frame(mac(1), BROADCAST if number == 0 else mac(2), 60 + number * 7 % 1400, number))
            assert right.recv(9000)[14:18] == number.to_bytes(4, "big")
            right.send(frame(mac(2), mac(1), 60, number))
            assert left.recv(9000)[14:18] == number.to_bytes(4, "big")
        assert [port.counters().errors for port in ports] == [0, 0]
        set_link("right", "down")
        left.send(frame(mac(1), mac(2)))
        eventually(lambda: ports[1].counters().errors > 0, "an error of an interface that is down")
        assert ports[1].last_error == errno.EIO
        set_link("right", "up")
        again = station("right")
        again.settimeout(0.05)

        def comes_through() -> bool:
            left.send(frame(mac(1), mac(2), 60, 7))
            try:
                return again.recv(9000)[14:18] == (7).to_bytes(4, "big")
            except TimeoutError:
                return False

        eventually(comes_through, "a frame after the interface is up again")
        again.send(frame(mac(2), mac(1), 60, 8))
        assert left.recv(9000)[14:18] == (8).to_bytes(4, "big")
        again.close()
    for fd in fds:
        os.close(fd)
    print("held")


if __name__ == "__main__":
    main()
