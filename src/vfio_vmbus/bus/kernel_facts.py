"""What the kernel says of itself that bears on isolation: its taint and since when, parameters of modules, its command line.

Source: Documentation/admin-guide/tainted-kernels.rst, Documentation/admin-guide/kernel-parameters.txt,
Documentation/ABI/testing/dev-kmsg of Linux 6.12.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..vfio.kernel.nodes import NOIOMMU_SWITCH
from .machine import Machine, number
from .policy import TAINT_USER

TAINTS: Final = (
    ("P", "proprietary module"),
    ("F", "module loaded by force"),
    ("S", "processor or system out of specification"),
    ("R", "module unloaded by force"),
    ("M", "machine check"),
    ("B", "bad page"),
    ("U", "user space asked for it"),
    ("D", "oops or bug"),
    ("A", "ACPI table overridden"),
    ("W", "warning"),
    ("C", "staging driver"),
    ("I", "workaround for firmware"),
    ("O", "module from outside of the kernel's tree"),
    ("E", "unsigned module"),
    ("L", "soft lockup"),
    ("K", "live patch"),
    ("X", "distribution's own"),
    ("T", "randomised structures"),
    ("N", "in-kernel test"),
    ("J", "firmware changed by fwctl"),
)
"""Letter and meaning of each bit of /proc/sys/kernel/tainted."""
_LOG_BYTES: Final = 8 << 20
_RECORD: Final = 8192
_TAINTING: Final = re.compile(r"kernel taint for vfio-noiommu|vfio-vmbus: .*unsafe", re.IGNORECASE)


@dataclass(frozen=True)
class Taint:
    """The kernel's taint: letters and what they mean; since (seconds since 1970) and how the log says that user space came by
    it, if it says so."""

    value: int
    bits: tuple[str, ...]
    user: bool
    since: float | None
    said: str | None


@dataclass(frozen=True)
class Weakness:
    """A setting that takes isolation away (unsafe), or some of it: where, its value, what it does, what to do."""

    where: str
    value: str
    unsafe: bool
    why: str
    advice: str


@dataclass(frozen=True)
class LogLine:
    """A record of the kernel's log: seconds since boot, text."""

    seconds: float
    text: str


_PARAMETERS: Final = (
    ("vfio", NOIOMMU_SWITCH, "VFIO gives out devices that no IOMMU keeps in bounds"),
    ("vfio_iommu_type1", "allow_unsafe_interrupts", "a device may send any interrupt to any processor"),
    ("iommufd", "allow_unsafe_interrupts", "a device may send any interrupt to any processor"),
)
_OFF: Final = "without an IOMMU every device reaches all memory"
_PASSED: Final = "devices of the kernel's reach all memory; those of VFIO do not"
_COMMAND_LINE: Final = {
    ("iommu", "off"): (False, _OFF),
    ("intel_iommu", "off"): (False, _OFF),
    ("amd_iommu", "off"): (False, _OFF),
    ("iommu", "pt"): (False, _PASSED),
    ("iommu.passthrough", "1"): (False, _PASSED),
    ("iommu.strict", "0"): (False, "a device reaches memory for some time after it was unmapped"),
    ("intel_iommu", "strict_off"): (False, "a device reaches memory for some time after it was unmapped"),
    ("intremap", "off"): (True, "a device may send any interrupt to any processor"),
    ("pcie_acs_override", ""): (True, "devices that can reach each other are shown as apart"),
}
"""Words of the kernel's command line: is it unsafe by itself, and why. A value of "" is any."""


def taint(machine: Machine) -> Taint:
    """As it is now."""
    value = machine.number(machine.proc / "sys/kernel/tainted") or 0
    value = value if 0 <= value < 1 << 64 else 0
    names = [TAINTS[bit] if bit < len(TAINTS) else ("?", f"bit {bit}") for bit in range(64) if value >> bit & 1]
    user = bool(value >> TAINT_USER & 1)
    line = next((line for line in log(machine) or () if _TAINTING.search(line.text)), None) if user else None
    boot = _boot(machine)
    since = None if line is None or boot is None else boot + line.seconds
    return Taint(value, tuple(f"{letter} ({meaning})" for letter, meaning in names), user, since, line.text if line else None)


def weaknesses(machine: Machine) -> list[Weakness]:
    """All settings that take isolation away: of modules that are loaded, of modules to come, of the kernel's command line."""
    return [*_loaded(machine), *_configured(machine), *_on_the_command_line(machine)]


def _loaded(machine: Machine) -> Iterator[Weakness]:
    for module, parameter, why in _PARAMETERS:
        path = machine.sysfs / "module" / module / "parameters" / parameter
        value = machine.find(path).text
        if value in ("Y", "1"):
            yield Weakness(
                str(path), value, True, why, f"echo N > {path}, and take it out of /etc/modprobe.d and the command line"
            )


