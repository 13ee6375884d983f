"""The state tier: the fading memory of each layer, its report, and snapshots of all that a session carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from memtier.cache import TieredCache
from memtier.errors import CorruptMemoryError, IncompatibleMemoryError
from memtier.layers.finite import is_finite
from memtier.layers.plan import next_boundary
from memtier.reports import StateLayer, StateReport
from memtier.tiers.raw import to_raw, to_tensor
from memtier_backends.tensors import pack_tensors, unpack_tensors

__all__ = ["pack_snapshot", "state_report", "superseded", "unpack_snapshot"]

LOGITS = "session.logits"
FORMAT = "memtier-snapshot-1"


def pack_snapshot(cache: TieredCache, logits: torch.Tensor | None) -> bytes:
    """Everything a session carries, as the bytes of one safetensors file: a copy of this moment.

    Args:
        cache: the session's cache.
        logits: (V,) the last logits, which the next sampled token needs; None before the first token.
    """
    tensors = cache.state_dict() | ({} if logits is None else {LOGITS: logits})
    return pack_tensors({name: to_raw(tensor) for name, tensor in tensors.items()}, {"format": FORMAT})


def unpack_snapshot(data: bytes, name: str, digest: str, position: int, cache: TieredCache) -> torch.Tensor | None:
    """Load a snapshot into a fresh cache, and return its logits.

    Raises:
        CorruptMemoryError: the bytes are not those that were written, or not of this position.
        IncompatibleMemoryError: another format, or the state of another model.
    """
    arrays, metadata = unpack_tensors(data, name, digest)
    if metadata.get("format") != FORMAT:
        raise IncompatibleMemoryError(
            f"snapshot {name} has format {metadata.get('format')!r}, and this version of memtier reads {FORMAT!r}."
        )
    try:
        tensors = {key: to_tensor(raw) for key, raw in arrays.items()}
        logits = tensors.pop(LOGITS, None)
        cache.load_state_dict(tensors)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CorruptMemoryError(f"snapshot {name} is none that this model made: {error}") from error
    if cache.position != position:
        raise CorruptMemoryError(f"snapshot {name} is of position {cache.position}, and its record says {position}.")
    if wrong := _contradiction(tensors, logits, cache):
        raise CorruptMemoryError(f"snapshot {name} holds what no session carries: {wrong}.")
    return logits


def _contradiction(tensors: Mapping[str, torch.Tensor], logits: torch.Tensor | None, cache: TieredCache) -> str | None:
    """What in the numbers of a loaded snapshot cannot be."""
    position, boundary = cache.position, cache.boundary
    if not (boundary < position <= next_boundary(cache.settings, boundary) if position else boundary == -1):
        return f"a boundary at {boundary} for position {position}"
    if any(mark < position for mark in cache.marks):
        return f"a mark before position {position}"
    if logits is not None and (tuple(logits.shape) != (cache.config.vocab_size,) or not logits.is_floating_point()):
        return f"logits of shape {tuple(logits.shape)}"
    spans: dict[str, int] = {}
    for key, tensor in [*tensors.items(), *([] if logits is None else [(LOGITS, logits)])]:
        layer, span, _ = key.rpartition(".span_")
        if span and spans.setdefault(layer, tensor.shape[1]) != tensor.shape[1]:
            return f"spans of two sizes in {layer}"
        if tensor.is_floating_point():
            # a place in the span that nothing was chosen for scores minus infinity
            numbers = tensor.clamp(min=0) if key.endswith(".span_scores") else tensor
            if not is_finite(numbers):
                return f"{key} is not finite"
        elif tensor.numel() and key not in ("position", "boundary", "marks"):
            most = cache.sealed_blocks - 1 if key.endswith(".span_ids") else position
            if not -1 <= tensor.min() <= tensor.max() <= most:
                return f"{key} is not in [-1, {most}]"
    return None


def superseded(positions: Sequence[int]) -> set[int]:
    """Which snapshots need not be kept, of those at `positions`, ascending.

    The two newest stay. Further back the gaps grow with the distance, so that their number grows as the logarithm of
    the session, and going back to any moment costs at most about twice the tokens since.
    """
    gone: set[int] = set()
    kept = list(positions[-2:])
    for at in range(len(positions) - 3, -1, -1):
        older = positions[at - 1] if at else 0
        if kept[0] - older <= positions[-1] - kept[0]:
            gone.add(positions[at])
        else:
            kept.insert(0, positions[at])
    return gone


def state_report(cache: TieredCache) -> StateReport:
    """Kind, size, norm and half-life of every layer that carries a recurrent state. Runs on the model thread."""
    layers = []
    for layer in range(len(cache.states)):
        held = cache.layer_state(layer).items()
        # a stock model's layer may carry a convolution tail alone, or nothing
        tensors = {name: t for name, t in held if name.rpartition(".")[2] == "ssm" and t.numel()}
        for tensor in tensors.values():
            layers.append(
                StateLayer(
                    layer=layer,
                    kind=(cache.config.layer_types or [])[layer],
                    shape=tuple(tensor.shape),
                    bytes=tensor.numel() * tensor.element_size(),
                    norm=float(tensor.double().norm()),
                    half_life_tokens=cache.half_life(layer),
                )
            )
    return StateReport(bytes=sum(layer.bytes for layer in layers), layers=tuple(layers))
