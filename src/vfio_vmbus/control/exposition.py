"""Reports in Prometheus' text format, version 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats): for node_exporter's textfile
collector, or anything that runs a command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from ..bus.policy import UnsafeUse
from .client import Found
from .messages import Report

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_COUNTER: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""Names of counters become names of metrics; what another process calls differently is left out."""


@dataclass
class _Family:
    """A metric and its samples: labels and value."""

    name: str
    kind: str
    text: str
    samples: list[tuple[dict[str, str], float]] = field(default_factory=list)


class _Families:
    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, name: str, kind: str, text: str, value: float, /, **labels: str) -> None:
        """One sample of `vfio_vmbus_NAME`; the first one says what it is."""
        full = f"vfio_vmbus_{name}"
        self._families.setdefault(full, _Family(full, kind, text)).samples.append((labels, value))

    def counters(self, prefix: str, text: str, counters: dict[str, int], /, **labels: str) -> None:
        for name, value in counters.items():
            if _COUNTER.fullmatch(name):
                said = f"{text}: {name.replace('_', ' ')}."
                self.add(f"{prefix}_{name}_total", "counter", said, value, **labels)

    def lines(self) -> Iterator[str]:
        for family in self._families.values():
            yield f"# HELP {family.name} {_escaped(family.text, quotes=False)}"
            yield f"# TYPE {family.name} {family.kind}"
            seen = set()
            for labels, value in family.samples:
                shown = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
                if shown not in seen:  # a sample twice makes the whole text invalid
                    seen.add(shown)
                    yield f"{family.name}{{{shown}}} {_number(value)}" if shown else f"{family.name} {_number(value)}"


def exposition(found: Iterable[Found], uses: Iterable[UnsafeUse]) -> str:
    """found: processes that were asked. uses: everything unsafe on this machine (`bus.policy.unsafe_uses`), also of those that were not."""
    families = _Families()
    processes = list(found)
    allowed = list(uses)
    text = "Processes of vfio-vmbus that run here."
    families.add("processes", "gauge", text, len(processes))
    for one in processes:
        families.add("up", "gauge", "Did the process answer?", int(one.report is not None), process=one.name)
        if one.report is not None:
            _process(families, one.report)
    names = {one.pid: one.name for one in processes if one.report is not None}
    text = "Unsafe ways that living processes were allowed: nothing keeps their devices within their memory."
    families.add("unsafe_uses", "gauge", text, len(allowed))
    for use in allowed:
        labels = {"process": names.get(use.pid, ""), "pid": str(use.pid), "what": use.what}
        families.add("unsafe_use_start_time_seconds", "gauge", "Since when, in seconds since 1970.", use.since, **labels)
    return "".join(f"{line}\n" for line in families.lines())


def _process(families: _Families, report: Report) -> None:
    name = report.name
    labels = {"process": name, "kind": report.kind, "pid": str(report.pid), "release": report.release}
    families.add("process_info", "gauge", "A process: its command, number and release.", 1, **labels)
    families.add("process_start_time_seconds", "gauge", "When it began, in seconds since 1970.", report.since, process=name)
    for device in report.devices:
        which = {"process": name, "device": device.name}
        text = "1 for the level that a device has: isolated, no-DMA, unsafe or kernel."
        families.add("isolation", "gauge", text, 1, **which, level=device.isolation.value)
        if device.link is not None:
            families.add("device_link_up", "gauge", "Is the virtual cable plugged in?", int(device.link), **which)
        if device.mtu is not None:
            families.add("device_mtu_bytes", "gauge", "The longest Ethernet payload.", device.mtu, **which)
        families.counters("device", "Of a device", device.counters, **which)
    for client in report.clients:
        which = {"process": name, "client": client.name}
        families.add("client_failed", "gauge", "Is it cut off, until it begins anew?", int(client.failed), **which)
        families.add("client_channels", "gauge", "Channels that it has open.", client.channels, **which)
        families.add("client_gpadls", "gauge", "Pieces of memory that it shares.", client.gpadls, **which)
        families.add("client_gpadl_bytes", "gauge", "Bytes in them.", client.gpadl_bytes, **which)
        families.add("client_maps", "gauge", "Maps of its memory in the IOMMU.", client.maps, **which)
        families.add("client_mapped_bytes", "gauge", "Bytes in them.", client.mapped_bytes, **which)
        text = "Requests for memory that it may not reach, refused by the IOMMU."
        families.add("client_faults_total", "counter", text, client.faults, **which)
        families.add("client_errors_total", "counter", "Its breaches of protocol.", client.errors, **which)
    for port in report.ports:
        which = {"process": name, "port": port.name, "kind": port.kind}
        families.counters("port", "Of a port of the switch, rx being into the switch", port.counters, **which)


def _escaped(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n").encode(errors="replace").decode()
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(value)
