"""What a caller may give: what is wrong is a ConfigError that says what came, and nothing was written."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memtier
from memtier import ConfigError, MemoryConfig
from memtier.testing import tiny_model

pytestmark = pytest.mark.anyio


class Awaited:
    async def __call__(self, tokens: int, total: int | None) -> None:
        raise AssertionError("never called")


async def progress(tokens: int, total: int | None) -> None:
    raise AssertionError("never called")


def told(value: Any) -> str:
    """As it is written, and the same in each process: without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def named(values: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={told(value)}") for name, row in values.items() for value in row]


SAMPLING = {
    "max_new_tokens": [None, "3", 1.5, 0, -1, True],
    "stop": [None, 3, [3], [""], ""],
    "temperature": ["a", None, float("nan"), float("inf"), -1, 1j],
    "top_p": ["x", None, 0, 1.1, float("nan")],
    "top_k": [1.5, -1, "x", None],
    "seed": ["x", 1.5, 2**70, -(2**70)],
    "retrieval": ["nope", 3],
    "remember": [None, "no", 0],
}


@pytest.mark.parametrize(("name", "value"), named(SAMPLING))
async def test_what_is_no_way_to_sample_is_refused_when_it_is_asked_for(open_store, name: str, value: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError, match=name):
            session.generate("x", **{name: value})
        assert session.position == 0


async def test_numbers_of_other_libraries_are_taken(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("The rain in Spain")
        answer = session.generate(
            max_new_tokens=np.int64(2), temperature=np.float32(0.5), top_p=np.float64(0.9), top_k=np.int32(3),
            seed=np.uint64(2**63),
        )  # fmt: skip
        assert len([piece async for piece in answer]) <= 2
        assert len(answer.token_ids) == 2
        assert len(await session.recall("rain", k=np.int16(1))) == 1
        assert await session.state(np.int8(0))


@pytest.mark.parametrize("k", [1.5, "x", None, 0, -1, True], ids=repr)
async def test_recall_refuses_what_is_no_number_of_hits(open_store, k: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("The rain in Spain")
        with pytest.raises(ConfigError, match=f"k is {re.escape(repr(k))}; it must be a whole number of at least 1"):
            await session.recall("rain", k=k)


@pytest.mark.parametrize("k", [10**9, 2**40, 2**70], ids=["10**9", "2**40", "2**70"])
async def test_recall_gives_what_there_is_however_many_are_asked_for(tmp_path: Path, tokenizer, k: int) -> None:
    async with memtier.open(tmp_path, model=tiny_model(), tokenizer=tokenizer) as runtime:
        session = await runtime.session("a")
        await session.observe("The rain in Spain. " * 20)
        hits = await session.recall("rain", k=k)
        assert hits == await session.recall("rain", k=100)


@pytest.mark.parametrize(
    ("name", "value"),
    named(
        {
            "metadata": [3, "x", [("a", 1)]],
            "on_progress": [3, "x", progress, partial(progress), Awaited()],
            "role": ["", None, "\ud800"],
            "source": [3, "\ud800"],
        }
    ),
)
async def test_what_cannot_come_with_a_text_is_refused_before_it_is_read(open_store, name: str, value: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError, match=name):
            await session.observe("x", **{name: value})
        assert session.position == 0
        assert await session.history() == []


@pytest.mark.parametrize("x", [{"a": 1}, {}, {"a"}, frozenset("a"), None, 1.5, object()], ids=told)
async def test_a_mapping_or_a_set_is_no_text(open_store, x: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError, match="cannot read"):
            await session.observe(x)
        if x is not None:
            with pytest.raises(ConfigError, match="cannot read"):
                [piece async for piece in session.generate(x)]
        assert session.position == 0


@pytest.mark.parametrize("name", ["", None, 3, "\ud800"], ids=ascii)
async def test_names_must_be_text_that_can_be_written(open_store, name: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("x")
        calls = session.checkpoint, session.restore, session.drop_checkpoint, session.fork, runtime.session
        for call in calls:
            with pytest.raises(ConfigError):
                await call(name)
        assert await session.checkpoints() == []
        assert [info.id for info in await runtime.sessions()] == ["a"]


async def test_layers_and_blocks_have_whole_numbers(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        for value in ("x", 1.5, None, True):
            with pytest.raises(ConfigError, match="layer is"):
                await session.state(value)
            with pytest.raises(ConfigError, match="block_id is"):
                await session.block(value)
        with pytest.raises(ConfigError, match="layer is 99; this model has layers 0 to 2"):
            await session.state(99)


@pytest.mark.parametrize("hit", ["x", 3], ids=repr)
async def test_what_is_forgotten_is_what_recall_found(open_store, hit: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("The rain in Spain")
        with pytest.raises(ConfigError, match="hit is"):
            await session.forget(hit)


async def test_progress_is_told_to_a_plain_function_only(open_store, tmp_path: Path) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("x")
        await session.checkpoint("c")
        for call in (
            partial(session.restore, "c"),
            partial(session.forget, start=0, end=1),
            partial(runtime.session, "b"),
            partial(runtime.import_session, tmp_path / "none"),
        ):
            with pytest.raises(ConfigError, match="on_progress"):
                await call(on_progress=progress)
        assert session.position == 2


@pytest.mark.parametrize("store", [None, 3, b"x", 1.5, ""], ids=repr)
def test_a_store_is_a_path(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for opened in (memtier.open, memtier.open_sync):
        with pytest.raises(ConfigError, match=f"store is {re.escape(repr(store))}"):
            opened(store)
    assert not list(tmp_path.iterdir())


def test_a_config_is_a_memory_config(tmp_path: Path) -> None:
    for config in ({}, {"hot_bytes": 0}, 0, "x"):
        with pytest.raises(ConfigError, match=r"must be a memtier\.MemoryConfig"):
            memtier.open(tmp_path, config=config)


@pytest.mark.parametrize("tokenizer", [3, object(), len], ids=["3", "object", "len"])
async def test_a_tokenizer_is_one_of_transformers(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="tokenizer is"):
        async with memtier.open(tmp_path, model=tiny_model(), tokenizer=tokenizer):
            pass


def test_memory_layers_may_be_a_list_as_json_has_it() -> None:
    config = MemoryConfig(memory_layers=[1, 2])
    assert config.memory_layers == (1, 2)
    assert MemoryConfig.model_validate_json(config.model_dump_json()) == config
    assert MemoryConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("layers", [(-1,), [-1], (True,), ("1",), {1}, 1, "all"], ids=repr)
def test_memory_layers_are_numbers_of_layers(layers: Any) -> None:
    with pytest.raises(ConfigError, match=r"MemoryConfig: memory_layers(\.0)?: "):
        MemoryConfig(memory_layers=layers)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MemoryConfig(foo=1),
        lambda: MemoryConfig.model_validate({"foo": 1}),
        lambda: MemoryConfig.model_validate_json('{"foo": 1}'),
        lambda: MemoryConfig.model_validate(3),
        lambda: MemoryConfig.model_validate_json("{"),
        lambda: MemoryConfig.model_validate_json('{"hot_bytes": "x"}'),
    ],
    ids=["fields", "mapping", "json", "number", "broken json", "wrong type"],
)
def test_a_memory_config_is_refused_alike_however_it_is_made(make: Any) -> None:
    with pytest.raises(ConfigError, match="The fields are window_tokens"):
        make()
