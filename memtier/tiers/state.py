"""The state tier: the fading memory of each layer, its report, and snapshots of all that a session carries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memtier.cache import TieredCache
from memtier.errors import CorruptMemoryError, IncompatibleMemoryError
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
    if cache.position != position or not -1 <= cache.boundary <= position:
        raise CorruptMemoryError(
            f"snapshot {name} is of position {cache.position}, with a boundary at {cache.boundary}; its record says "
            f"{position}."
        )
    return logits


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
