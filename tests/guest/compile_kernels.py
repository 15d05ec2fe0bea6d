"""Run as a program, outside of the guest: does what payloads do, so that the kernels they need are compiled into the cache."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from vfio_vmbus.apps.tap import TapBridge
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.vm import synic  # noqa: F401  (its kernels are compiled when it is imported)

PEER = b"\x02\0\0\0\0\1"


@dataclass(frozen=True)
class Pipe:
    """A socket in place of a TAP: a message is a frame."""

    fd: int


def main() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs, EmbeddedHost() as host:
        theirs.settimeout(10)
        card = host.add_nic("nic0")
        host.switch.add_generator(PEER, card.mac, size=64)
        with open_device(host.attach(card)) as device, Netvsc(device) as nic:
            nic.queue.rx_burst(32)
            nic.queue.send([PEER + nic.mac + b"\x88\xb5" + bytes(46)])
            nic.counters()
            nic.queue.channel.outgoing.signal()
            with TapBridge(nic, Pipe(ours.fileno())) as bridge:
                theirs.send(PEER + nic.mac + b"\x88\xb5" + bytes(46))
                theirs.recv(2048)
                end = time.monotonic() + 10
                while bridge.counters().from_tap == 0 and time.monotonic() < end:
                    time.sleep(0.01)


if __name__ == "__main__":
    main()
