"""A file system with this machine's Python and what the project imports, for a guest that shares no files: an ext4 image.

Made once and kept, under a name that stands for what is in it. The project's own sources change too often for that: they come with
the initramfs, and the image has empty folders where they are on this machine, as everything has its path from here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .ext4 import pack_ext4
from .kernels import CPU
from .once import TIMES
from .process import SOURCES

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = "project"
"""Of the initramfs, for `project_files`."""
_PARTS = ("src", "tests/guest", "kernels")
"""What is in there. (The virtual environment, which belongs to the image, may lie beside them.)"""
_CACHE = PROJECT / ".cache" / "guest-python"
_LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "cuda", "include"}
"""Folders of packages that nobody needs here."""

_MAPPED = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})))
"""


def python_disk(modules: Iterable[str]) -> Path:
    """The image, with the libraries that these modules load among the rest. Raises UnavailableError where it cannot be made."""
    done = subprocess.run(
        [sys.executable, "-c", _MAPPED, *modules], env={**os.environ, **SOURCES}, capture_output=True, text=True, check=True
    )
    sources = _sources()
    libraries = [
        Path(path) for path in json.loads(done.stdout) if not any(Path(path).is_relative_to(source) for source in sources)
    ]
    digest = hashlib.sha256(f"4 {sys.executable} {PROJECT}".encode())
    for path in (*sources, *libraries):
        digest.update(f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}\n".encode())
    image = _CACHE / f"{digest.hexdigest()[:16]}.ext4"
    if not image.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        for old in _CACHE.glob("*.ext4"):
            old.unlink()
        _make(image, sources, libraries)
    return image


def _sources() -> list[Path]:
    """The standard library's folder, and the folders and files of the packages that the project needs, with what these need."""
    found = {Path(sysconfig.get_paths()["stdlib"])}
    todo, seen = ["vfio-vmbus"], set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another Python or system
        todo += [
            words[0] for line in package.requires or () if "extra ==" not in line and (words := re.findall(r"[\w.-]+", line))
        ]
        if name != "vfio-vmbus":
            tops = {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
            found |= {path for top in tops if (path := Path(str(package.locate_file(top)))).exists()}
    return sorted(found)


def _make(image: Path, sources: Iterable[Path], libraries: Iterable[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        root = Path(folder) / "root"
        for source in sources:
            _place(root, source)
        for library in libraries:
            for name in library.parent.glob(f"{library.name.split('.so')[0]}*.so*"):  # the names that programs know it by
                if name.resolve() == library.resolve():
                    _place(root, name)
        config = Path(sys.prefix) / "pyvenv.cfg"
        for path in (
            Path(sys.executable),
            Path("/lib64/ld-linux-x86-64.so.2"),
            Path("/lib"),
            *([config] if config.exists() else ()),
        ):
            _place(root, path)
        for name in ("proc", "sys", "dev", "run", "tmp", *(PROJECT.relative_to("/") / part for part in _PARTS)):
            (root / name).mkdir(parents=True, exist_ok=True)
        made = Path(folder) / "image"
        pack_ext4(root, made)
        made.rename(image)


def _place(root: Path, path: Path) -> None:
    """Put a file or a folder of this machine under `root`, and the links on the way to it."""
    for part in (*reversed(path.parents), path):
        if part.is_symlink():
            link = root / part.relative_to("/")
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(part.readlink())
            _place(root, part.parent.joinpath(part.readlink(), path.relative_to(part)))
            return
    target = root / os.path.normpath(path).lstrip("/")
    if path.is_dir():
        if path != Path("/usr/lib"):
            shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True, ignore=_unneeded)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _unneeded(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _LEFT_OUT or name.startswith("config-") or name.endswith((".a", ".pyi", ".h"))}


def python_init(environment: Mapping[str, str]) -> str:
    """What a shell's init does (`shell.shell_image`, more) so that `py FILE FUNCTION ARGUMENTS` runs a payload. The image is /dev/pmem0."""
    words = {"LANG": "C.UTF-8", "PYTHONPATH": SOURCES["PYTHONPATH"], "XDG_CACHE_HOME": f"{PROJECT}/kernels", **CPU, **environment}
    settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in words.items())
    once = PROJECT / "tests/guest/once.py"
    return f"""
mkdir /py
mount -t ext4 -o ro /dev/pmem0 /py
for place in proc sys dev; do mount --bind /$place /py/$place; done
for place in dev/shm run; do mount -t tmpfs tmp /py/$place; done
for part in {" ".join(_PARTS)}; do mount --bind /{FOLDER}/$part /py{PROJECT}/$part; done
cat >/bin/py <<'END'
#!/bin/sh
env -i PATH=/bin HOME=/run TMPDIR=/run {settings} chroot /py {sys.executable} {once} /run/said "$@"
status=$?
cat /py/run/said
exit $status
END
chmod +x /bin/py
"""


def project_files(folder: Path, kernels: Path) -> None:
    """Fill a folder with what `PYTHON_INIT` wants in the initramfs: the project's sources, payloads and compiled kernels."""
    left_out = shutil.ignore_patterns("*.egg-info")
    *sources, cache = _PARTS
    for part in sources:
        shutil.copytree(PROJECT / part, folder / part, ignore=left_out)
    shutil.copytree(kernels, folder / cache)
    times = {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".py", ".nbi")
    }
    (folder / TIMES).write_text(json.dumps(times))
