"""A server process: an embedded host whose card nic0 is served by vfio-user. Run as a program; see server.py.

It says what happens, and answers "status", in lines of JSON on a socket that it inherits.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.vfio.user_server import ServerEvent

MAC = bytes.fromhex("00155d010203")


def main(path: str, control_fd: str, tap_fd: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    control = socket.socket(fileno=int(control_fd))

    def say(what: dict[str, Any]) -> None:
        control.sendall(json.dumps(what).encode() + b"\n")

    def happened(event: ServerEvent) -> None:
        say({"event": event.kind, "pid": event.peer.pid if event.peer else 0, "reason": event.reason})

    with EmbeddedHost() as host:
        card = host.add_nic("nic0", MAC)
        if int(tap_fd) >= 0:
            host.switch.add_tap(int(tap_fd), "outside")
        with HostServer(host, events=happened) as server:
            server.listen(path, card)
            for _ in control.makefile("rb"):
                say({"status": _status(host, card)})


def _status(host: EmbeddedHost, card: Netvsp) -> dict[str, Any]:
    """What the client has done so far; {} without one."""
    try:
        connection = host.connection_of(card)
    except UsageError:
        return {}
    domain = connection.function.domain
    return {
        "maps": [(entry.iova, entry.size, entry.access, bool(entry.address)) for entry in domain.maps],
        "faults": [asdict(fault) for fault in domain.faults()],
        "fault_count": domain.fault_count,
        "errors": [str(error) for error in connection.errors],
        "counters": asdict(card.counters()) if hasattr(card, "counters") else {},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
