"""The guest's initramfs: busybox, the kernel modules it needs in their order, and an init that hands over to the host's own Python.

The guest's root is the machine's own file system, shared read-only (virtiofs): the guest runs the very Python, libraries and
sources that run the tests, under the same paths, and nothing needs to be copied. What must be writable lies in /dev/shm and /run.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .packages import Tools

SHARE = "host"
"""The name under which the guest mounts the machine's file system."""

MODULES = ("vfio-pci", "vfio_iommu_type1", "tun")

_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /modules/$module || echo "init: no module $module"; done
/bin/busybox ip link set lo up
echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled # virtual machines in here boot a third faster for it
/bin/busybox mount -t virtiofs -o ro {share} /host || exec /bin/busybox poweroff -f
/bin/busybox mkdir /dev/shm
for place in proc sys dev; do /bin/busybox mount --bind /$place /host/$place; done
for place in dev/shm run; do /bin/busybox mount -t tmpfs tmp /host/$place; done
exec /bin/busybox env -i {environment} /bin/busybox switch_root /host {command}
"""


def initramfs(
    tools: Tools, where: Path, command: Sequence[str], environment: Mapping[str, str], modules: Sequence[str] = MODULES
) -> None:
    """Write an initramfs to `where` whose init loads the modules and becomes `command`, run in the machine's file system."""
    words = {
        "share": SHARE,
        "environment": " ".join(f"'{key}={value}'" for key, value in environment.items()),
        "command": " ".join(f"'{word}'" for word in command),
    }
    pack(tools, where, _INIT, modules, words)


def pack(
    tools: Tools,
    where: Path,
    init: str,
    modules: Sequence[str],
    words: Mapping[str, str],
    folders: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write an initramfs to `where`: busybox, the modules in /modules, and what `folders` names, each under its name.

    init: with {modules} for their file names, in their order, and with `words` filled in.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("bin", "proc", "sys", "dev", "host", "modules"):
            (root / name).mkdir()
        shutil.copy(tools.busybox, root / "bin/busybox")
        names = []
        for name, code in _in_order(tools.modules, modules):
            (root / "modules" / name).write_bytes(code)
            names.append(name)
        for name, source in folders.items():
            shutil.copytree(source, root / name)
        (root / "init").write_text(init.format(modules=" ".join(names), **words))
        (root / "init").chmod(0o755)
        files = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        cpio = [str(tools.busybox), "cpio", "-o", "-H", "newc"]
        done = subprocess.run(cpio, cwd=root, input=files.encode(), capture_output=True, check=True)
        where.write_bytes(done.stdout)


def _in_order(folder: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """(file name, code) of the wanted modules and of those they depend on, which come first.

    A package brings no modules.dep, but every module names what it depends on (include/linux/module.h, MODULE_INFO).
    """
    files = {_plain(path.name.split(".")[0]): path for path in folder.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def take(name: str) -> None:
        if name in found or name not in files:  # what is not there is built in
            return
        path = files[name]
        code = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", code)
        for other in depends[1].decode().split(",") if depends and depends[1] else ():
            take(_plain(other))
        found[name] = code

    for name in wanted:
        take(_plain(name))
    return [(f"{name}.ko", code) for name, code in found.items()]


def _plain(name: str) -> str:
    return name.replace("-", "_")
