"""Machines of ours with and without Linux in them: how each ends, and that nothing of it is left.

Without Linux: a bzImage made here whose code is a few instructions at the 64-bit entry, with every mapping and no interrupts.
"""

from __future__ import annotations

import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from guest.shell import Shell

from vfio_vmbus.errors import UnavailableError, UsageError
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vm.cpu import Ended
from vfio_vmbus.vm.machine import Machine

Report = Callable[[Any], None]
MIB = 1 << 20
WORDS = "console=ttyS0 quiet mitigations=off"

# Instructions, as the CPU reads them in 64-bit mode.
UNDEFINED = b"\x0f\x0b"  # no handler: a triple fault
FOREVER = b"\xeb\xfe"
HALT = b"\xf4\xeb\xfd"


def load(register: int, value: int) -> bytes:
    """mov r32, value. register: 0 EAX, 1 ECX, 2 EDX, 3 EBX, 6 ESI, 7 EDI."""
    return bytes((0xB8 + register,)) + struct.pack("<I", value)


def out(port: int, value: int, size: int = 1) -> bytes:
    form = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[size]
    return load(2, port) + load(0, value) + form


def say(text: str) -> bytes:
    return b"".join(out(0x3F8, byte) for byte in text.encode())


def say_al() -> bytes:
    return load(2, 0x3F8) + b"\xee"


OFF = out(0x604, 5 << 10 | 1 << 13, 2) + FOREVER
RESET = out(0xCF9, 6) + FOREVER


def read_memory(address: int) -> bytes:
    """mov eax, [address]"""
    return b"\x48\xbb" + struct.pack("<Q", address) + b"\x8b\x03"


def write_memory(address: int, value: int) -> bytes:
    return b"\x48\xbb" + struct.pack("<Q", address) + b"\xc7\x03" + struct.pack("<I", value)


def jump(address: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", address) + b"\xff\xe0"


def every_port(ports: range) -> bytes:
    """Read each port in three sizes, and write what was read back."""
    loop = b"\xec\xee\x66\xed\x66\xef\xed\xef"  # in al; out al; in ax; out ax; in eax; out eax
    loop += b"\xff\xc2" + b"\x81\xfa" + struct.pack("<I", ports.stop)  # inc edx; cmp edx, stop
    return load(2, ports.start) + loop + b"\x75" + struct.pack("b", -(len(loop) + 2))


def kernel(code: bytes) -> bytes:
    """A bzImage with `code` at its 64-bit entry."""
    image = bytearray(5 * 512)
    image[0x1F1] = 4
    struct.pack_into("<I", image, 0x1F4, 64)
    image[0x1FE:0x206] = b"\x55\xaa\xeb\x6aHdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<HI", image, 0x236, 3, 255)
    struct.pack_into("<QI", image, 0x258, 16 * MIB, MIB)
    return bytes(image) + (bytes(0x200) + code).ljust(4096, b"\xf4")


class Screen:
    def __init__(self) -> None:
        self.shown = b""

    def write(self, data: bytes) -> None:
        self.shown += data


