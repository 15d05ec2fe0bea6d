"""Linux's hv_netvsc in guests of our virtual machine, on a host with faults: what it lives through, and what it does not.

The other end of the cable is a TAP of the outer guest's own stack: a namespace would cost the better part of a minute there.
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from guest.vm import Images, Inner, inner

from vfio_vmbus.apps.lab.tap import open_tap
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.faults.plan import FaultPlan
from vfio_vmbus.host.netvsp.vsp import Netvsp

Report = Callable[[Any], None]

OUTSIDE, INSIDE = "10.9.0.1", "10.9.0.2"
BODY = random.Random(1).randbytes(1 << 20)
_COMPLAINTS = "dmesg | grep -i -E 'hv_|netvsc|vmbus|BUG|Oops|WARNING|Call Trace' | cut -c1-160 | tail -n 12 || true"


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class World:
    """A guest whose card is up, and the host and its TAP around it."""

    def __init__(self, host: EmbeddedHost, guest: Inner, card: Netvsp) -> None:
        self.host, self.guest, self.card = host, guest, card

    def hits(self) -> dict[str, int]:
        return {name: count for name, count in self.host.fault_counters(self.card.name).items() if count}

    def ping(self, count: int) -> int:
        """How many of so many echoes from the guest come back to it. Quietly: a line on the serial port costs more than an echo."""
        said = self.guest.shell.run(f"ping -q -c {count} -i 0.02 -W 3 {OUTSIDE} || true", 120)
        found = re.search(r"(\d+) packets received", said)
        return int(found[1]) if found else 0

    def ping_until(self, name: str, seconds: float = 120) -> int:
        """Send echoes until a fault has hit; how many came back."""
        end, received = time.monotonic() + seconds, 0
        while not self.hits().get(name):
            received += self.ping(20)
            assert time.monotonic() < end, f"no {name} among {self.hits()}"
        return received

    def fetch(self) -> str:
        """The digest of what the guest got of a page of 1 MiB."""
        with ThreadingHTTPServer((OUTSIDE, 8000), _Page) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            got = self.guest.shell.run(f"wget -q -O - http://{OUTSIDE}:8000/ | sha256sum", 120).split()[0]
            server.shutdown()
        return got

    def complaints(self) -> list[str]:
        return self.guest.shell.run(_COMPLAINTS).splitlines()


@contextmanager
def world(kernel: str, initrd: str, orders: list[str], seed: int = 0) -> Iterator[World]:
    plan = FaultPlan.parse(orders, seed)
    with open_tap("outside") as tap, EmbeddedHost(poll="interrupt", faults=plan) as host:
        subprocess.run(["ip", "address", "add", f"{OUTSIDE}/24", "dev", "outside"], check=True)
        subprocess.run(["ip", "link", "set", "outside", "up"], check=True)
        host.switch.add_tap(tap.fd)
        card = host.add_nic("nic0")
        with inner(Images.of(kernel, initrd), host, card) as guest:
            guest.configure(card, f"{INSIDE}/24")
            yield World(host, guest, card)


def mild(report: Report, kernel: str, initrd: str) -> None:
    """What a network does as well, and what a driver has to take: TCP gets through, the kernel says what it minds."""
    orders = [
        "drop:packets-to-guest:1%:after=60",
        "duplicate:completions:3%:after=60",
        "delay:completions:3%:3ms:after=60",
        "delay:packets-to-host:2%:3ms:after=60",
        "delay:interrupts:5%:3ms",
        "duplicate:interrupts:5%",
        "delay:messages:20%:3ms",
    ]
    with world(kernel, initrd, orders) as made:
        report(["ping", made.ping(100)])
        assert made.fetch() == hashlib.sha256(BODY).hexdigest()
        report(["hits", made.hits()])
        report(["said", made.complaints()])
        made.guest.shell.run("rmmod hv_netvsc && insmod /modules/hv_netvsc.ko")
        made.guest.configure(made.card, f"{INSIDE}/24")
        report(["again", made.ping(50)])


def lost_completion(report: Report, kernel: str, initrd: str) -> None:
    """The card works on; taking it down waits for ever."""
    with world(kernel, initrd, ["drop:completions:1:after=100:times=1"]) as made:
        made.ping_until("fault_drop_completions")
        report(["ping", made.ping(50)])
        made.guest.shell.run("(rmmod hv_netvsc >/dev/null 2>&1 &)")
        made.guest.shell.run("sleep 3")
        report(["rmmod", made.guest.shell.run("ps -o stat,args | grep '[r]mmod' || echo gone").strip()])


def lost_interrupt(report: Report, kernel: str, initrd: str) -> None:
    with world(kernel, initrd, ["drop:interrupts:1:after=60:times=1"]) as made:
        made.ping_until("fault_drop_interrupts")
        report(["ping", made.ping(50)])
        made.guest.shell.run(f"ping -q -c 3 -W 2 {OUTSIDE} || true")
        report(["after sending", made.ping(20)])


def hostile(report: Report, kernel: str, initrd: str, orders: list[str], seed: int) -> None:
    """The guest's kernel lives. Whether its card does is reported."""
    with world(kernel, initrd, orders, seed) as made:
        report(["ping", [made.ping(50) for _ in range(6)]])
        report(["hits", made.hits()])
        report(["said", made.complaints()])
        assert made.guest.machine.ended is None