def _configured(machine: Machine) -> Iterator[Weakness]:
    """In all folders of modprobe.d(5): the user's, of this run, the distribution's."""
    for folder in (machine.etc / "modprobe.d", machine.run / "modprobe.d", machine.modules.parent / "modprobe.d"):
        for path in (folder / name for name in machine.names(folder) if name.endswith(".conf")):
            for line in machine.text(path).splitlines():
                options, module, *words = [*line.split(), "", ""]
                for word in words if options == "options" else ():
                    why = _parameter(f"{module}.{word}")
                    if why:
                        yield Weakness(
                            str(path), f"{module} {word}", True, f"whenever {module} is loaded, {why}", "take the line out"
                        )


def _parameter(word: str) -> str | None:
    """What a module's parameter, as MODULE.PARAMETER=VALUE, takes away; None: nothing. Dashes are as good as underscores, a switch without
    a value is on, and the kernel looks at a value's first letter (lib/kstrtox.c)."""
    name, given, value = word.partition("=")
    on = not given or value[:1].lower() in ("y", "t", "1") or value[:2].lower() == "on"
    whys = {f"{module}.{parameter}": why for module, parameter, why in _PARAMETERS}
    return whys.get(name.replace("-", "_")) if on else None


def _on_the_command_line(machine: Machine) -> Iterator[Weakness]:
    where = str(machine.proc / "cmdline")
    for word in machine.text(machine.proc / "cmdline", 1 << 16).split():
        name, _, value = word.partition("=")
        found = [_COMMAND_LINE.get((name, part)) or _COMMAND_LINE.get((name, "")) for part in value.split(",")]
        parameter = _parameter(word)
        for unsafe, why in filter(None, [*found, (True, parameter) if parameter else None]):
            shown = "".join(letter if letter.isprintable() else "?" for letter in word)[:100]
            yield Weakness(where, shown, unsafe, why, "take it out of the boot loader's configuration, and start again")


def log(machine: Machine) -> list[LogLine] | None:
    """The kernel's log, the oldest first; None if this process may not read it (CAP_SYSLOG)."""
    try:
        handle = os.open(machine.dev / "kmsg", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if not (stat.S_ISCHR(os.fstat(handle).st_mode) or stat.S_ISREG(os.fstat(handle).st_mode)):
            return None
        return [line for line in map(_parsed, _records(handle)) if line is not None]
    except PermissionError:
        return None
    finally:
        os.close(handle)


def _records(handle: int) -> Iterator[str]:
    """One read gives one record, EPIPE one that was overwritten meanwhile, EAGAIN the end."""
    left = _LOG_BYTES
    while left > 0:
        try:
            content = os.read(handle, _RECORD)
        except BrokenPipeError:
            continue
        except PermissionError:
            raise
        except OSError:
            return
        if not content:
            return
        left -= len(content)
        yield from content.decode(errors="replace").splitlines()


def _parsed(line: str) -> LogLine | None:
    """ "4,1234,5678901,-;text": priority, number, microseconds since boot, flags."""
    head, found, text = line.partition(";")
    fields = head.split(",")
    microseconds = number(fields[2]) if found and len(fields) >= 4 else None
    if microseconds is None:
        return None
    return LogLine(microseconds / 1e6, "".join(letter if letter.isprintable() else "?" for letter in text))


def _boot(machine: Machine) -> float | None:
    with suppress(IndexError):
        for line in machine.text(machine.proc / "stat").splitlines():
            if line.startswith("btime "):
                value = number(line.split()[1])
                return None if value is None else float(value)
    return None


def release(machine: Machine) -> tuple[str, tuple[int, int]]:
    """The kernel's release, and (major, minor) of it; (0, 0) if it does not say."""
    text = machine.find(machine.proc / "sys/kernel/osrelease").text or "unknown"
    found = re.match(r"(\d{1,4})\.(\d{1,4})", text)
    return text, (int(found[1]), int(found[2])) if found else (0, 0)


def module_state(machine: Machine, name: str) -> str:
    """ "loaded", "built in", "on disk" (modprobe finds it), or "missing"."""
    if (machine.sysfs / "module" / name).is_dir():
        return "loaded"
    folder = machine.modules / release(machine)[0]
    for file, state in (("modules.builtin", "built in"), ("modules.dep", "on disk")):
        if _lists(machine, folder / file, name):
            return state
    return "missing"


def _lists(machine: Machine, path: Path, name: str) -> bool:
    for line in machine.text(path, 1 << 23).splitlines():
        file = line.partition(":")[0].rpartition("/")[2]
        if file.partition(".ko")[0].replace("-", "_") == name:
            return True
    return False
