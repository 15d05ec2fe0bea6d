"""DPDK's own netvsc PMD in a guest of our virtual machine: testpmd drives the card, over uio_hv_generic; one boot, many steps."""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dpkt
from guest.shell import Shell
from guest.vm import MIB, Images, Inner, inner, take

from vfio_vmbus.apps.lab import Lab, Namespace, NamespaceSpec
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.wire.guids import CLASS_NETWORK

Report = Callable[[Any], None]

OUTSIDE, INSIDE = "10.9.0.1", "10.9.0.2"
DRIVERS = "/sys/bus/vmbus/drivers"
STATION = bytes.fromhex("020000000001")
"""The address that frames come from which testpmd sends back."""
SIZES = (60, 61, 127, 128, 511, 512, 513, 1024, 1400, 1514)
"""Bytes of frames; DPDK puts those below 512 together in a section of the send buffer, and sends the others GPA-direct."""
JUMBO = (1515, 4096, 9014)
"""Such as only an MTU of 9000 lets through."""
FRAMES = 500
PINGS = 100
RING = 2 << 20
"""Bytes of each of the rings that uio_hv_generic makes."""
LEAST_PACKET = 64
"""Bytes in a ring of a frame that goes GPA-direct, and of its completion."""
LONG = 1000
"""Bytes of the frames that testpmd makes up."""
PATIENCE = 60.0
HALT_GONE = "RNDIS: message_length 0, need 8..12"
"""DPDK frees the memory of its last message, RNDIS_HALT, once it is posted, and freeing sets it to zero: a host that reads it later finds
that. The channel is closed next, in any case."""
BOOTS = 4
"""At most, see `_emulated_wrongly`."""

_PREPARE = (
    "mkdir /dpdk && mount -t ext4 /dev/pmem0 /dpdk",
    "for place in proc sys dev; do mount --bind /$place /dpdk/$place; done",
    "mkdir /dev/hugepages && mount -t hugetlbfs none /dpdk/dev/hugepages",
    "sysctl -q -w vm.nr_hugepages=64",
)


class Testpmd:
    """testpmd in the guest, at its prompt; one at a time."""

    _EAL = "-v --iova-mode=pa -m 64 --no-pci --no-telemetry --lcores=0@0,1@0"
    _OWN = "-i --rxq=1 --txq=1 --rxd=1024 --txd=1024 --total-num-mbufs=4096 --mbuf-size=9728 --no-mlockall --disable-link-check"

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def start(self) -> str:
        """What it says before its first prompt."""
        command = f"chroot /dpdk /usr/bin/stdbuf -oL /usr/bin/dpdk-testpmd {self._EAL} -- {self._OWN}"
        self._shell.run("cd /tmp && rm -f keys log status && mkfifo keys && >log")
        self._shell.run(f"cd /tmp && (exec 3<>keys; {command} <keys >>log 2>&1; echo $? >status) >/dev/null 2>&1 &")
        return self._prompt()

    def order(self, line: str) -> str:
        """What it says to that."""
        self._type(line)
        return self._prompt()

    def forward(self, mode: str) -> None:
        self.order(f"set fwd {mode}")
        said = self.order("start")
        assert f"{mode} packet forwarding" in said, said

    def stop(self) -> dict[str, int]:
        """It forwards no more; what it counted at its port meanwhile."""
        part = self.order("stop").partition("Forward statistics for port 0")[2].partition("Accumulated")[0]
        return {name: int(number) for name, number in re.findall(r"([RT]X-\w+): (\d+)", part)}

    def quit(self) -> int:
        """Its exit status."""
        self._type("quit")
        return self._end()

    def kill(self) -> int:
        self._shell.run("kill -9 $(pidof dpdk-testpmd)")
        return self._end()

    def _type(self, line: str) -> None:
        self._shell.run(f"cd /tmp && >log && echo '{line}' 1<>keys")  # <>: nobody waits for a reader that is gone

    def _prompt(self) -> str:
        """What it has said since it was last typed to, once it waits for more."""
        self._shell.run("cd /tmp && until [ -s status ] || grep -q 'testpmd> ' log; do usleep 50000; done", PATIENCE)
        if status := self._shell.run("[ ! -s /tmp/status ] || cat /tmp/status"):
            raise RuntimeError(f"testpmd ended with {status}:\n{self._shell.run('tail -n 30 /tmp/log')}")
        return self._shell.run("cat /tmp/log")

    def _end(self) -> int:
        return int(self._shell.run("until [ -s /tmp/status ]; do usleep 50000; done; cat /tmp/status", PATIENCE))


def _swapped(frame: bytes) -> bytes:
    """Back to its sender."""
    return frame[6:12] + frame[:6] + frame[12:]


