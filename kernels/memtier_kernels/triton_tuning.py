"""Autotuning: a short list of configurations, the chosen one kept on disk, one under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs

__all__ = ["config", "tuned"]


def config(warps: int = 4, stages: int = 2, **constants: int) -> triton.Config:
    """One configuration: `constants` are the kernel's constexpr parameters it sets."""
    return triton.Config(constants, num_warps=warps, num_stages=stages)


def tuned(
    configs: list[triton.Config],
    key: list[str],
    prune: Callable[[triton.Config, dict[str, Any]], bool] | None = None,
) -> Callable[[Any], Any]:
    """Decorate a `triton.jit` kernel: the fastest of `configs` is found once for each new `key`, and kept on disk.

    Args:
        configs: the first is the one that the interpreter runs (it has no clock to choose by).
        key: parameters of the kernel whose values call for a new choice.
        prune: ``prune(config, arguments)`` is False for a configuration that makes no sense for these arguments.
    """
    if knobs.runtime.interpret:
        configs, prune = configs[:1], None

    def keep(configs: list[triton.Config], named_args: dict[str, Any], **constants: Any) -> list[triton.Config]:
        assert prune is not None
        arguments = {**named_args, **constants}
        return [c for c in configs if prune(c, arguments)] or configs[:1]

    by = None if prune is None else {"early_config_prune": keep}
    return triton.autotune(configs=configs, key=key, prune_configs_by=by, cache_results=True)
