"""Linux's hv_netvsc in a guest of our virtual machine: one boot, many steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from guest.vm import Images, Inner, held, inner, take

from vfio_vmbus.apps.lab import Lab, Namespace, NamespaceSpec
from vfio_vmbus.control.hosting import HostSubject
from vfio_vmbus.control.messages import Offer, Rescind
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.wire.vmbus import SUPPORTED_VERSIONS

Report = Callable[[Any], None]

OUTSIDE, INSIDE = "10.9.0.1", "10.9.0.2"
OTHER, SECOND = "10.10.0.1", "10.10.0.2"
HTTP_BYTES = 4 << 20
RELOADS = 10
SMALL_RING = 32
"""Pages of a ring: hv_netvsc's least."""
LEAST_PACKET = 24
"""Bytes in a ring of a packet without payload: a completion."""


class Cards:
    """The steps, in their order. Two cards on one switch, each with a subnet of its own and a namespace in it."""

    def __init__(
        self, host: EmbeddedHost, outside: Namespace, other: Namespace, guest: Inner, first: Netvsp, second: Netvsp
    ) -> None:
        self.host, self.outside, self.other, self.guest, self.first, self.second = host, outside, other, guest, first, second
        self.shell = guest.shell
        self.eth = ""

    def up(self) -> None:
        """Both interfaces get their addresses (again: reloading a driver loses them)."""
        self.eth = self.guest.configure(self.first, f"{INSIDE}/24")
        self.guest.configure(self.second, f"{SECOND}/24")

    def statistic(self, name: str) -> int:
        return int(self.shell.run(f"cat /sys/class/net/{self.eth}/statistics/{name}"))

    def echo(self) -> None:
        """A ping each way, until both sides know each other."""
        self.shell.run(f"ping -c 1 -W 20 {OUTSIDE}")
        assert self.outside.ping(INSIDE, count=1, timeout=20).received == 1

    def found(self) -> list[str]:
        """The guest knows where it is; the version is the newest; both cards are there, with their addresses."""
        self.up()
        assert self.guest.hyperv.connection.version == SUPPORTED_VERSIONS[0]
        self.shell.run("dmesg | grep -q 'Hypervisor detected: Microsoft Hyper-V'")
        return [line.partition("] ")[2] for line in self.shell.run("dmesg | grep 'Vmbus version'").splitlines()]

    def ping(self) -> float:
        self.echo()
        result = self.outside.ping(INSIDE, count=100, interval=0.005, timeout=20)
        assert result.received == 100
        assert "5 packets received" in self.shell.run(f"ping -c 5 -i 0.1 {OUTSIDE}")
        return result.rtt_ms_median

    def http(self) -> list[float]:
        """4 MiB each way through the TCP/IP stacks of guest and namespace; MiB/s."""
        return [self._get(HTTP_BYTES), self._serve(HTTP_BYTES)]

    def _get(self, size: int) -> float:
        body = self.outside.http_serve(size, seed=size)
        begun = time.monotonic()
        got = self.shell.run(f"wget -q -O - {self.outside.http_url(body)} | sha256sum", 120).split()[0]
        assert got == body.sha256
        return round(size / 2**20 / (time.monotonic() - begun), 2)

    def _serve(self, size: int) -> float:
        self.shell.run("pidof httpd || httpd -p 8080 -h /tmp")
        digest = self.shell.run(f"head -c {size} /dev/urandom >/tmp/file && sha256sum /tmp/file").split()[0]
        got = self.outside.http_get(f"http://{INSIDE}:8080/file", timeout=120)
        assert (got.bytes, got.sha256) == (size, digest)
        return round(size / 2**20 / got.seconds, 2)

    def two_cards(self) -> None:
        """Each subnet is reached by its own card."""
        assert self.other.ping(SECOND, count=10, timeout=20).received >= 9
        self.shell.run(f"ping -c 3 {OTHER}")

    def jumbo(self) -> int:
        """MTU 9000: a frame carries it whole, both ways."""
        self.shell.run(f"ip link set {self.eth} mtu 9000")
        self.echo()
        before = self.statistic("tx_packets"), self.statistic("rx_packets")
        assert "10 packets received" in self.shell.run(f"ping -c 10 -i 0.05 -s 8972 {OUTSIDE}")
        after = self.statistic("tx_packets"), self.statistic("rx_packets")
        assert all(10 <= late - early < 20 for early, late in zip(before, after, strict=True))
        self._get(HTTP_BYTES)
        self.shell.run(f"ip link set {self.eth} mtu 1500")
        self.echo()
        return after[0] - before[0]

    def flood(self) -> dict[str, int]:
        """Through rings so small that both are wrapped: many small frames, and nothing is lost of what TCP carries."""
        self.shell.run("rmmod hv_netvsc && insmod /modules/hv_netvsc.ko ring_size=32")
        self.up()
        self.shell.run(f"ip link set {self.eth} mtu 300")
        self.echo()
        self._get(3 << 19)
        self._serve(3 << 19)
        sent, received = self.statistic("tx_packets"), self.statistic("rx_packets")
        assert min(sent, received) * LEAST_PACKET > SMALL_RING * 4096  # of each packet one ring has it, the other its completion
        assert self.outside.ping(INSIDE, count=200, interval=0.001, timeout=20).received == 200
        return {"sent": sent, "received": received}

    def link(self) -> None:
        """The cable is pulled and plugged in again."""
        for up in (False, True):
            self._plug(up)
        self.echo()

    def _plug(self, up: bool) -> None:
        """Once the guest knows it."""
        self.host.set_link(self.first, up)
        self.shell.run(f"until [ $(cat /sys/class/net/{self.eth}/carrier) = {int(up)} ]; do usleep 50000; done")

    def reload_netvsc(self) -> None:
        self._reload("rmmod hv_netvsc && insmod /modules/hv_netvsc.ko")

    def reload_vmbus(self) -> None:
        self._reload("rmmod hv_netvsc && rmmod hv_vmbus && insmod /modules/hv_vmbus.ko && insmod /modules/hv_netvsc.ko")

    def _reload(self, once: str) -> None:
        """Ten times; no time leaves anything behind in the host."""
        self.shell.run(once)
        self.up()
        self.echo()
        before = held()
        self.shell.run(f"for i in $(seq {RELOADS}); do {once} || exit 1; done", 240)
        self.up()
        self.echo()
        assert held() == before
        assert self.guest.hyperv.connection.open_channels == 2

    def versions(self) -> list[int]:
        """Linux asks for an older version, and gets it."""
        got = []
        for version in (0x50002, 0x40000, 0x20004, SUPPORTED_VERSIONS[0]):
            self.shell.run(f"rmmod hv_netvsc && rmmod hv_vmbus && insmod /modules/hv_vmbus.ko max_version={version}")
            self.shell.run("insmod /modules/hv_netvsc.ko")
            self.up()
            self.echo()
            got.append(self.guest.hyperv.connection.version)
        return got

    def rescind(self) -> int:
        """The card goes and comes while it is busy both ways; the other one is busy all the time."""
        orders = HostSubject(self.host)
        with self._load() as pings:
            for _ in range(3):
                orders.carry_out(Rescind(self.first.name))
                self.guest.gone(self.first)
                orders.carry_out(Offer(self.first.name))
                self.eth = self.guest.configure(self.first, f"{INSIDE}/24")
                self.shell.run(f"ping -c 1 -W 20 {OUTSIDE}")
        self.echo()
        self._get(1 << 20)
        assert pings["other"] > 0
        return pings["other"]

    @contextmanager
    def _load(self) -> Iterator[dict[str, int]]:
        over = threading.Event()
        received = {"outside": 0, "other": 0}

        def send(whose: str, namespace: Namespace, to: str) -> None:
            while not over.is_set():
                received[whose] += namespace.ping(to, count=5, interval=0.05, timeout=0.5).received

        threads = [
            threading.Thread(target=send, args=("outside", self.outside, INSIDE)),
            threading.Thread(target=send, args=("other", self.other, SECOND)),
        ]
        self.shell.run(f"(while :; do ping -c 50 -i 0.05 -W 1 {OUTSIDE} || sleep 1; done >/dev/null 2>&1 & echo $! >/tmp/load)")
        for thread in threads:
            thread.start()
        try:
            yield received
        finally:
            over.set()
            for thread in threads:
                thread.join()
            self.shell.run("kill $(cat /tmp/load)")

    def hot_add(self) -> None:
        """A third card, which Linux's driver takes while it runs, and which is pulled out for good."""
        card = self.host.add_nic("hot")
        self.guest.hyperv.offer(card)
        self.eth = self.guest.interface(self.first)
        self.guest.configure(card, "10.9.0.3/24")
        self.shell.run(f"ip link set {self.eth} down")
        assert self.outside.ping("10.9.0.3", count=10, timeout=20).received == 10
        HostSubject(self.host).carry_out(Rescind("hot"))
        self.guest.gone(card)
        self.shell.run(f"ip link set {self.eth} up")
        self.echo()

    def unharmed(self) -> None:
        """Nothing of all that was an error to the host, or a warning to the guest's kernel."""
        connection = self.guest.hyperv.connection
        assert not connection.failed
        assert list(map(str, connection.errors)) == []
        assert connection.domain.fault_count == 0
        said = self.shell.run("dmesg | grep -E 'WARNING|BUG|Oops|Call Trace|unable to|fail' || true")
        assert said == ""

    def power_off(self) -> str:
        self.shell.send("poweroff -f")
        return self.guest.machine.wait(60).reason


