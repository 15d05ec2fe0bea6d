"""`HyperVGuest`: a Linux guest that finds itself on Hyper-V, with a VMBus and a real device on it, for payloads as `Guest` runs them.

QEMU has a VMBus host and one device for it, hv-balloon; they need KVM with Hyper-V's interrupt controller. An AMD CPU that QEMU
emulates can give that to a guest of its own: so there is a machine in software emulation (the outer one), whose Linux runs nothing but
QEMU with KVM, and in that the guest. Both get their files from this machine (virtiofs, twice).
"""

from __future__ import annotations

import shlex
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from .image import SHARE, initramfs
from .packages import Tools
from .process import tail
from .qmp import Qmp
from .run import Guest, file_server

BALLOON = "hvb"
_INNER_MODULES = ("hv_vmbus", "hv_balloon", "uio_hv_generic")
_INNER_MEMORY = "640M"
_WORDS = "console=ttyS0 panic=-1 mitigations=off"
_CPU = "host,kvm=off,hv-relaxed,hv-vapic,hv-time,hv-vpindex,hv-synic,hv-stimer,hv-runtime,hv-frequencies"
"""kvm=off: else the guest finds KVM, and no Hyper-V."""


class HyperVGuest(Guest):
    """One boot of both. `inner` is the control socket of the QEMU whose devices are the guest's."""

    inner: Qmp
    boot_seconds = 900.0
    preload = ("vfio_vmbus.drivers.balloon.driver", "vfio_vmbus.bus.uio_device")
    settings = {"NUMBA_DISABLE_JIT": "1"}
    """Numba takes minutes to start in here; interpreted kernels check each access to the rings."""

    def __init__(self, tools: Tools, folder: Path) -> None:
        super().__init__(tools, folder, folder / "no-kernels")
        (folder / "no-kernels").mkdir()

    def console(self, lines: int = 30) -> str:
        return f"{super().console(lines)}\n{tail(self._folder / 'inner.log', lines)}"

    def _make_image(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        inner = self._folder / "inner.cpio"
        initramfs(self._tools, inner, command, environment, _INNER_MODULES)
        share = Path("/run/share")
        served = shlex.join(file_server(self._tools, share))
        paths = " ".join(f"{key}={shlex.quote(value)}" for key, value in self._tools.qemu_environment.items())
        start = f"exec env {paths} {shlex.join(self._inner_command(inner, share))}"
        script = self._folder / "outer.sh"
        script.write_text(f"{served} &\nuntil test -S {share}; do sleep 0.1; done\n{start}\n")
        words = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        initramfs(self._tools, self._folder / "init.cpio", ["/bin/sh", str(script)], words, ("kvm-amd",))

    def _connect(self, stack: ExitStack) -> None:
        control = stack.enter_context(socket.socket(socket.AF_UNIX))
        control.connect(str(self._folder / "inner"))
        self.inner = stack.enter_context(Qmp(control, self.boot_seconds))

    def _command(self) -> list[str]:
        """The outer machine: two ports lead on to the inner QEMU."""
        return [
            *self._tools.qemu,
            *("-accel", "tcg,thread=multi", "-cpu", "EPYC-Rome,+svm,+npt", "-smp", "1", "-m", "1536M"),
            *("-object", "memory-backend-memfd,id=ram,size=1536M,share=on", "-machine", "q35,memory-backend=ram"),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{self._folder / 'console.log'}", "-serial", f"file:{self._folder / 'inner.log'}"),
            *("-kernel", str(self._tools.kernel), "-initrd", str(self._folder / "init.cpio")),
            *("-append", _WORDS),
            *("-qmp", f"unix:{self._folder / 'qmp'},server=on,wait=off"),
            *("-device", "virtio-serial-pci,addr=2.0"),
            *("-chardev", f"socket,id=port,path={self._folder / 'port'},server=on,wait=off"),
            *("-device", "virtserialport,chardev=port,nr=1"),
            *("-chardev", f"socket,id=inner,path={self._folder / 'inner'},server=on,wait=off"),
            *("-device", "virtserialport,chardev=inner,nr=2"),
            *("-chardev", f"socket,id=share,path={self._folder / 'share'}"),
            *("-device", f"vhost-user-fs-pci,addr=3.0,chardev=share,tag={SHARE}"),
        ]

    def _inner_command(self, image: Path, share: Path) -> list[str]:
        return [
            *self._tools.qemu,
            *("-accel", "kvm", "-cpu", _CPU, "-smp", "1", "-m", _INNER_MEMORY),
            *(
                "-object",
                f"memory-backend-memfd,id=ram,size={_INNER_MEMORY},share=on",
                "-machine",
                "pc,smm=off,memory-backend=ram",
            ),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:/dev/ttyS1"),
            *("-kernel", str(self._tools.kernel), "-initrd", str(image), "-append", _WORDS),
            *("-chardev", "pipe,id=control,path=/dev/vport0p2", "-mon", "chardev=control,mode=control"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port"),
            *("-chardev", "pipe,id=port,path=/dev/vport0p1"),
            *("-chardev", f"socket,id=share,path={share}", "-device", f"vhost-user-fs-pci,chardev=share,tag={SHARE}"),
            *("-device", "vmbus-bridge", "-device", f"hv-balloon,id={BALLOON},status-report=on"),
        ]
