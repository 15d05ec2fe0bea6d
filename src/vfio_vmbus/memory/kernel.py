"""`@kernel(signature)`: a data-plane function, compiled by Numba with explicit types, without the GIL, cached on disk.

All values in kernels are int64: addresses, offsets, lengths, file descriptors. Kernels get addresses, never arrays
(an array argument costs atomic reference counts). With NUMBA_DISABLE_JIT=1 a kernel is the plain Python function, and every
access it makes is checked against the memory that is registered (see `access`).

The cache lives in one folder per state of this package's sources: Numba by itself does not notice that a constant or a callee in
another file has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, update_wrapper
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.extending import overload

from . import part

F = TypeVar("F", bound=Callable[..., Any])

INTERPRETED = bool(numba.config.DISABLE_JIT)
"""True where kernels run as plain Python (NUMBA_DISABLE_JIT=1)."""

_PACKAGE = Path(__file__).resolve().parent.parent
_KEPT_FOLDERS = 8


@cache
def _fingerprint() -> str:
    """A name for this state of the sources, of Numba and of Python."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version}".encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        status = path.stat()
        digest.update(f"{path.relative_to(_PACKAGE)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """The folder of compiled kernels (XDG_CACHE_HOME or ~/.cache), or None, with a warning, where there can be none.

    One that cannot be written is read: a service may run on what was compiled when it was installed.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "vfio-vmbus"
        folder = root / f"kernels-{_fingerprint()}"
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _prune(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        _warn_that_nothing_is_kept(str(error))
        return None
    return folder


@cache
def _warn_that_nothing_is_kept(why: str) -> None:
    """Once for each reason."""
    warnings.warn(
        f"compiled kernels are not kept ({why}); every start compiles anew: set XDG_CACHE_HOME to a writable folder",
        RuntimeWarning,
        stacklevel=2,
    )


def _prune(root: Path) -> None:
    """Every change of the sources makes another folder: drop all but the youngest. Whoever still runs on one has it in memory."""
    for old in sorted(root.glob("kernels-*"), key=lambda path: path.stat().st_mtime)[:-_KEPT_FOLDERS]:
        shutil.rmtree(old, ignore_errors=True)


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Tells Numba where the cache is. The folder's name stands for this package's state, the stamp for the kernel's own file."""

    def __init__(self, py_file: str) -> None:
        self._py_file = py_file
        status = os.stat(py_file)
        self._stamp = (status.st_size, status.st_mtime_ns)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> tuple[int, int]:
        return self._stamp

    def get_disambiguator(self) -> str:
        return hashlib.sha256(self._py_file.encode()).hexdigest()[:10]

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls(py_file)


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl

    def load_overload(self, *arguments: Any) -> Any:
        """What was kept, None where there is nothing that may be read."""
        with suppress(PermissionError):
            return super().load_overload(*arguments)

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except OSError as error:
            _warn_that_nothing_is_kept(f"{cache_folder()}: {error.strerror}")


def kernel(signature: str) -> Callable[[F], F]:
    """Compile a function for `signature` (for example "i8(i8, i8)": all int64), at import, from the cache where it can be."""

    def decorate(function: F) -> F:
        if INTERPRETED:
            return function
        dispatcher = numba.njit(nogil=True, error_model="numpy", boundscheck=False, no_cfunc_wrapper=True)(function)
        if cache_folder() is not None:
            dispatcher._cache = _Cache(function)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return decorate


class _Step:
    """A function that is compiled into the kernels that call it, and by itself when Python calls it."""

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self._signature = signature
        self._function = function
        self._kernel: Callable[..., Any] | None = None
        update_wrapper(self, function)
        overload(self, jit_options=part.OPTIONS, strict=False)(lambda *arguments: function)

    def __call__(self, *arguments: int) -> Any:
        if self._kernel is None:
            self._kernel = kernel(self._signature)(self._function)
        return self._kernel(*arguments)


def step(signature: str) -> Callable[[F], F]:
    """For what mostly kernels call: as `kernel`, but compiled no sooner than Python calls it. Kernels get it built in."""

    def decorate(function: F) -> F:
        return function if INTERPRETED else cast(F, _Step(function, signature))

    return decorate
