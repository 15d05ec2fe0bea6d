#!/usr/bin/env python3
"""An initramfs for a guest of `vfio-vmbus vm`: busybox, the kernel's drivers for VMBus and its cards, a shell on the serial console.

    python examples/initramfs.py ROOT FILE

ROOT: the folder where packages of a kernel and of busybox were unpacked (dpkg -x); FILE: what to write. The guest's first card gets the
address that `ip=ADDRESS/BITS` on the kernel's command line says. Needs nothing but Python.
"""

import gzip
import lzma
import sys
from pathlib import Path

MODULES = ("hv_vmbus", "hv_netvsc")
FOLDERS = ("bin", "dev", "modules", "proc", "sys", "tmp")
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
ip link set lo up
for word in $(cat /proc/cmdline); do
  case $word in ip=*) ip addr add ${{word#ip=}} dev eth0 && ip link set eth0 up;; esac
done
echo "Leave the shell to power off."
setsid cttyhack sh
poweroff -f
"""
DIRECTORY, SCRIPT, FILE = 0o040755, 0o100755, 0o100644


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    root, target = Path(sys.argv[1]), Path(sys.argv[2])
    entries = [(name, DIRECTORY, b"") for name in FOLDERS]
    entries.append(("bin/busybox", SCRIPT, only(root, "bin/busybox").read_bytes()))
    entries += [(f"modules/{name}.ko", FILE, unpacked(only(root, f"{name}.ko*"))) for name in MODULES]
    entries.append(("init", SCRIPT, INIT.format(modules=" ".join(MODULES)).encode()))
    entries.append(("TRAILER!!!", 0, b""))
    target.write_bytes(b"".join(record(number, *entry) for number, entry in enumerate(entries, 1)))


def only(root: Path, pattern: str) -> Path:
    """The file of this name, which must be there once: two kernels' modules do not mix."""
    found = [path for path in root.rglob(pattern) if path.is_file() and not path.is_symlink()]
    if len(found) != 1:
        sys.exit(f"{len(found)} files {pattern} in {root}, need one: unpack one kernel and busybox-static there")
    return found[0]


def unpacked(module: Path) -> bytes:
    """A module as busybox's insmod wants it."""
    readers = {".ko": bytes, ".xz": lzma.decompress, ".gz": gzip.decompress}
    if module.suffix not in readers:
        sys.exit(f"{module}: packed in a way that is not known here, take one of {', '.join(readers)}")
    return readers[module.suffix](module.read_bytes())


def record(number: int, name: str, mode: int, data: bytes) -> bytes:
    """A file of a cpio archive, format "newc" (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


if __name__ == "__main__":
    main()
