"""What was bound here, kept in files until it is put back, so that another process can do so."""

from __future__ import annotations

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
