"""Linux's hv_netvsc in guests of our virtual machine, on a host with faults: what it lives through, and what it does not.

The other end of the cable is a TAP of this guest's own stack: a namespace would cost the better part of a minute here.
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


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class World:
    """A guest whose card is up, and the host around it."""

    def __init__(self, host: EmbeddedHost, guest: Inner, card: Netvsp) -> None:
        self.host, self.guest, self.card = host, guest, card
        self.shell = guest.shell

    def hits(self) -> dict[str, int]:
        return {name: count for name, count in self.host.fault_counters(self.card.name).items() if count}

    def ping(self, count: int) -> int:
        """How many of so many echoes from the guest come back to it. Quietly: a line on the serial port costs more than an echo."""
        said = self.shell.run(f"ping -q -c {count} -i 0.03 -W 5 {OUTSIDE} || true", 120)
        found = re.search(r"(\d+) packets received", said)
        return int(found[1]) if found else 0

    def ping_until(self, name: str, hits: int = 1, seconds: float = 120) -> None:
        """Send echoes until a fault has hit so many times."""
        end = time.monotonic() + seconds
        while self.hits().get(name, 0) < hits:
            self.ping(20)
            assert time.monotonic() < end, f"{name} has not hit {hits} times: {self.hits()}"

    def fetch(self) -> str:
        """The digest of what the guest got of a page of 1 MiB."""
        with ThreadingHTTPServer((OUTSIDE, 8000), _Page) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            got = self.shell.run(f"wget -q -O - http://{OUTSIDE}:8000/ | sha256sum", 120).split()[0]
            server.shutdown()
        return got

    def warnings(self) -> list[str]:
        """What the guest's kernel says of itself that it should not have to."""
        return self.shell.run("dmesg | grep -E 'BUG|Oops|WARNING|Call Trace|refcount' | cut -c1-160 || true").splitlines()


@contextmanager
def faulty_host(orders: list[str], seed: int = 0) -> Iterator[EmbeddedHost]:
    with open_tap("outside") as tap, EmbeddedHost(poll="interrupt", faults=FaultPlan.parse(orders, seed)) as host:
        subprocess.run(["ip", "address", "add", f"{OUTSIDE}/24", "dev", "outside"], check=True)
        subprocess.run(["ip", "link", "set", "outside", "up"], check=True)
        host.switch.add_tap(tap.fd)
        for name in ("nic0", "nic1"):
            host.add_nic(name)
        yield host


@contextmanager
def world(host: EmbeddedHost, kernel: str, initrd: str, name: str = "nic0") -> Iterator[World]:
    card = host.nics[name]
    with inner(Images.of(kernel, initrd), host, card) as guest:
        guest.configure(card, f"{INSIDE}/24")
        yield World(host, guest, card)


def mild(report: Report, kernel: str, initrd: str) -> dict[str, Any]:
    """What a network does as well, and what a driver has to take: TCP gets through, and the driver comes up once more.

    By then nothing is lost or doubled any more, as Linux waits for ever for an answer of the handshake, and takes one for two.
    """
    orders = [
        "drop:packets-to-guest:5%:after=60:times=3",
        "duplicate:completions:10%:after=60:times=10",
        "delay:completions:3%:3ms:after=60",
        "delay:packets-to-host:2%:3ms:after=60",
        "delay:interrupts:5%:3ms",
        "duplicate:interrupts:5%",
        "delay:messages:20%:3ms",
    ]
    with faulty_host(orders) as host, world(host, kernel, initrd) as made:
        made.ping_until("fault_drop_packets_to_guest", 3)
        made.ping_until("fault_duplicate_completions", 10)
        found: dict[str, Any] = {"ping": made.ping(50)}
        assert made.fetch() == hashlib.sha256(BODY).hexdigest()
        found |= {"hits": made.hits(), "warnings": made.warnings()}
        made.shell.run("rmmod hv_netvsc && insmod /modules/hv_netvsc.ko")
        made.guest.configure(made.card, f"{INSIDE}/24")
        return found | {"again": made.ping(50)}


def lost_completion(report: Report, kernel: str, initrd: str) -> dict[str, Any]:
    """The card works on; taking it down waits for ever."""
    with faulty_host(["drop:completions:1:after=60:times=1"]) as host, world(host, kernel, initrd) as made:
        made.ping_until("fault_drop_completions")
        found = {"ping": made.ping(50)}
        made.shell.run("(rmmod hv_netvsc >/dev/null 2>&1 &)")
        made.shell.run("sleep 3")
        return found | {"rmmod": made.shell.run("ps -o stat,args | grep '[r]mmod' || echo gone").strip()}


def lost_interrupt(report: Report, kernel: str, initrd: str) -> dict[str, int]:
    """VMBus signals from empty to non-empty only, and the ring does not get empty any more."""
    with faulty_host(["drop:interrupts:1:after=60:times=1"]) as host, world(host, kernel, initrd) as made:
        made.ping_until("fault_drop_interrupts")
        return {"ping": made.ping(20)}


def lies(report: Report, kernel: str, initrd: str, orders: list[str], seed: int, hits: int) -> dict[str, Any]:
    """Lies without end until so many were told; what still comes back then, and what the kernel minds."""
    with faulty_host(orders, seed) as host, world(host, kernel, initrd) as made:
        made.ping_until("fault_hostile_lies", hits)
        return {"ping": made.ping(50), "warnings": made.warnings(), "said": int(made.shell.run("dmesg | grep -c hv_netvsc"))}


def next_guest(report: Report, kernel: str, initrd: str, order: str, hits: int) -> dict[str, Any]:
    """A guest is told so many lies, or as many as it lives to hear. The next one has another card, which is not lied to that early."""
    with faulty_host([order]) as host:
        with world(host, kernel, initrd) as made:
            made.shell.send(f"while ping -q -c 20 -i 0.03 -W 1 {OUTSIDE} >/dev/null; do :; done")
            end = time.monotonic() + 60
            while made.guest.machine.ended is None and made.hits().get("fault_hostile_lies", 0) < hits:
                assert time.monotonic() < end, f"neither dead nor told {hits} lies: {made.hits()}"
                time.sleep(0.1)
            fate = _fate(made)
            told = made.hits()["fault_hostile_lies"]
        with world(host, kernel, initrd, "nic1") as made:
            host.attach(host.nics["nic0"]).close()  # it is free
            return {"fate": fate, "told": told, "ping": made.ping(10), "warnings": made.warnings(), "lies": made.hits()}


def _fate(made: World) -> str:
    """Of a guest that was lied to: "lives", "stands still", or how its machine ended."""
    end = time.monotonic() + 5
    said = len(made.shell.said)
    made.guest.machine.feed(b"\n")
    while made.guest.machine.ended is None and time.monotonic() < end:
        if len(made.shell.said) > said:
            return "lives"
        time.sleep(0.1)
    return made.guest.machine.ended.reason if made.guest.machine.ended else "stands still"
