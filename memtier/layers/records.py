"""Nested frozen records of tensors, as names and tensors and back: how carried states are copied and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

__all__ = ["combine", "flatten", "map_tensors", "unflatten"]

R = TypeVar("R")


def flatten(state: Any, prefix: str = "", *, numbers: bool = True) -> list[tuple[str, torch.Tensor]]:
    """The tensors of nested state records, by dotted name; whole numbers as int64 tensors, if wanted."""
    out: list[tuple[str, torch.Tensor]] = []
    for field in fields(state):
        value = getattr(state, field.name)
        if is_dataclass(value):
            out += flatten(value, f"{prefix}{field.name}.", numbers=numbers)
        elif isinstance(value, torch.Tensor):
            out.append((prefix + field.name, value))
        elif numbers and isinstance(value, int):
            out.append((prefix + field.name, torch.tensor(value)))
    return out


def unflatten(state: Any, prefix: str, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """A record like `state` with the named tensors in it, copied to the device."""
    changes: dict[str, Any] = {}
    for field in fields(state):
        value, name = getattr(state, field.name), prefix + field.name
        if is_dataclass(value):
            changes[field.name] = unflatten(value, f"{name}.", tensors, device)
        elif isinstance(value, torch.Tensor):
            changes[field.name] = tensors[name].to(device, copy=True)
        elif isinstance(value, int):
            changes[field.name] = int(tensors[name])
    return replace(state, **changes)


def map_tensors(state: R, fn: Callable[[torch.Tensor], torch.Tensor]) -> R:
    """The same record with `fn` applied to each tensor."""
    changes: dict[str, Any] = {}
    for field in fields(state):  # pyright: ignore[reportArgumentType]
        value = getattr(state, field.name)
        if is_dataclass(value):
            changes[field.name] = map_tensors(value, fn)
        elif isinstance(value, torch.Tensor):
            changes[field.name] = fn(value)
    return replace(state, **changes)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]


def combine(states: Sequence[R], fn: Callable[[list[torch.Tensor]], torch.Tensor]) -> R:
    """One record of several alike: `fn` of the tensors that stand at each place; whole numbers from the first."""
    changes: dict[str, Any] = {}
    for field in fields(states[0]):  # pyright: ignore[reportArgumentType]
        values = [getattr(state, field.name) for state in states]
        if is_dataclass(values[0]):
            changes[field.name] = combine(values, fn)
        elif isinstance(values[0], torch.Tensor):
            changes[field.name] = fn(values)
    return replace(states[0], **changes)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
