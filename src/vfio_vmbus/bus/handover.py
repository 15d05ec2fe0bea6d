"""Taking a device from its driver, giving it to another one, and putting back what was there: for any bus with driver_override.

By driver_override, which concerns one device only. Where the VMBus of an old kernel (before 4.18) has none, the driver is told the
device's class by new_id, and made to forget it right after, as it would claim every device of that class. Source: drivers/base/bus.c,
drivers/hv/vmbus_drv.c, Documentation/ABI/testing/sysfs-bus-pci of Linux 6.12.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnavailableError, UsageError
from ..vfio.kernel.nodes import Roots
from .records import Binding, Record

_NO_OVERRIDE = "\n"
_PATIENCE = 10
"""Seconds."""


@dataclass(frozen=True)
class Seat:
    """A device's place on a bus ("pci", "vmbus"). label: the device for people. class_guid: of a VMBus device."""

    bus: str
    name: str
    roots: Roots
    label: str
    class_guid: str | None = None

    @property
    def folder(self) -> Path:
        """The device's own."""
        return self._bus / "devices" / self.name

    def driver_folder(self, driver: str) -> Path:
        """A driver's."""
        return self._bus / "drivers" / driver

    def driver(self, name: str | None = None) -> str | None:
        """Who has the device, or another one of its bus."""
        try:
            return Path(os.readlink(self._bus / "devices" / (name or self.name) / "driver")).name
        except OSError:
            return None

    def override(self) -> str | None:
        """Its driver_override."""
        try:
            text = (self.folder / "driver_override").read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if text not in ("", "(null)") else None

    @property
    def can_override(self) -> bool:
        """Has the bus driver_override?"""
        return (self.folder / "driver_override").exists()

    @property
    def probe(self) -> Path:
        """Makes the kernel look for a driver."""
        return self._bus / "drivers_probe"

    def others_without_driver(self) -> list[str]:
        """The rest of the bus that nobody drives."""
        try:
            names = sorted(entry.name for entry in (self._bus / "devices").iterdir())
        except OSError:
            return []
        return [name for name in names if name != self.name and self.driver(name) is None]

    @property
    def _bus(self) -> Path:
        return self.roots.sysfs / "bus" / self.bus


def check_driver(seat: Seat, driver: str) -> None:
    """Is it the name of a driver that is loaded? Raises UsageError, UnavailableError."""
    if not driver or "/" in driver or driver in (".", "..") or not driver.isprintable():
        raise UsageError(f"{driver!r} is no name of a driver: take one as vfio-pci")
    if not seat.driver_folder(driver).is_dir():
        raise UnavailableError(
            f"the kernel has no {seat.bus.upper().replace('VMBUS', 'VMBus')} driver {driver} loaded: modprobe {driver}"
        )


def check_writable(seat: Seat, driver: str | None) -> None:
    """May this process write all that `give` writes? Raises UnavailableError, naming the first that it may not."""
    if seat.can_override:
        needed = [seat.folder / "driver_override", seat.probe]
    else:
        needed = [seat.driver_folder(driver) / name for name in ("new_id", "bind")] if driver else []
    if seat.driver() not in (None, driver):
        needed.append(seat.folder / "driver/unbind")
    for path in needed:
        if not os.access(path, os.W_OK):
            what = "is not there" if not path.exists() else f"cannot be written by uid {os.geteuid()}"
            raise UnavailableError(f"{path} {what}: run as root, on a machine (or container) whose /sys is writable")


def check_back(seat: Seat, binding: Binding) -> None:
    """Can the device have again what it had? Raises UnavailableError."""
    before = binding.driver_before
    if before is not None and not seat.driver_folder(before).is_dir():
        raise UnavailableError(f"{seat.name} had driver {before} before, which is not loaded: modprobe {before}")
    check_writable(seat, before)