STEPS = [name for name in vars(Cards) if not name.startswith("_") and name not in ("up", "statistic", "echo")]


def cards(report: Report, kernel: str, initrd: str, only: list[str] | None = None) -> None:
    """Report of each step as `vm.take` does, first of the boot."""
    begun = time.monotonic()
    specs = NamespaceSpec("outside", f"{OUTSIDE}/24", mtu=9000), NamespaceSpec("other", f"{OTHER}/24")
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(*specs))
        host = stack.enter_context(EmbeddedHost(poll="interrupt"))
        for namespace in lab.namespaces:
            host.switch.add_tap(namespace.tap.fd)
        nics = [host.add_nic(f"nic{number}") for number in range(2)]
        made = time.monotonic()
        guest = stack.enter_context(inner(Images.of(kernel, initrd), host, *nics))
        report(["boot", round(time.monotonic() - made, 2), "", round(time.monotonic() - begun, 2)])
        world = Cards(host, *lab.namespaces, guest, *nics)
        take(report, [(name, getattr(world, name)) for name in only or STEPS], guest.shell.tail)


def two_guests(report: Report, kernel: str, initrd: str) -> dict[str, Any]:
    images = Images.of(kernel, initrd)
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(NamespaceSpec("outside", f"{OUTSIDE}/24")))
        host = stack.enter_context(EmbeddedHost(poll="interrupt"))
        outside = lab.namespaces[0]
        host.switch.add_tap(outside.tap.fd)
        nics = [host.add_nic(f"nic{number}") for number in range(2)]
        guests = [
            stack.enter_context(inner(images, host, nics[0], name="two processors", cpus=2)),
            stack.enter_context(inner(images, host, nics[1], name="old", max_version=0x20004)),
        ]
        addresses = [INSIDE, "10.9.0.3"]
        for guest, nic, address in zip(guests, nics, addresses, strict=True):
            guest.configure(nic, f"{address}/24")
        return {
            "versions": [guest.hyperv.connection.version for guest in guests],
            "processors": [guest.shell.run("nproc") for guest in guests],
            "received": [outside.ping(address, timeout=20).received for address in addresses],
            "each other": [
                "3 packets received" in guest.shell.run(f"ping -c 3 -W 20 {other}")
                for guest, other in zip(guests, reversed(addresses), strict=True)
            ],
        }
