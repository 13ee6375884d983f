"""The layers of a hybrid, each tried alone in float32: in pieces against the whole, our attention against its own.

What is tried is transformers' own code, with the weights at hand; what a model is called plays no part.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from memtier.errors import ConfigError

__all__ = ["CACHE_NAMES", "attention_off", "needs_single_tokens"]

PROBE_TOKENS = 12
# off the whole text's outputs, of the largest, on a CPU and elsewhere
ALLOWED, ALLOWED_ELSEWHERE = 2e-5, 2e-3
CACHE_NAMES = ("past_key_values", "cache_params")


def needs_single_tokens(model: nn.Module, name: str, carrying: int) -> bool:
    """Does each recurrent layer go on from a state with one token, and not each with several?

    Args:
        name: of the model.
        carrying: how many layers carry a state.

    Raises:
        ConfigError: not with one token, or the layer cannot be found.
    """
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and _convolves(m)]
    if len(found) != carrying:
        raise ConfigError(f"the recurrent layers of {name} have an unknown layout.")
    single = False
    for module in found:
        limit = getattr(module, "time_step_limit", None) or (0.0, float("inf"))
        one, several = _off(module, [5, *([1] * (PROBE_TOKENS - 5))]), _off(module, [5, 4, 3])
        allowed = ALLOWED if next(module.parameters()).device.type == "cpu" else ALLOWED_ELSEWHERE
        if tuple(limit) != (0.0, float("inf")) or not one <= allowed:
            raise ConfigError(
                f"{name} reads a token by itself in another way than in a text (layer {module.layer_idx}, "
                f"off by {one:.1e}; time_step_limit {tuple(limit)} counts in a text only), so its outputs would depend "
                f"on how a text is cut. Set time_step_limit = (0.0, float('inf')) on its recurrent layers to read it "
                f"without limits."
            )
        single = single or not several <= allowed
    return single


def _off(module: nn.Module, pieces: list[int]) -> float:
    """How far the outputs of a recurrent layer for a text in pieces are from those for the whole, of the largest."""
    alone: Any = copy.deepcopy(module).float().eval()
    name = next(n for n in CACHE_NAMES if n in inspect.signature(alone.forward).parameters)
    width = next(p.in_features for p in alone.children() if isinstance(p, nn.Linear))
    h = _noise(width, next(alone.parameters()).device)
    cache = Cache(layers=[LinearAttentionLayer() for _ in range(alone.layer_idx + 1)])
    got = torch.cat([alone(piece, **{name: cache}) for piece in h.split(pieces, dim=1)], dim=1)
    wanted = alone(h, **{name: None})
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def attention_off(
    model: nn.Module, implementation: str, empty: Callable[[], Cache]
) -> Iterator[tuple[int, str, float]]:  # fmt: skip
    """How far each attention is from itself when it reads through a cache of ours, at position 0 throughout.

    Args:
        implementation: the name of our attention function.
        empty: gives the cache of a pass of `PROBE_TOKENS` tokens from the beginning, in float32.

    Yields:
        layer, name of the module's class, and the largest difference, of the largest output.
    """
    rotary: Any = next((m for m in model.modules() if hasattr(m, "rope_type")), None)
    if rotary is not None:
        # made anew, since a model that was moved to a 16-bit dtype has rounded its frequencies
        rotary = type(rotary)(model.config.get_text_config())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    for module in model.modules():
        if not (hasattr(module, "is_causal") and hasattr(module, "layer_idx")):
            continue
        alone: Any = copy.deepcopy(module).float().eval()
        names = inspect.signature(alone.forward).parameters
        projection = next(p for p in alone.children() if isinstance(p, nn.Linear))
        device = projection.weight.device
        h = _noise(projection.in_features, device)
        # layers may share a module, which is then told which it is
        layer = next(iter(getattr(alone, "layer_dic", None) or [alone.layer_idx]))
        outputs = []
        for attention, cache in (("sdpa", None), (implementation, empty())):
            alone.config._attn_implementation = attention
            place = torch.arange(PROBE_TOKENS, device=device)[None] * (cache is None)
            given: dict[str, Any] = {"attention_mask": None, "past_key_values": cache, "position_ids": place}
            given["layer_idx"] = layer
            if rotary is not None:
                given["position_embeddings"] = rotary.to(device)(h, place)
            outputs.append(alone(h, **{name: value for name, value in given.items() if name in names})[0])
        wanted, got = outputs
        yield layer, type(module).__name__, float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _noise(width: int, device: torch.device) -> torch.Tensor:
    return torch.randn(1, PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0)).to(device)
