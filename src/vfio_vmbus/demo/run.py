"""The demonstration's story: traffic first, then the attacks while the first driver's traffic goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..apps.lab import probe
from ..drivers.netvsc.driver import NicInfo
from . import traffic
from .attack import Outcome, attack_all
from .replayed import Replayed, replay_stage, replayed
from .stage import stage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One line of the story: what was measured, and whether it is as it should be."""

    name: str
    value: str
    held: bool


@dataclass(frozen=True)
class Result:
    """Everything that was measured. Of ping, http, tcp and replay, those that did not take place are None."""

    ping: traffic.Ping | None
    http: traffic.Http | None
    gbit_per_s: float | None
    replay: Replayed | None
    meanwhile: traffic.Ping | None
    attacks: list[Outcome]
    nic: NicInfo
    host_pid: int
    seconds: float
    why_replay: str | None

    @property
    def checks(self) -> list[Check]:
        found = [Check("processes", f"driver {os.getpid()}, host {self.host_pid}: the card is served by vfio-user", True)]
        if self.why_replay:
            found.append(Check("namespaces", self.why_replay, True))
        if self.ping:
            median = self.ping.rtt_ms_median
            text = f"{self.ping.received} of {self.ping.sent} echoes, median {'-' if median is None else f'{median:.3f}'} ms"
            found.append(Check("ping", text, self.ping.sent == self.ping.received))
        if self.http:
            same = "SHA-256 as sent" if self.http.sha256_match else "SHA-256 differs"
            found.append(Check("HTTP download", f"{self.http.bytes / (1 << 20):.0f} MiB, {same}", self.http.sha256_match))
        if self.gbit_per_s is not None:
            found.append(Check("TCP, no offload", f"{self.gbit_per_s:.2f} Gbit/s", self.gbit_per_s > 0))
        if self.replay:
            same = "content as sent" if self.replay.sha256_match else "content differs"
            text = f"{self.replay.received} of {self.replay.sent} frames, {same}"
            found.append(Check("replayed capture", text, self.replay.sha256_match))
        if self.meanwhile:
            text = f"{self.meanwhile.received} of {self.meanwhile.sent} echoes"
            found.append(Check("ping during the attacks", text, self.meanwhile.sent == self.meanwhile.received))
        return found

    @property
    def held(self) -> bool:
        """Did everything?"""
        return all(check.held for check in self.checks) and all(item.stopped and not item.bytes_touched for item in self.attacks)

    def as_object(self) -> dict[str, Any]:
        """For --json."""
        return {
            "ping": self.ping and asdict(self.ping),
            "http": self.http and asdict(self.http),
            "tcp": None if self.gbit_per_s is None else {"gbit_per_s": round(self.gbit_per_s, 3)},
            "replay": self.replay and asdict(self.replay),
            "meanwhile": self.meanwhile and asdict(self.meanwhile),
            "attacks": {
                "tried": len(self.attacks),
                "stopped": sum(item.stopped for item in self.attacks),
                "bytes_touched": sum(item.bytes_touched for item in self.attacks),
                "each": [asdict(item) for item in self.attacks],
            },
            "processes": {"driver": os.getpid(), "host": self.host_pid},
            "nic": asdict(self.nic),
            "seconds": round(self.seconds, 2),
            "held": self.held,
        }


def _silent(text: str) -> None:
    """Nobody listens."""


def run(mtu: int, *, replay: bool = False, step: Say = _silent, detail: Say = _silent) -> Result:
    """Tell it all. `step` gets a line for each step, `detail` how far it is. Raises VfioVmbusError when a step cannot be done at all."""
    why = "not wanted" if replay else probe()
    if why is not None:
        step(f"no namespaces ({why}): replaying a capture instead")
        return _without_lab(why, step, detail)
    return _with_lab(mtu, step, detail)


def _with_lab(mtu: int, step: Say, detail: Say) -> Result:
    start = time.monotonic()
    with stage(mtu) as on:
        step("ping through the card")
        pinged = traffic.ping(on.left, on.right)
        step(f"HTTP download of {traffic.DOWNLOAD >> 20} MiB through the card")
        fetched = traffic.download(
            on.left, on.right, traffic.DOWNLOAD, lambda done, total: detail(f"HTTP download: {done >> 20} of {total >> 20} MiB")
        )
        step("TCP through the card")
        rate = traffic.tcp(on.left, on.right, traffic.TCP_SECONDS)
        step("attacks on the host, while a ping goes on")
        with traffic.Meanwhile(on.left, on.right) as meanwhile:
            attacks = attack_all(on.host, on.device, detail)
        on.bridge.check()
        during = traffic.Ping(meanwhile.sent, meanwhile.received, None)
        return Result(pinged, fetched, rate, None, during, attacks, on.nic.info, on.host.pid, time.monotonic() - start, None)


def _without_lab(why: str, step: Say, detail: Say) -> Result:
    start = time.monotonic()
    with replay_stage() as on:
        step("a capture through the card")
        result = replayed(on)
        step("attacks on the host")
        attacks = attack_all(on.host, on.device, detail)
        return Result(None, None, None, result, None, attacks, on.nic.info, on.host.pid, time.monotonic() - start, why)
