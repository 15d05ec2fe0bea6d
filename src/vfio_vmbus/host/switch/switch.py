"""The virtual switch: ports are added and removed while it runs."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...dataplane.worker import SPIN_NS, Worker
from ...errors import ClosedError, UsageError, WaitTimeout
from ...memory.block import Block
from ..frames import BURST, FRAME, mac_value
from .capture_file import MAX_SNAPLEN, CaptureFile
from .fdb import fdb_pin
from .forwarding import switch_run
from .port import KINDS, Port
from .recording import Recording
from .state import (
    AGE_NS,
    BUCKETS,
    CAPTURE,
    ENTRY,
    GENERATOR,
    HEADER,
    MAX_FRAME,
    MAX_PORTS,
    NIC,
    PORT,
    REPLAY,
    SINK,
    STATIC,
    SWITCH,
    TAP,
    WAYS,
)
from .tap import STAGED, STAGING
from .template import Templates
from .traffic import TOUCH


@dataclass(frozen=True)
class FdbEntry:
    """One known address. age: seconds since it was last a source; static ones are always 0."""

    mac: bytes
    port: str
    static: bool
    age: float


class Switch:
    """A learning switch with up to 64 ports and a worker thread of its own, which `start` or a `with` block starts.

    poll, spin_ns: how the worker waits, see `Worker`. age_s: seconds after which an address that was not seen is forgotten.
    `state.address` is what the kernels of `forwarding` get; whoever calls them holds `worker.paused()`.
    """

    def __init__(
        self, name: str = "switch", *, poll: str = "adaptive", spin_ns: int = SPIN_NS, age_s: float = AGE_NS / 1e9
    ) -> None:
        if not 0 < age_s <= 1_000_000:
            raise UsageError(f"switch {name}: addresses aged after {age_s:g} s: take more than 0, up to 1000000 s")
        self.name = name
        self.state = Block(SWITCH)
        self._records = Block(PORT, MAX_PORTS)
        self._entries = Block(ENTRY, BUCKETS * WAYS)
        self._frames = Block(FRAME, BURST)
        self._ports: dict[int, Port] = {}
        self._closed = False
        self.worker = Worker(name, switch_run, self.state.address, poll=poll, spin_ns=spin_ns, keep=self)
        self.state["control"] = self.worker.control.address
        self.state["ports"] = self._records.address
        self.state["fdb"] = self._entries.address
        self.state["frames"] = self._frames.address
        self.state["age_ns"] = int(age_s * 1e9)
        self.state["now"] = time.monotonic_ns()

    @property
    def ports(self) -> list[Port]:
        """The ports, in the order of their numbers."""
        return [port for _, port in sorted(self._ports.items())]

    def start(self) -> None:
        """Start forwarding. Raises UsageError when it was started before."""
        self.worker.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop, remove all ports, give everything back; idempotent.

        Raises what the worker or a capture file failed with, or WaitTimeout when the worker does not end: then it keeps its ports.
        """
        self._closed = True
        with ExitStack() as stack:
            for port in self.ports:
                stack.callback(port.release)
                stack.callback(self._take_out, port)
            try:
                self.worker.stop(timeout)
            except WaitTimeout:
                stack.pop_all()  # it may still be using them
                raise

    def __enter__(self) -> Switch:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add_tap(self, fd: int, name: str | None = None, *, max_frame: int = MAX_FRAME) -> Port:
        """A port over `fd`: a TAP device without packet information, or a datagram socket; duplicated, and made non-blocking.

        max_frame: bytes of the longest frame that passes. Raises UsageError for a length that cannot be.
        """
        if not HEADER <= max_frame <= 65536:
            raise UsageError(f"TAP port: frames of up to {max_frame} bytes: take {HEADER} to 65536")
        slot = (max_frame // 64 + 1) * 64
        memory = Block("u1", slot * (STAGED + 1))
        staging = Block(STAGING)
        staging["memory"] = memory.address
        staging["slot"] = slot
        resources = ExitStack()
        own = self._watched(fd, resources)
        os.set_blocking(own, False)
        return self._add(TAP, name, resources, state=staging.address, keep=(memory, staging), fd=own, max_frame=max_frame)

    def add_generator(
        self,
        source: bytes,
        destination: bytes,
        *,
        size: int = 60,
        count: int | None = None,
        flows: int = 1,
        name: str | None = None,
        enabled: bool = True,
    ) -> Port:
        """A port that sends UDP frames of `size` bytes (without FCS), `count` of them or without end, `flows` UDP flows in turn.

        enabled: False to start it later. Raises UsageError for addresses, sizes and numbers that cannot be.
        """
        unicast(source, "generator's source")
        address_bytes(destination, "generator's destination")
        templates = Templates(source, destination, size, count, flows)
        state = templates.state
        return self._add(
            GENERATOR, name, ExitStack(), state=state.address, keep=templates, supply=state, mac=source, enabled=enabled
        )

    def add_sink(self, name: str | None = None, *, touch: int = 0) -> Port:
        """A port that takes everything and counts it. touch: look at so many bytes of each frame, as a receiver would."""
        state = Block(TOUCH)
        state["bytes"] = touch
        return self._add(SINK, name, ExitStack(), state=state.address, keep=state)

    def add_replay(
        self,
        path: str | Path,
        *,
        pace: float | str | None = None,
        loops: int | None = 1,
        name: str | None = None,
        enabled: bool = True,
    ) -> Port:
        """A port that sends the frames of a pcap or pcapng file, see `Recording`. enabled: False to start it later.

        Raises UsageError for a file that cannot be replayed.
        """
        recording = Recording(path, pace=pace, loops=loops)
        state = recording.state
        return self._add(REPLAY, name, ExitStack(), state=state.address, keep=recording, supply=state, enabled=enabled)

    def add_capture(
        self, path: str | Path, *, snaplen: int = MAX_SNAPLEN, nanoseconds: bool = True, name: str | None = None
    ) -> Port:
        """Write a copy of every frame that the switch forwards to a new pcap file, see `CaptureFile`; complete after `remove`.

        Raises UsageError for a file that cannot be created.
        """
        with ExitStack() as resources:
            file = CaptureFile(path, snaplen=snaplen, nanoseconds=nanoseconds)
            resources.callback(file.close)
            return self._add(CAPTURE, name, resources.pop_all(), state=file.state.address, keep=file)

    def add_nic(
        self,
        nic_address: int,
        doorbell_fd: int,
        mac: bytes,
        name: str | None = None,
        allow_spoofing: bool = False,
        *,
        max_frame: int = MAX_FRAME,
    ) -> Port:
        """A port for a VMBus NIC: `nic_address` is what the kernels of its VSP get, `doorbell_fd` wakes the worker (duplicated).

        mac: its own address, known without learning. allow_spoofing: let it send from others, too.
        Raises UsageError for an address that is no unicast address, or is another NIC's.
        """
        unicast(mac, "NIC's")
        resources = ExitStack()
        self._watched(doorbell_fd, resources)
        bound = 0 if allow_spoofing else mac_value(mac)
        return self._add(NIC, name, resources, state=nic_address, mac=mac, pinned=True, bound=bound, max_frame=max_frame)

    def remove(self, port: Port) -> None:
        """Take a port out; what was learned about it is forgotten. Raises UsageError when it is no port of this switch.

        A capture's file is complete then; UnavailableError if it could not be written.
        """
        with self.worker.paused():
            if self._ports.get(port.index) is not port:
                raise UsageError(f"switch {self.name} has no port {port.name}: it was removed, or is another switch's")
            self._take_out(port)
        port.release()

    def fdb(self, now_ns: int | None = None) -> list[FdbEntry]:
        """The known addresses as of `now_ns` (CLOCK_MONOTONIC), in the order of their numbers."""
        with self.worker.paused():
            used = self._entries.array[self._entries.array["mac"] != 0].copy()
            names = {index: port.name for index, port in self._ports.items()}
        now = time.monotonic_ns() if now_ns is None else now_ns
        found = []
        for mac, index, seen in used.tolist():
            static = seen == STATIC
            age = 0 if static else max(now - seen, 0)
            if age <= self.state["age_ns"]:
                found.append(FdbEntry(int(mac).to_bytes(6, "little"), names[index], static, age / 1e9))
        return sorted(found, key=lambda entry: entry.mac)

    def _watched(self, fd: int, resources: ExitStack) -> int:
        """A duplicate of a descriptor, which wakes the worker until `resources` are closed."""
        with ExitStack() as stack:
            try:
                own = os.dup(fd)
                stack.callback(os.close, own)
                self.worker.watch(own)
            except (OSError, ValueError) as error:
                raise UsageError(f"switch {self.name}: descriptor {fd} cannot be a port's: {error}") from error
            stack.callback(self.worker.unwatch, own)
            resources.push(stack.pop_all())
            return own

    def _add(
        self,
        kind: int,
        name: str | None,
        resources: ExitStack,
        *,
        state: int,
        keep: object = None,
        supply: Block | None = None,
        mac: bytes | None = None,
        pinned: bool = False,
        enabled: bool = True,
        **record: int,
    ) -> Port:
        """Put a port into the first free place. `resources` are the port's, or closed if that fails."""
        with resources, self.worker.paused():
            if self._closed:
                raise ClosedError(f"switch {self.name} is closed")
            index = next((number for number in range(MAX_PORTS) if number not in self._ports), MAX_PORTS)
            if index == MAX_PORTS:
                raise UsageError(f"switch {self.name} has {MAX_PORTS} ports already, the most it can have")
            name = f"{KINDS[kind]}{index}" if name is None else name
            if any(port.name == name for port in self._ports.values()):
                raise UsageError(f"switch {self.name} has a port {name} already")
            if pinned and mac is not None:
                self._pin(mac, index)
            values = {"kind": kind, "state": state, "enabled": int(enabled), "fd": -1, "max_frame": MAX_FRAME} | record
            slot = self._records.array[index]
            for field, value in values.items():
                slot[field] = value
            port = Port(name, index, slot, self.worker, resources.pop_all(), mac=mac, supply=supply, keep=keep)
            self._ports[index] = port
            self._recount()
        return port

    def _pin(self, mac: bytes, index: int) -> None:
        value = mac_value(mac)
        same = (self._entries.array["mac"] == value) & (self._entries.array["seen"] == STATIC)
        if same.any():
            raise UsageError(f"switch {self.name}: {mac.hex(':')} is the address of another NIC")
        if not fdb_pin(self.state.address, value, index):
            raise UsageError(f"switch {self.name}: no room for {mac.hex(':')}: too many NICs with addresses like that")

    def _take_out(self, port: Port) -> None:
        """With the worker parked or ended: nothing in the switch knows the port any more."""
        port.freeze()
        self._entries.array[self._entries.array["port"] == port.index] = 0
        self._records.array[port.index] = 0
        del self._ports[port.index]
        self._recount()

    def _recount(self) -> None:
        kinds = self._records.array["kind"]
        self.state["count"] = max(self._ports, default=-1) + 1
        self.state["captures"] = int((kinds == CAPTURE).sum())
        self.state["paced"] = int((kinds == REPLAY).sum())


def address_bytes(mac: bytes, whose: str) -> bytes:
    """`mac` if it is six bytes, else UsageError."""
    if len(mac) != 6:
        raise UsageError(f"{whose} address {mac.hex(':')}: {len(mac)} bytes, a MAC address has 6")
    return mac


def unicast(mac: bytes, whose: str) -> bytes:
    """`mac` if it is the address of one station, else UsageError."""
    if address_bytes(mac, whose)[0] & 1 or not any(mac):
        raise UsageError(f"{whose} address {mac.hex(':')}: not the address of one station (odd first byte, or all zero)")
    return mac
