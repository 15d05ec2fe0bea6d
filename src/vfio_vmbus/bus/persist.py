"""Making a binding outlast a reboot by what distributions have for it: driverctl, or a rule for udev.

driverctl 0.111 saves the driver's name in /etc/driverctl.d/BUS-NAME, and its udev rule starts a unit of systemd that loads it. That unit
gets the device's name unescaped, so that the dashes of a GUID have become slashes, and it fails for devices of VMBus: they get a rule.
Source: driverctl 0.111, systemd.unit(5), udev(7).
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
RUN+="/bin/sh -c 'test -e /sys/bus/{bus}/drivers/{driver}/%k && exit; \
test -e /sys%p/driver && echo %k >/sys%p/driver/unbind; echo %k >/sys/bus/{bus}/drivers_probe'"
"""
"""A device that the driver has already is left alone: a process may have it open."""


@dataclass(frozen=True)
class Persistence:
    """How a binding outlasts a reboot: by "driverctl" or "udev", in `file`."""

    by: str
    file: Path


def check(target: Target, driver: str) -> None:
    """Can it be made to last? Raises UnavailableError for names that no rule can have."""
    if not _PLAIN.fullmatch(target.name) or not _PLAIN.fullmatch(driver):
        raise UnavailableError(f"{target.name!r} or {driver!r} has letters that no rule of udev can have: bind without --persist")


def save(target: Target, driver: str, machine: Machine = Machine()) -> Persistence:  # noqa: B008  (frozen)
    """The device has `driver` before and after. Raises UnavailableError."""
    check(target, driver)
    if target.bus == "pci" and shutil.which("driverctl") is not None:
        _driverctl("--bus", target.bus, "set-override", target.name, driver)
        return Persistence("driverctl", _saved(target, machine))
    file = _rule_file(target, machine)
    beside = file.with_suffix(".new")  # udev reads *.rules, at any time
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(_RULE.format(bus=target.bus, name=target.name, driver=driver))
        beside.replace(file)
    except OSError as error:
        raise UnavailableError(f"{file} cannot be written ({error.strerror}): run as root, or bind without --persist") from error
    return Persistence("udev", file)


def saved(target: Target, machine: Machine = Machine()) -> bool:  # noqa: B008  (frozen)
    """Is there anything to `forget`?"""
    return _saved(target, machine).exists() or _rule_file(target, machine).exists()


def forget(target: Target, machine: Machine = Machine()) -> Persistence | None:  # noqa: B008  (frozen)
    """Undo `save`, or driverctl's own; None if there is nothing to undo. Afterwards the device may have no driver. Raises
    UnavailableError."""
    found = None
    rule = _rule_file(target, machine)
    if rule.exists():
        try:
            rule.unlink()
        except OSError as error:
            raise UnavailableError(f"{rule} cannot be removed ({error.strerror}): run as root") from error
        found = Persistence("udev", rule)
    if _saved(target, machine).exists():
        if shutil.which("driverctl") is None:
            raise UnavailableError(f"{_saved(target, machine)} is driverctl's, which is not installed: remove the file")
        _driverctl("--bus", target.bus, "--noprobe", "unset-override", target.name)
        found = Persistence("driverctl", _saved(target, machine))
    return found


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
