"""Giving a device, by any of its names, to a driver of user space, and back: all checks first, and nobody's login cut off."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import UnavailableError, UsageError
from . import binding, handover, inuse, inventory, persist, vmbus, vmbus_binding
from .machine import Machine
from .names import Target, resolve
from .pci import look
from .persist import Persistence
from .policy import Isolation
from .records import Binding, Record

DRIVERS: Final = {"vmbus": vmbus.UIO_DRIVER, "pci": "vfio-pci"}
"""Who gets a device when nobody is named."""


@dataclass(frozen=True)
class Assigned:
    """A device after it was given to somebody or back: its isolation now and why, the nodes through which user space drives it."""

    target: Target
    binding: Binding
    isolation: Isolation | None
    why: str
    nodes: tuple[str, ...]
    persistence: Persistence | None


def assign(
    text: str,
    driver: str | None = None,
    *,
    force: bool = False,
    lasting: bool = False,
    unsafe: bool = False,
    machine: Machine = Machine(),  # noqa: B008  (frozen)
    state: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Assigned:
    """Give the device called `text` to `driver` (None: as DRIVERS says). lasting: also after a reboot; unsafe: VFIO without an
    IOMMU is meant.

    Refuses what carries the default route or the login, is mounted or open, unless force. Raises UsageError, UnavailableError,
    UnsafeError; then everything is as it was.
    """
    target = resolve(text, machine)
    driver = driver or DRIVERS[target.bus]
    if lasting:
        _check_lasting(target, driver, machine)
    guards = (_guard(text, target, force, machine, environment),)
    if target.bus == "vmbus":
        made = vmbus_binding.bind(target.name, driver, machine=machine, state=state, guards=guards)
    else:
        made = binding.bind(target.name, driver, roots=machine, state=state, guards=guards, unsafe=unsafe)
    try:
        persistence = persist.save(target, driver, machine) if lasting else None
    except UnavailableError:
        _unbind(target, machine, state)
        raise
    return _assigned(target, made, machine, persistence)


def give_back(
    text: str,
    *,
    force: bool = False,
    machine: Machine = Machine(),  # noqa: B008  (frozen)
    state: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Assigned:
    """Put back what the device had before, and forget what was made to last. Raises as `assign`; UsageError for what was not bound here."""
    target = resolve(text, machine)
    known, seat = Record(target.name, state).read(), _seat(target, machine)
    if known is None and not persist.saved(target, machine):
        raise UsageError(
            f"{text} was not bound here (there is no {Record(target.name, state).path}), so what it had before is not known: "
            f"vfio-vmbus bind {target.name} --driver NAME gives it to the driver that you name"
        )
    _guard(text, target, force, machine, environment)(target)
    if known is not None:
        handover.check_back(seat, known)
    else:  # bound before the last reboot
        handover.check_writable(seat, None)
    forgotten = persist.forget(target, machine)
    unbound = _unbind(target, machine, state) if known is not None else handover.give_to_default(seat)
    return _assigned(target, unbound, machine, forgotten)


def _guard(text: str, target: Target, force: bool, machine: Machine, environment: Mapping[str, str]) -> Callable[[object], None]:
    def guard(_: object) -> None:
        found = [] if force else inuse.reasons(target, machine, environment)
        if found:
            raise UnavailableError(f"{text} is in use: {'; '.join(found)} (--force takes it all the same)")

    return guard


def _check_lasting(target: Target, driver: str, machine: Machine) -> None:
    persist.check(target, driver)
    if not _seat(target, machine).can_override:
        raise UnavailableError(f"{target.name} has no driver_override, which --persist needs: this takes Linux 4.18 or later")


def _unbind(target: Target, machine: Machine, state: Path | None) -> Binding:
    if target.bus == "vmbus":
        return vmbus_binding.unbind(target.name, machine=machine, state=state)
    return binding.unbind(target.name, roots=machine, state=state)


def _seat(target: Target, machine: Machine) -> handover.Seat:
    return handover.Seat(target.bus, target.name, machine, target.name)


def _assigned(target: Target, made: Binding, machine: Machine, persistence: Persistence | None) -> Assigned:
    if target.bus == "vmbus":
        item = inventory.of_vmbus(vmbus.look(target.name, machine), machine)
    else:
        item = inventory.of_pci(look(target.name, machine), machine)
    return Assigned(target, made, item.isolation, item.why, item.nodes, persistence)