def _spoiled(frame: bytes) -> bytes:
    """An IPv4 frame with UDP whose checksums are wrong. (testpmd leaves a UDP checksum of 0 alone: it means that there is none.)"""
    return frame[:24] + bytes(2) + frame[26:40] + b"\x12\x34" + frame[42:]


class Card:
    """The steps, in their order."""

    def __init__(self, host: EmbeddedHost, outside: Namespace, guest: Inner, nic: Netvsp) -> None:
        self.host, self.outside, self.guest, self.nic = host, outside, guest, nic
        self.shell, self.connection = guest.shell, guest.hyperv.connection
        self.testpmd = Testpmd(guest.shell)
        self.buffers: list[int] = []

    def bind(self) -> list[int]:
        """The kernel gives the card to user space, and shares two buffers with the host at once; their sizes in MiB."""
        for command in _PREPARE:
            self.shell.run(command)
        self.guest.interface(self.nic)
        self.shell.run(f"echo {CLASS_NETWORK} >{DRIVERS}/uio_hv_generic/new_id")
        self._bind("hv_netvsc", "uio_hv_generic")
        self.buffers = self.connection.gpadl_sizes
        return [size // MIB for size in self.buffers]

    def echo(self) -> dict[str, Any]:
        """testpmd answers pings from the namespace; it and the host count the same."""
        version = re.search(r"DPDK ([0-9.]+)", self.testpmd.start())
        self.testpmd.forward("icmpecho")
        median = self._ping()
        counted, nic = self.testpmd.stop(), self.nic.counters()
        assert counted["RX-packets"] == nic["received_frames"]
        assert nic["sent_frames"] > PINGS
        return {"version": version and version[1], "median ms": median, **counted}

    def swap(self) -> dict[str, int]:
        """Frames of all sizes, mixed, come back as they were, but for their addresses, and in their order."""
        return self._swap([self._frame(number, SIZES) for number in range(FRAMES)])

    def jumbo(self) -> dict[str, int]:
        """The channel is closed, and opened anew for frames of up to 9014 bytes."""
        for line in ("port stop 0", "port config mtu 0 9000", "port start 0"):
            self.testpmd.order(line)
        return self._swap([self._frame(number, (*SIZES, *JUMBO)) for number in range(FRAMES)])

    def checksums(self) -> dict[str, int]:
        """The card computes what testpmd leaves to it: a datagram's IP and UDP checksums."""
        for line in ("port stop 0", "csum set ip hw 0", "csum set udp hw 0", "port start 0"):
            self.testpmd.order(line)
        self.testpmd.order(f"set eth-peer 0 {STATION.hex(':')}")
        self.testpmd.forward("csum")
        datagrams = [self._datagram(number) for number in range(FRAMES // 5)]
        assert self._through([_spoiled(data) for data in datagrams]) == [_swapped(data) for data in datagrams]
        return self.testpmd.stop()

    def send(self) -> dict[str, int]:
        """It sends as fast as it can, until both rings are wrapped."""
        self._send()
        return self.testpmd.stop()

    def quit(self) -> int:
        """It takes its leave: the channel is closed, the kernel's buffers stay shared."""
        status = self.testpmd.quit()
        self._closed()
        return status

    def kill(self) -> int:
        """Started over the same buffers, it is killed while it sends."""
        self.testpmd.start()
        self._send()
        status = self.testpmd.kill()
        self._closed()
        return status

    def after_a_kill(self) -> int:
        """And the next one is none the worse for it."""
        self.testpmd.start()
        self.swap()  # first: no pings of late, after which the namespace might ask for the card's address in between
        self.testpmd.forward("icmpecho")
        self._ping()
        return self.quit()

    def back(self) -> str:
        """The kernel's driver gets the card back; the buffers are given back, and there are its own."""
        self._bind("uio_hv_generic", "hv_netvsc")
        name = self.guest.configure(self.nic, f"{INSIDE}/24")
        self._ping()
        self.shell.run(f"ping -c 5 -i 0.1 {OUTSIDE}")
        return name

    def unharmed(self) -> None:
        """Nothing of all that was an error to the host, but for DPDK's own, or a warning to the guest's kernel."""
        errors, faults = set(map(str, self.connection.errors)) - {HALT_GONE}, self.connection.domain.fault_count
        assert (self.connection.failed, errors, faults) == (False, set(), 0), (errors, faults)
        wrong = {name: count for name, count in self.nic.counters().items() if name.startswith(("bad_", "faults")) and count}
        assert wrong == {}, wrong
        said = self.shell.run("dmesg | grep -E 'WARNING|BUG|Oops|Call Trace|unable to handle|fail' || true")
        assert said == "", said

    def power_off(self) -> str:
        self.shell.send("poweroff -f")
        return self.guest.machine.wait(60).reason

    def _bind(self, old: str, new: str) -> None:
        name = self.nic.offer.instance_guid
        self.shell.run(f"echo {name} >{DRIVERS}/{old}/unbind && echo {name} >{DRIVERS}/{new}/bind")

    def _send(self) -> None:
        """It begins to, and both rings are wrapped."""
        self.testpmd.order(f"set txpkts {LONG}")
        before = self.nic.counter("sent_frames")
        self.testpmd.forward("txonly")
        self._until(lambda: self.nic.counter("sent_frames") - before > RING // LEAST_PACKET)

    def _ping(self) -> float | None:
        """Many, once the first one was answered; the median of their round trips."""
        self._until(lambda: self.outside.ping(INSIDE, count=1, timeout=2).received == 1)
        result = self.outside.ping(INSIDE, count=PINGS, interval=0.005, timeout=20)
        assert result.received == PINGS
        return result.rtt_ms_median

    def _frame(self, number: int, sizes: Sequence[int]) -> bytes:
        return self.nic.mac + STATION + b"\x88\xb5" + random.Random(number).randbytes(sizes[number % len(sizes)] - 14)

    def _datagram(self, number: int) -> bytes:
        """A frame with a UDP datagram, whose checksums are right."""
        datagram = dpkt.udp.UDP(sport=5, dport=6, data=random.Random(number).randbytes(20 + 14 * number))
        datagram.ulen = len(datagram)
        packet = dpkt.ip.IP(src=b"\x0a\x09\0\7", dst=b"\x0a\x09\0\x08", p=dpkt.ip.IP_PROTO_UDP, data=datagram)
        packet.len = len(packet)
        return bytes(dpkt.ethernet.Ethernet(src=STATION, dst=self.nic.mac, data=packet))

    def _swap(self, frames: list[bytes]) -> dict[str, int]:
        """testpmd's counters."""
        self.testpmd.forward("macswap")
        assert self._through(frames) == [_swapped(data) for data in frames]
        return self.testpmd.stop()

    def _through(self, frames: list[bytes]) -> list[bytes]:
        """Give these frames to the switch; what the card sent meanwhile, as many at least."""
        with tempfile.TemporaryDirectory() as folder:
            sent, seen = Path(folder) / "sent.pcap", Path(folder) / "seen.pcap"
            with sent.open("wb") as file:
                writer = dpkt.pcap.Writer(file)
                for data in frames:
                    writer.writepkt_time(data, 0)
            before = self.nic.counter("sent_frames")
            capture = self.host.switch.add_capture(seen)
            replay = self.host.switch.add_replay(sent)
            self._until(lambda: self.nic.counter("sent_frames") - before >= len(frames))
            for port in (replay, capture):
                self.host.switch.remove(port)
            with seen.open("rb") as file:
                return [data for _, data in dpkt.pcap.Reader(file) if data[:12] == STATION + self.nic.mac]

    def _closed(self) -> None:
        """The channel is closed, and the kernel's buffers are shared as before."""
        self._until(lambda: self.connection.open_channels == 0)
        assert self.connection.gpadl_sizes == self.buffers

    def _until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, self.nic.counters()
            time.sleep(0.05)


STEPS = [name for name in vars(Card) if not name.startswith("_")]


def card(report: Report, kernel: str, initrd: str, disk: str) -> None:
    """Report of each step as `vm.take` does, first of the boot."""
    images = Images.of(kernel, initrd, disk)
    for _ in range(BOOTS):
        said, text = _boot(images)
        if not _emulated_wrongly(text):
            break
        print(f"once more, as this was no CPU's doing:\n{text}", flush=True)
    for each in said:
        report(each)


def _boot(images: Images) -> tuple[list[Any], str]:
    """What there is to report of all steps, and the text of the guest's panic."""
    begun = time.monotonic()
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(NamespaceSpec("outside", f"{OUTSIDE}/24")))
        host = stack.enter_context(EmbeddedHost(poll="interrupt"))
        host.switch.add_tap(lab.namespaces[0].tap.fd)
        nic = host.add_nic("nic0")
        guest = stack.enter_context(inner(images, host, nic, memory=640 * MIB))
        said: list[Any] = [["boot", None, "", round(time.monotonic() - begun, 2)]]
        world = Card(host, lab.namespaces[0], guest, nic)
        take(said.append, [(name, getattr(world, name)) for name in STEPS], guest.shell.tail)
        ended = guest.machine.ended
        return said, ended.text if ended else ""


def _emulated_wrongly(panic: str) -> bool:
    """Did an interrupt come a second time while the kernel was just being entered for it, with interrupts off? No CPU does that; QEMU's
    emulation of AMD's virtualization does it now and then to a program that reads the time in a loop, as DPDK does where it waits."""
    return re.search(r"asm_sysvec_\w+\+\S+\n\[[ .0-9]*\] RIP: 0010:error_entry", panic) is not None