@contextmanager
def alone(seat: Seat) -> Iterator[None]:
    """Nobody else binds devices of this bus with this program meanwhile. Raises UnavailableError: not root, or somebody does, for 10 s.

    The lock is on a file that root alone can open, so that nobody else can hold it.
    """
    try:
        handle = os.open(seat.probe, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(f"{seat.probe} cannot be written by uid {os.geteuid()} ({error.strerror}): run as root") from error
    try:
        end = time.monotonic() + _PATIENCE
        while not _locked(handle):
            if time.monotonic() > end:
                raise UnavailableError(
                    f"another process is binding devices, since {_PATIENCE} s: see what it waits for, then try again"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hand_over(seat: Seat, driver: str, state: Path | None) -> Binding:
    """Give the device to `driver`, remembering what was there first. Raises UnavailableError, everything being as before then."""
    record = Record(seat.name, state)
    with alone(seat):
        earlier = _still_true(record.read(), seat)
        if seat.driver() == driver and earlier is None:
            return Binding(seat.name, driver, driver, seat.override(), seat.bus)
        made = Binding(
            seat.name,
            driver,
            earlier.driver_before if earlier else seat.driver(),
            earlier.override_before if earlier else seat.override(),
            seat.bus,
        )
        record.write(made)
        try:
            _give(seat, driver, driver)
            now = seat.driver()
            if now != driver:
                raise UnavailableError(
                    f"{driver} does not take {seat.label}: it has {now or 'no driver'} now (see the kernel's log)"
                )
        except UnavailableError as error:
            raise _put_back_after(error, seat, made, record) from error
    return made


def _still_true(earlier: Binding | None, seat: Seat) -> Binding | None:
    """Not of a device that was unplugged before it was given back: who has its place now has no driver_override of ours."""
    if earlier is None or earlier.driver in (seat.driver(), seat.override()) or not seat.can_override:
        return earlier
    return None


def give_back(seat: Seat, state: Path | None) -> Binding:
    """Put back what the device had. Raises UsageError for one that was not bound here, UnavailableError if its driver does not
    take it back."""
    record = Record(seat.name, state)
    with alone(seat):
        binding = record.read()
        if binding is None:
            raise UsageError(f"{seat.name} was not bound here: {record.path} is not there; it has {seat.driver() or 'no driver'}")
        check_back(seat, binding)
        _restore(seat, binding, record)
    now = seat.driver()
    if now != binding.driver_before:
        before = binding.driver_before or "none"
        raise UnavailableError(
            f"{seat.name} had driver {before} before, and has {now or 'none'} now: is it loaded (modprobe {before})?"
        )
    return binding


def give_to_default(seat: Seat) -> Binding:
    """To whichever driver claims it by itself, as nobody remembers what it had. Raises UnavailableError."""
    with alone(seat):
        had = seat.driver()
        if seat.override() is not None:
            seat.roots.write(seat.folder / "driver_override", _NO_OVERRIDE)
            _release(seat, None)
        if seat.driver() is None:
            seat.roots.write(seat.probe, seat.name)
    return Binding(seat.name, had or "none", seat.driver(), None, seat.bus)


def _put_back_after(error: UnavailableError, seat: Seat, made: Binding, record: Record) -> UnavailableError:
    """The error, and what became of putting back."""
    try:
        _restore(seat, made, record)
    except UnavailableError as second:
        return UnavailableError(f"{error}; and it could not be put back: {second}")
    if seat.driver() != made.driver_before:
        return UnavailableError(f"{error}; and its driver {made.driver_before} does not take it back: see the kernel's log")
    return error


def _restore(seat: Seat, binding: Binding, record: Record) -> None:
    """Put back what was there. The earlier driver is named for the probe, as others might claim the device as well."""
    _give(seat, binding.driver_before, binding.driver_before or binding.override_before)
    if seat.can_override:
        seat.roots.write(seat.folder / "driver_override", binding.override_before or _NO_OVERRIDE)
    record.remove()


def _give(seat: Seat, driver: str | None, override: str | None) -> None:
    """Take the device from the driver that it has and give it to `driver`, or to nobody; its driver_override is `override` then.

    A device that is to have no driver is not probed.
    """
    if not seat.can_override:
        _give_by_class(seat, driver)
        return
    seat.roots.write(seat.folder / "driver_override", override or _NO_OVERRIDE)
    _release(seat, driver)
    if driver is not None and seat.driver() is None:
        seat.roots.write(seat.probe, seat.name)


def _release(seat: Seat, driver: str | None) -> None:
    if seat.driver() not in (None, driver):
        seat.roots.write(seat.folder / "driver/unbind", seat.name)


def _give_by_class(seat: Seat, driver: str | None) -> None:
    """Where there is no driver_override: a driver that does not know the device's class is told it, as uio_hv_generic asks for it."""
    _release(seat, driver)
    if driver is None or seat.driver() == driver:
        return
    try:
        seat.roots.write(seat.driver_folder(driver) / "bind", seat.name)
    except UnavailableError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ENODEV or seat.class_guid is None:
            raise
        _teach_and_give(seat, driver, seat.class_guid)


def _teach_and_give(seat: Seat, driver: str, class_guid: str) -> None:
    """new_id probes at once, and takes whatever of that class nobody has: what it took besides is let go again."""
    folder = seat.driver_folder(driver)
    idle = seat.others_without_driver()
    seat.roots.write(folder / "new_id", class_guid)
    try:
        _let_go(seat, driver, idle)
        if seat.driver() is None:
            seat.roots.write(folder / "bind", seat.name)
    finally:
        with suppress(UnavailableError):  # before 4.15 a driver cannot forget
            seat.roots.write(folder / "remove_id", class_guid)
        with suppress(UnavailableError):  # the error that led here says more
            _let_go(seat, driver, idle)


def _let_go(seat: Seat, driver: str, others: list[str]) -> None:
    for name in others:
        if seat.driver(name) == driver:
            seat.roots.write(seat.driver_folder(driver) / "unbind", name)
