"""The blocking surface is the async one: the same names, the same signatures."""

from __future__ import annotations

import inspect

import pytest

import memtier

PAIRS = [
    (memtier.Runtime, memtier.SyncRuntime),
    (memtier.Session, memtier.SyncSession),
    (memtier.Generation, memtier.SyncGeneration),
]
OPENS = {"aclose": "close"}
"""Blocking names that stand beside the async ones."""
FOR_THE_RUNTIME_ONLY = {
    "Session": {"close_within", "exclusive", "offline", "fork_to", "closed", "abandon", "acknowledges_each_token"},
    "Generation": {"note_closed"},
}


def public(cls: type) -> dict[str, object]:
    """Public methods and properties of a class."""
    hidden = FOR_THE_RUNTIME_ONLY.get(cls.__name__, set())
    return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_") and name not in hidden}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_sync_and_async_have_the_same_names(pair: tuple[type, type]) -> None:
    names = set(public(pair[0]))
    assert names | {OPENS[name] for name in names if name in OPENS} == set(public(pair[1]))


@pytest.mark.parametrize(
    ("method", "blocking"),
    [
        pytest.param(value, getattr(sync, OPENS.get(name, name)), id=f"{cls.__name__}.{name}")
        for cls, sync in PAIRS
        for name, value in public(cls).items()
        if inspect.isfunction(value)
    ],
)
def test_sync_and_async_signatures_agree(method: object, blocking: object) -> None:
    assert parameters(method) == parameters(blocking)
    assert not inspect.iscoroutinefunction(blocking)


def test_open_and_open_sync_take_the_same() -> None:
    assert parameters(memtier.open) == parameters(memtier.open_sync)


def parameters(function: object) -> list[inspect.Parameter]:
    assert callable(function)
    return list(inspect.signature(function).parameters.values())


def test_the_contract_of_open_is_kept() -> None:
    signature = inspect.signature(memtier.open)
    assert list(signature.parameters) == ["store", "model", "tokenizer", "config", "tenant", "device", "dtype"]
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "store"}
    assert defaults == {
        "model": "nano",
        "tokenizer": None,
        "config": None,
        "tenant": "default",
        "device": "auto",
        "dtype": "auto",
    }


def test_the_contract_of_observe_and_generate_is_kept() -> None:
    observe = inspect.signature(memtier.Session.observe).parameters
    assert list(observe) == ["self", "x", "role", "source", "metadata", "logits", "on_progress"]
    generate = inspect.signature(memtier.Session.generate).parameters
    assert {name: p.default for name, p in generate.items() if name != "self"} == {
        "prompt": None,
        "max_new_tokens": 256,
        "stop": (),
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "remember": True,
        "retrieval": None,
    }
