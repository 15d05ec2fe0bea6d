"""A port as Python sees it: a name, counters, and what belongs to it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

from ...dataplane.worker import Worker
from ...errors import UsageError
from ...memory.block import Block
from .state import CAPTURE, GENERATOR, NIC, REPLAY, SINK, TAP

KINDS = {TAP: "tap", GENERATOR: "generator", SINK: "sink", REPLAY: "replay", CAPTURE: "capture", NIC: "nic"}


@dataclass(frozen=True)
class Counters:
    """What passed through a port. "rx" is from the port into the switch, "tx" from the switch to the port."""

    rx_frames: int
    """All that came in from the port, whatever happened to them then."""
    rx_bytes: int
    tx_frames: int
    """All that the port took."""
    tx_bytes: int
    no_room: int
    """Dropped on the way to the port, which could not take them."""
    too_long: int
    """Dropped from or on the way to the port: longer than it may have."""
    too_short: int
    """Dropped from the port: shorter than an Ethernet header."""
    spoofed: int
    """Dropped from the port: sent from an address that is not its own."""
    filtered: int
    """Dropped from the port: its target is there, too, or is one that no switch forwards; or its source is no station's."""
    errors: int
    """System calls that failed."""

    @property
    def dropped(self) -> int:
        """Frames dropped for any reason."""
        return self.no_room + self.too_long + self.too_short + self.spoofed + self.filtered


class Port:
    """One port of a switch; made by the switch's `add_*`.

    name: unique in its switch. kind: "tap", "generator", "sink", "replay", "capture" or "nic". mac: its own address, or None.
    """

    def __init__(
        self,
        name: str,
        index: int,
        record: Any,
        worker: Worker,
        resources: ExitStack,
        *,
        mac: bytes | None = None,
        supply: Block | None = None,
        keep: object = None,
    ) -> None:
        self.name = name
        self.index = index
        self.kind = KINDS[int(record["kind"])]
        self.mac = mac
        self._attached = True
        self._record = record
        self._worker = worker
        self._resources = resources
        self._supply = supply
        self._keep = keep

    def counters(self) -> Counters:
        """The counters now; after the port was removed, those of its end."""
        return Counters(**{field.name: int(self._record[field.name]) for field in fields(Counters)})

    @property
    def done(self) -> bool:
        """Has a generator or replay given its last frame? Other kinds never have."""
        return self._supply is not None and self._supply["left"] == 0

    @property
    def last_error(self) -> int:
        """errno of the last system call that failed, or 0."""
        return int(self._record["last_error"])

    @property
    def enabled(self) -> bool:
        """Does the port take part in the switch? A disabled one neither gives nor gets frames."""
        return bool(self._record["enabled"])

    @enabled.setter
    def enabled(self, value: bool) -> None:
        with self._worker.paused():
            if not self._attached:
                raise UsageError(f"port {self.name} was removed from its switch")
            self._record["enabled"] = int(value)

    def freeze(self) -> None:
        """For the switch, which is about to reuse the record: keep the last counters."""
        self._record = self._record.copy()
        self._record["enabled"] = 0
        self._attached = False

    def release(self) -> None:
        """For the switch, once no kernel knows the port any more: close its descriptors and files, let go of its memory."""
        self._resources.close()
        self._keep = None