@contextmanager
def file_of(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(content)
        yield path


def raw(code: bytes, timeout: float = 60, **options: Any) -> tuple[Ended, bytes]:
    """How a machine with this code ended, and what it said. Nothing of it is left."""
    screen = Screen()
    with file_of(kernel(code)) as path, nothing_left():
        with Machine(kernel=path, memory=64 * MIB, console=screen, **options) as machine:
            machine.start()
            ended = machine.wait(timeout)
        machine.close()
    return ended, screen.shown


def without_linux(report: Report) -> None:
    """Reports (name, reason, text, what it said) of each."""
    cases: dict[str, bytes] = {
        "power off": say("hello") + OFF,
        "reset": RESET,
        "keyboard reset": out(0x64, 0xFE) + FOREVER,
        "triple fault": UNDEFINED,
        "unknown MSR": load(1, 0x12345) + b"\x0f\x32" + OFF,
        "string output": b"\x48\x8d\x35\x0e\0\0\0" + load(2, 0x3F8) + load(1, 3) + b"\xf3\x6e\xeb\x03abc" + OFF,
        "no memory": read_memory(0xE0000000) + say_al() + write_memory(0xE0000000, 1) + OFF,
        "beyond memory": read_memory(80 * MIB) + say_al() + OFF,
        "no port": load(2, 0x1234) + b"\xec" + say_al() + OFF,
        "every port": every_port(range(0x700)) + every_port(range(0xCF8, 0xD00)) + OFF,
        "no code there": jump(0xE0000000),
    }
    for name, code in cases.items():
        ended, said = raw(code)
        report([name, ended.reason, ended.text, said.decode("latin-1")])


def stopping(report: Report) -> list[Any]:
    """Machines that would never end: by time-out, by `stop` from another thread, by close alone; with several CPUs."""
    found = []
    for code, cpus in ((FOREVER, 1), (HALT, 1), (FOREVER, 4)):
        found.append(raw(code, 0.5, cpus=cpus)[0].reason)
    with file_of(kernel(FOREVER)) as path, nothing_left():
        with Machine(kernel=path, memory=64 * MIB, cpus=2) as machine:
            machine.start()
            threading.Timer(0.3, machine.stop).start()
            found.append(machine.wait(60).reason)
        with Machine(kernel=path, memory=64 * MIB) as machine:
            machine.start()
        found.append(machine.ended.reason if machine.ended else "")
        with Machine(kernel=path, memory=64 * MIB):
            pass
        for _ in range(20):
            with Machine(kernel=path, memory=64 * MIB, cpus=3) as machine:
                machine.start()
    return found


def refusals(report: Report) -> list[str]:
    """What cannot be a machine, where there is a KVM: the error's text of each; nothing is left."""
    found = []
    with file_of(kernel(OFF)) as good, file_of(b"MZ") as bad, file_of(bytes(64 * MIB)) as large:
        fine = {"kernel": good, "memory": 64 * MIB}
        wrong: Sequence[dict[str, Any]] = (
            {"kernel": bad},
            {"kernel": Path("/nonexistent")},
            {"initrd": Path("/nonexistent")},
            {"initrd": large},
            {"cpus": 0},
            {"cpus": 100000},
            {"memory": 1 << 50},
            {"memory": 12345},
            {"cmdline": "x" * 300},
            {"pmem": [Path("/nonexistent")]},
        )
        for options in wrong:
            with nothing_left():
                try:
                    Machine(**{**fine, **options}).close()
                except (UnavailableError, UsageError) as error:
                    found.append(str(error).replace(str(good.parent), "").replace(str(bad.parent), ""))
                else:
                    found.append("")
        with Machine(**fine) as machine:
            machine.start()
            try:
                machine.start()
            except UsageError as error:
                found.append(str(error))
    return found


def linux(
    report: Report,
    kernel: str,
    initrd: str,
    cpus: int = 1,
    words: str = WORDS,
    pmem: Sequence[str] = (),
    do: Sequence[str] = (),
) -> Any:
    """A Linux on a Hyper-V whose host never comes: commands over its serial console, and the answer to each; then what the last one, sent
    without waiting, led to."""
    from vfio_vmbus.vm.hyperv import Hyperv

    begun = time.monotonic()
    shell = Shell(lambda data: machine.feed(data), lambda: machine.ended)
    with (
        nothing_left(),
        Machine(
            kernel=Path(kernel),
            initrd=Path(initrd),
            cmdline=words,
            cpus=cpus,
            memory=256 * MIB,
            console=shell,
            pmem=list(map(Path, pmem)),
            paravirt=Hyperv(),
        ) as machine,
    ):
        machine.start()
        shell.ready()
        report(round(time.monotonic() - begun, 2))
        *asked, last = do
        answers = [shell.run(command) for command in asked]
        shell.send(last)
        ended = machine.wait(60)
    return [answers, ended.reason, ended.text]


def noise(report: Report, seed: int, count: int) -> list[str]:
    """Machines whose code is random bytes: why each ended."""
    random = Random(seed)
    return [raw(random.randbytes(1024), 3)[0].reason for _ in range(count)]


HYPERCALL_PAGE = 32 * MIB
MESSAGES = 40 * MIB
MESSAGE = 256
MANY = 4096
"""Messages that lie there for the guest to post."""


def write_msr(number: int, value: int) -> bytes:
    return load(1, number) + load(0, value & 0xFFFFFFFF) + load(2, value >> 32) + b"\x0f\x30"


def hypercalls(count: int) -> bytes:
    """Code that is a guest of Hyper-V and makes many calls: posts messages out of those that lie there, signals channels, and others."""
    begin = write_msr(0x40000000, 1) + write_msr(0x40000001, HYPERCALL_PAGE | 1)
    begin += write_msr(0x40000082, 48 * MIB | 1) + write_msr(0x40000083, 49 * MIB | 1) + write_msr(0x40000092, 1 << 16 | 0x40)
    begin += write_msr(0x40000080, 1)
    begin += b"\x49\xbc" + struct.pack("<Q", 0x9E3779B97F4A7C15)  # mov r12, the state of a xorshift
    begin += b"\x41\xbd" + struct.pack("<I", count)  # mov r13d, count
    again = b"\x4c\x89\xe0\x48\xc1\xe0\x0d\x49\x31\xc4"  # r12 ^= r12 << 13
    again += b"\x4c\x89\xe0\x48\xc1\xe8\x07\x49\x31\xc4"  # r12 ^= r12 >> 7
    again += b"\x4c\x89\xe0\x48\xc1\xe0\x11\x49\x31\xc4"  # r12 ^= r12 << 17
    again += b"\xb9\x5c\0\0\0"  # mov ecx, HvPostMessage
    again += b"\x4c\x89\xe2\x48\xc1\xea\x20"  # mov rdx, r12; shr rdx, 32
    again += b"\x81\xe2" + struct.pack("<I", MANY - 1)  # and edx, a message's number
    again += b"\xc1\xe2\x08" + b"\x81\xc2" + struct.pack("<I", MESSAGES)  # shl edx, 8; add edx, where they lie
    signal = b"\xb9\x5d\0\x01\0\x4c\x89\xe2" + b"\x81\xe2" + struct.pack("<I", 0x3FF)  # fast HvSignalEvent of a random channel
    mad = b"\x4c\x89\xe1\x4c\x89\xe2"  # whatever: rcx and rdx are random
    again += b"\x41\xf6\xc4\x03\x75" + bytes((len(signal),)) + signal  # one of four
    again += b"\x41\xf6\xc4\x1c\x75" + bytes((len(mad),)) + mad  # one of eight
    again += b"\xb8" + struct.pack("<I", HYPERCALL_PAGE) + b"\x4d\x89\xe0\xff\xd0"  # mov eax, page; mov r8, r12; call rax
    again += b"\xc7\x04\x25" + struct.pack("<II", 49 * MIB + 2 * 256, 0)  # the message slot is free again
    again += write_msr(0x40000084, 0)  # EOM
    again += b"\x41\xff\xcd"  # dec r13d
    return begin + again + b"\x0f\x85" + struct.pack("<i", -(len(again) + 6)) + OFF


def hyperv_noise(report: Report, seed: int, count: int) -> Any:
    """A guest that posts random messages and makes random hypercalls; why it ended, and what the host thinks of it. The host lives:
    another guest finds its card.
    """
    from vfio_vmbus.host.embedded import EmbeddedHost
    from vfio_vmbus.vm.hyperv import Hyperv

    random = Random(seed)
    with EmbeddedHost(poll="interrupt") as host, file_of(kernel(hypercalls(count))) as path:
        card = host.add_nic("nic")
        hyperv = Hyperv(host, card)
        with Machine(kernel=path, memory=64 * MIB, paravirt=hyperv) as machine:
            for number in range(MANY):
                size = random.randrange(0, 244)
                body = struct.pack("<II", random.randrange(0, 30), 0) + random.randbytes(232)
                head = struct.pack(
                    "<IIII", random.choice((1, 4, 4, 4, random.getrandbits(32))), 0, random.choice((1, 1, 1, 2)), size
                )
                contact = struct.pack("<IIIIQQQ", 14, 0, 0x50003, 0, 2, 0, 0)
                machine.memory.write(MESSAGES + number * MESSAGE, head + (contact if number % 16 == 0 else body))
            machine.start()
            ended = machine.wait(120)
            errors = len(hyperv.connection.errors)
        second = Hyperv(host, card)
        with Machine(kernel=path, memory=64 * MIB, paravirt=second) as machine:
            pass
    return [ended.reason, ended.text, errors]
