"""`vfio-vmbus vm`: a Linux guest whose VMBus devices are those of an embedded host."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UnavailableError, UsageError
from .card import MtuOption, PollOption, PortOption, add_port, check_ports
from .control import NameOption, controlled
from .faults import FaultOption, FaultSeedOption, HostileOption, fault_plan, fault_rows
from .guest_console import HINT, KEYS, GuestInput, GuestOutput, Keys, raw_terminal, say
from .output import printable, progress
from .stopping import on_stop

if TYPE_CHECKING:
    from ..vm.cpu import Ended
    from ..vm.hyperv import Hyperv
    from ..vm.machine import Machine

_UNITS = {"": 20, "M": 20, "G": 30, "T": 40}
_NIC_HELP = (
    "A network card for the guest (repeat for more), and what is on its switch: tap=NAME, pcap=FILE (what passes is recorded), or none; "
    "with ,mac=ADDRESS its own."
)
_CONFINED = "a virtual machine: its devices reach the guest's memory, and nothing else of this machine"
_STOPPED, _TIMED_OUT = 130, 124
_NOT_SYNCING = "Kernel panic - not syncing: "
_PATIENCE, _HURRY = 10.0, 1.0
"""Seconds that whoever reads the console may take for the last of it; and when somebody wants an end."""


def vm(
    kernel: Annotated[Path, typer.Option("--kernel", help="A bzImage (vmlinuz) for x86-64.", metavar="BZIMAGE")],
    initrd: Annotated[Path | None, typer.Option("--initrd", help="Its initramfs.", metavar="FILE")] = None,
    cmdline: Annotated[
        str, typer.Option("--cmdline", help='Added to the kernel\'s command line "console=ttyS0 panic=-1".', metavar="WORDS")
    ] = "",
    cpus: Annotated[int, typer.Option("--cpus", help="Virtual processors.", min=1)] = 1,
    memory: Annotated[str, typer.Option("--memory", help="Of the guest: 512M, 2G; MiB without a unit.", metavar="SIZE")] = "512M",
    nic: Annotated[list[str] | None, typer.Option("--nic", help=_NIC_HELP, metavar="KIND")] = None,
    port: PortOption = None,
    mtu: MtuOption = 1500,
    poll: PollOption = "adaptive",
    pmem: Annotated[
        list[Path] | None,
        typer.Option("--pmem", help="A disk image as /dev/pmem0 and so on; writes are forgotten.", metavar="FILE"),
    ] = None,
    console: Annotated[
        str,
        typer.Option("--console", help="Where the serial console goes: FILE, or - for this terminal or pipe.", metavar="FILE|-"),
    ] = "-",
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds that the guest may run.", min=0.001)] = None,
    max_version: Annotated[
        str, typer.Option("--max-version", help="Newest version of VMBus that is agreed to: 5.3 to 2.4.", metavar="N.N")
    ] = "5.3",
    fault: FaultOption = None,
    fault_seed: FaultSeedOption = 0,
    hostile: HostileOption = False,
    process_name: NameOption = None,
) -> int:
    """Run a Linux guest with VMBus devices.

    Over /dev/kvm. The guest finds Hyper-V's VMBus, and on it the cards of --nic, all on one switch. Exit status 0 when it has
    powered off or restarts, 1 when it panicked or failed, 2 for wrong use, 124 after --timeout, 130 when it was stopped.

    Example: vfio-vmbus vm --kernel vmlinuz --initrd initrd.img --nic tap=vm0
    """
    cards = [parse_nic(text) for text in nic or []]
    ports = [*(card.port for card in cards if card.port), *(port or [])]
    check_ports(ports)
    size = parse_size(memory)
    newest = parse_version(max_version)
    faults = fault_plan(fault, hostile, fault_seed)
    with ExitStack() as stack:
        output = stack.enter_context(_output(console))
        with progress("starting (the first start compiles the data path, some seconds)"):
            _check(kernel)
            from ..control.hosting import HostSubject
            from ..host.embedded import EmbeddedHost
            from ..vm.hyperv import Hyperv
            from ..vm.machine import CMDLINE, Machine

            host = stack.enter_context(EmbeddedHost(poll=poll, faults=faults))
            nics = [host.add_nic(mac=card.mac, max_mtu=mtu) for card in cards]
            for text in ports:
                add_port(host, text, stack, mtu=mtu, mac=nics[0].mac if nics else b"\xff" * 6)
            hyperv = Hyperv(host, *nics, name=process_name or "guest", max_version=newest)
            words = f"{CMDLINE} {cmdline}".strip()
            machine = stack.enter_context(
                Machine(
                    kernel=kernel,
                    initrd=initrd,
                    cmdline=words,
                    cpus=cpus,
                    memory=size,
                    console=output,
                    pmem=pmem or [],
                    paravirt=hyperv,
                )
            )
        stack.callback(output.close, _HURRY)  # ahead of the machine: none of its processors waits for a reader then
        stack.enter_context(controlled("vm", lambda: HostSubject(host, why=_CONFINED, max_mtu=mtu), process_name))
        with on_stop(machine.stop, signal.SIGHUP, signal.SIGQUIT), _input(machine, reads=console == "-"):
            ended = _run(machine, output, timeout)
        for row in fault_rows(host):
            print("{device}, {flow}: {fault} hit {hits} of {seen}".format(**row), file=sys.stderr, flush=True)
    output.check()
    return _tell(ended, hyperv, wanted=bool(cards))


def _check(kernel: Path) -> None:
    """The common mistakes, before anything is made that takes seconds. Raises UnavailableError, UsageError."""
    from ..vm.boot import parse
    from ..vm.kvm import Kvm

    Kvm().close()
    try:
        parse(kernel.read_bytes())
    except OSError as error:
        raise UnavailableError(f"the kernel {kernel} cannot be read: {error.strerror}") from None


def _run(machine: Machine, output: GuestOutput, timeout: float | None) -> Ended:
    """From the first instruction to the last word on the console."""
    output.on_failure = machine.stop
    if machine.ended is None:  # else somebody was faster
        machine.start()
    ended = machine.wait(timeout)
    output.close(_HURRY if ended.reason == "stopped" else _PATIENCE)
    return ended


@dataclass(frozen=True)
class Card:
    """What --nic asks for. port: in the words of --port, if there is to be one. mac: None for a random one."""

    port: str | None
    mac: bytes | None = None


def parse_nic(text: str) -> Card:
    """Raises UsageError for words that make no sense."""
    backend, *options = text.split(",")
    match = re.fullmatch(r"(tap|pcap|capture)[=:](.+)|none", backend)
    if match is None:
        raise UsageError(f"--nic {text}: take tap=NAME, pcap=FILE or none, and ,mac=ADDRESS behind it if you like")
    port = None if backend == "none" else f"{'tap' if match[1] == 'tap' else 'capture'}:{match[2]}"
    mac = None
    for option in options:
        name, _, value = option.partition("=")
        if name != "mac" or not re.fullmatch(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", value):
            raise UsageError(f"--nic {text}: {option!r} is no mac=00:15:5d:xx:xx:xx")
        mac = bytes.fromhex(re.sub("[:-]", "", value))
    return Card(port, mac)


def parse_size(text: str) -> int:
    """Bytes. Raises UsageError for what is no size; whether a guest can have so much is the machine's to say."""
    match = re.fullmatch(r"([0-9]{1,12})([MGT]?)(i?B)?", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory {text}: take a number of MiB, or with a unit, as 512M or 2G")
    return int(match[1]) << _UNITS[match[2].upper()]


def parse_version(text: str) -> int:
    """major << 16 | minor. Raises UsageError for a version that VMBus does not have."""
    from ..wire.vmbus import SUPPORTED_VERSIONS, version_text

    known = {version_text(version): version for version in SUPPORTED_VERSIONS}
    if text not in known:
        raise UsageError(f"--max-version {text}: take one of {', '.join(known)}")
    return known[text]


@contextmanager
def _output(console: str) -> Iterator[GuestOutput]:
    """Where the guest's words go. Raises UnavailableError for a file that cannot be written."""
    with ExitStack() as stack:
        fd = sys.stdout.fileno()
        if console != "-":
            try:
                fd = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
            except OSError as error:
                raise UnavailableError(f"--console {console}: {error.strerror}") from None
            stack.callback(os.close, fd)
        output = GuestOutput(fd, "standard output" if console == "-" else console)
        stack.callback(output.close, _HURRY)
        yield output


@contextmanager
def _input(machine: Machine, *, reads: bool) -> Iterator[None]:
    """Let a person, or a program, type to the guest while the block runs."""
    with ExitStack() as stack:
        keys = None
        if reads and os.isatty(0):
            print(HINT, file=sys.stderr, flush=True)
            stack.enter_context(raw_terminal(0))
            keys = Keys()
        if reads:

            def command(letter: str) -> None:
                if letter == "x":
                    machine.stop()
                else:
                    say(KEYS)

            stack.callback(GuestInput(0, machine.feed, lambda: machine.waiting, keys, command).close)
        yield


def _tell(ended: Ended, hyperv: Hyperv, *, wanted: bool) -> int:
    """How it ended, on stderr where there is something to say; and the exit status. wanted: were there devices for the guest?"""
    orderly = ended.reason == "power-off" or (ended.reason == "reset" and not ended.text)
    status = {"time-out": _TIMED_OUT, "stopped": _STOPPED}.get(ended.reason, 0 if orderly else 1)
    said = {
        "panic": f"the guest's kernel panicked: {_panic(ended.text)}",
        "time-out": f"time-out: {ended.text}",
        "reset": f"the guest restarted, which ends it here{': ' if ended.text else ''}{ended.text}",
        "stopped": "stopped",
        "failed": ended.text,
        "power-off": "",
    }[ended.reason]
    if said:
        _complain(said)
    if hyperv.silence is not None and wanted and ended.reason != "panic":
        _complain(hyperv.silence)
        if orderly and not hyperv.noticed:
            return 2
    return status


def _panic(text: str) -> str:
    """The kernel's own line first, then what there is of its log, which it left with the hypervisor."""
    reasons = [line.partition(_NOT_SYNCING)[2] for line in text.splitlines() if _NOT_SYNCING in line]
    return "\n".join([reasons[-1], text] if reasons else [text or "it did not say why"])


def _complain(text: str) -> None:
    lines = (printable(line) for line in text.splitlines())
    print(f"vfio-vmbus: {next(lines, '')}", *lines, sep="\n", file=sys.stderr, flush=True)
