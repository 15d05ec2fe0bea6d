"""Compiling what only kernels call: as far as LLVM's intermediate code, which goes into the kernels, and no further.

Numba would optimise each function and turn it into machine code by itself first, and again inside whatever calls it; for helpers that
is work for nothing, half of the time that a first start takes. Here only a kernel, as a whole, is optimised and translated.
"""

from __future__ import annotations

import weakref
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that can be linked into others' only."""

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """There is no machine code whose environment that would be."""

    def _optimize_final_module(self) -> None:
        """It is optimised where it is linked in."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._final_module.__library = weakref.proxy(self)
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):  # type: ignore[misc]
    _name = "vfio_vmbus_part_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        done: bool = super().run_pass(state)
        return done


class _PartCompiler(CompilerBase):  # type: ignore[misc]
    """Numba's own passes, the last but one exchanged."""

    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [(_PartLowering if each is NativeLowering else each, why) for each, why in pipeline.passes]
        pipeline.finalize()
        return [pipeline]


OPTIONS: dict[str, Any] = {
    "pipeline_class": _PartCompiler,
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}
"""For `numba.extending.register_jitable` and `overload`."""
