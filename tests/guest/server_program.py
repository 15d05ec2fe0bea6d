"""A server process: an embedded host whose card nic0 is served by vfio-user, and an Edu. Run as a program; see server.py.

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
from vfio_vmbus.testing.edu import Edu, serving_edu
from vfio_vmbus.vfio.user.connection import Client
from vfio_vmbus.vfio.user.server import ServerEvent

MAC = bytes.fromhex("00155d010203")


def main(path: str, edu_path: str, control_fd: str, tap_fd: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    control = socket.socket(fileno=int(control_fd))

    def say(what: dict[str, Any]) -> None:
        control.sendall(json.dumps(what).encode() + b"\n")

    def happened(event: ServerEvent) -> None:
        say({"event": event.kind, "place": event.place, "pid": event.peer.pid if event.peer else 0, "reason": event.reason})

    edus: list[Edu] = []

    def make_edu(client: Client) -> Edu:
        edus.append(Edu(client))
        return edus[-1]

    with serving_edu(edu_path, events=happened, make=make_edu), EmbeddedHost() as host:
        card = host.add_nic("nic0", MAC)
        if int(tap_fd) >= 0:
            host.switch.add_tap(int(tap_fd), "outside")
        with HostServer(host, events=happened) as server:
            server.listen(path, card)
            for _ in control.makefile("rb"):
                say({"status": {**_status(host, card), "edu_faults": sum(edu.faults for edu in edus)}})


def _status(host: EmbeddedHost, card: Netvsp) -> dict[str, Any]:
    """What the card's client has done so far."""
    try:
        connection = host.connection_of(card)
    except UsageError:
        return {"client": False}
    domain = connection.domain
    return {
        "client": True,
        "maps": [(entry.iova, entry.size, entry.access, bool(entry.address)) for entry in domain.maps],
        "faults": [asdict(fault) for fault in domain.faults()],
        "fault_count": domain.fault_count,
        "errors": [str(error) for error in connection.errors],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
