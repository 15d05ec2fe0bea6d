"""What was bound here, kept in files until it is put back, so that another process can do so."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import UnavailableError
from .machine import Machine, make_state_folder


@dataclass(frozen=True)
class Binding:
    """A device that was bound here: to what, and what it had before (None: nothing). address: its name on its bus."""

    address: str
    driver: str
    driver_before: str | None
    override_before: str | None
    bus: str = "pci"


def state_folder() -> Path:
    """Where the records are: /run/vfio-vmbus for root, XDG_RUNTIME_DIR/vfio-vmbus for others."""
    return Machine().state_folder()


class Record:
    """The record of one device."""

    def __init__(self, name: str, state: Path | None) -> None:
        self.path = (state or state_folder()) / f"bound-{name}.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else binds this device meanwhile. Raises UnavailableError if somebody does, or if the folder cannot be written."""
        try:
            make_state_folder(self.path.parent)
            handle = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UnavailableError(f"another process is binding or unbinding this device ({self.path}): try again") from error
            yield
        finally:
            os.close(handle)

    def read(self) -> Binding | None:
        """None: the device was not bound here. Raises UnavailableError for what is no record."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Binding)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise UnavailableError(f"{self.path} cannot be understood ({error}): remove it, and bind by hand") from error

    def write(self, binding: Binding) -> None:
        """Written beside and renamed, so that it is there as a whole or not at all. Raises UnavailableError."""
        try:
            make_state_folder(self.path.parent)
            beside = self.path.with_suffix(".new")
            beside.write_bytes(msgspec.json.encode(binding))
            beside.replace(self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def remove(self) -> None:
        """The device has again what it had."""
        self.path.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UnavailableError:
        return UnavailableError(f"{self.path} cannot be written ({error.strerror}): run as root, or set XDG_RUNTIME_DIR")
