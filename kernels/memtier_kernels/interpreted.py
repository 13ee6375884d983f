"""A pytest plugin (``-p memtier_kernels.interpreted``): without a GPU, kernels run in Triton's interpreter.

Triton decides when a kernel is defined, its own library of kernels included, so the choice must be made before anything
imports it: earlier than any conftest of a folder of tests.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch


def patch_once_a_launch() -> None:
    """A launch in a third less time: Triton's interpreter patches the language for a launch, and looks through it again
    at each call of a function within the kernel, when nothing is left to patch (seen in Triton 3.9).
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_lang(fn: Any) -> Any:
        modules = (language, language.core)
        seen = {value.__name__ for value in fn.__globals__.values() if any(value is module for module in modules)}
        if seen <= patched:
            return None  # only a launch, for which nothing is patched yet, wants what to undo
        patched.update(seen)
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        patch_once_a_launch()
