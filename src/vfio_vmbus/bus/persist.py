"""Making a binding outlast a reboot by what distributions have for it: driverctl, which does it, or a rule for udev, which its
user installs.

Source: driverctl 0.111 (it saves the driver's name in /etc/driverctl.d/BUS-NAME, and its udev rule loads it); udev(7).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import UnavailableError
from .machine import Machine
from .names import Target

_PLAIN: Final = re.compile(r"[\w.:-]+", re.ASCII)
_SECONDS: Final = 60
_RULE: Final = """\
# vfio-vmbus: {bus} device {name} is {driver}'s as soon as it appears.
ACTION=="add", SUBSYSTEM=="{bus}", KERNEL=="{name}", ATTR{{driver_override}}="{driver}", RUN{{builtin}}+="kmod load {driver}", \
RUN+="/bin/sh -c 'test -e /sys%p/driver && echo %k >/sys%p/driver/unbind; echo %k >/sys/bus/{bus}/drivers_probe'"
"""


@dataclass(frozen=True)
class Persistence:
    """How a binding outlasts a reboot: by "driverctl", done, or by "udev", when the user puts `rule` into `file`."""

    by: str
    file: Path
    rule: str | None = None


def check(target: Target, driver: str) -> None:
    """Can it be made to last? Raises UnavailableError for names that no rule can have."""
    if not _PLAIN.fullmatch(target.name) or not _PLAIN.fullmatch(driver):
        raise UnavailableError(f"{target.name!r} or {driver!r} has letters that no rule of udev can have: bind without --persist")


def save(target: Target, driver: str, machine: Machine = Machine()) -> Persistence:  # noqa: B008  (frozen)
    """By driverctl if it is installed, else a rule to install. The device has `driver` before and after. Raises UnavailableError."""
    check(target, driver)
    if shutil.which("driverctl") is None:
        rule = _RULE.format(bus=target.bus, name=target.name, driver=driver)
        return Persistence("udev", _rule_file(target, machine), rule)
    _driverctl("--bus", target.bus, "set-override", target.name, driver)
    return Persistence("driverctl", _saved(target, machine))


def forget(target: Target, machine: Machine = Machine(), *, probe: bool) -> Persistence | None:  # noqa: B008  (frozen)
    """Undo `save`; None if there is nothing to undo. probe: is the device to get its default driver? Raises UnavailableError.

    A rule of udev is its user's to remove: it is told by what is returned, and has no `rule` then.
    """
    if _saved(target, machine).exists():
        if shutil.which("driverctl") is None:
            raise UnavailableError(f"{_saved(target, machine)} is driverctl's, which is not installed: remove the file")
        _driverctl("--bus", target.bus, *(() if probe else ("--noprobe",)), "unset-override", target.name)
        return Persistence("driverctl", _saved(target, machine))
    rule = _rule_file(target, machine)
    return Persistence("udev", rule) if rule.exists() else None


def _saved(target: Target, machine: Machine) -> Path:
    return machine.etc / f"driverctl.d/{target.bus}-{target.name}"


def _rule_file(target: Target, machine: Machine) -> Path:
    return machine.etc / f"udev/rules.d/60-vfio-vmbus-{target.name.replace(':', '-')}.rules"


def _driverctl(*arguments: str) -> None:
    try:
        done = subprocess.run(["driverctl", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"driverctl {' '.join(arguments)}: {error}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise UnavailableError(f"driverctl {' '.join(arguments)}: {said}")
