"""Adapters belong to the weights tier: a session reads with its own, others are untouched, another one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import memtier
from memtier.errors import ConfigError, IncompatibleMemoryError
from memtier.models.adapters import CONFIG_NAME, TENSORS_NAME, AdapterSet, read_adapter, write_adapter
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier.training.hylora import HyLora, adapter_tensors, add_hylora

pytestmark = pytest.mark.anyio
pytest.importorskip("peft")


def make_adapter(folder: Path, seed: int, **model: Any) -> Path:
    """An adapter of the tiny model, of random values."""
    adapted = tiny_model(dtype=torch.float64, **model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = add_hylora(adapted, HyLora(rank=2, norms=True))
    tensors = adapter_tensors(adapted, whole)
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + 0.2 * torch.randn(t.shape, dtype=t.dtype, generator=generator) for n, t in tensors.items()}
    write_adapter(folder, adapted.peft_config["default"], moved)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return make_adapter(root / "first", 1), make_adapter(root / "second", 2)


async def logits(runtime: Runtime, name: str, ids: list[int], adapter: Path | None) -> torch.Tensor:
    session = await runtime.session(name, adapter=adapter)
    read = (await session.observe(ids, logits=True)).logits
    assert read is not None
    return read


async def test_a_session_reads_with_its_adapter_and_others_as_if_there_were_none(open_store, adapters, ids) -> None:
    first, second = adapters
    async with open_store("plain") as runtime:
        plain = await logits(runtime, "s", ids, None)
    alone = []
    for folder in adapters:
        async with open_store(folder.name) as runtime:
            alone.append(await logits(runtime, "s", ids, folder))
    assert (alone[0] - plain).abs().max() > 0.1 and (alone[1] - alone[0]).abs().max() > 0.1

    async with open_store("mixed") as runtime:
        parts: dict[str, list[torch.Tensor]] = {"none": [], "first": [], "second": []}
        for start in range(0, 300, 60):
            for name, adapter in (("none", None), ("first", first), ("second", second)):
                parts[name].append(await logits(runtime, name, ids[start : start + 60], adapter))
    assert (torch.cat(parts["none"]) - plain).abs().max() < 1e-9
    for name, expected in (("first", alone[0]), ("second", alone[1])):
        assert (torch.cat(parts[name]) - expected).abs().max() < 1e-9


# peft asks transformers by a name that goes away
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
async def test_an_adapter_computes_what_peft_computes(open_store, adapters, ids) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(dtype=torch.float64)
    # tensors that were trained whole lie in the file under their plain names, so peft puts them into the model
    wrapped = peft.PeftModel.from_pretrained(model, str(adapters[0])).eval()
    with torch.inference_mode():
        expected = wrapped(torch.tensor([ids])).logits[0]
    async with open_store() as runtime:
        assert (await logits(runtime, "s", ids, adapters[0]) - expected).abs().max() < 1e-9


Call = Callable[[], Any]


async def answers(runtime: Runtime, adapters: list[Path | None], *, together: bool) -> list[tuple[int, ...]]:
    sessions = [await runtime.session(f"s{i}", adapter=adapter) for i, adapter in enumerate(adapters)]
    said: list[tuple[int, ...]] = [()] * len(sessions)
    for i, session in enumerate(sessions):
        await session.observe("Read before. " * (i + 1))

    async def answer(i: int) -> None:
        generation = sessions[i].generate("A question? ", max_new_tokens=30)
        async for _ in generation:
            pass
        said[i] = generation.token_ids

    if together:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for i in range(len(sessions)):
                    tasks.start_soon(answer, i)
    else:
        for i in range(len(sessions)):
            await answer(i)
    return said


async def test_sessions_under_several_adapters_decode_together_and_do_not_mix(open_store, adapters) -> None:
    first, second = adapters
    mixed = [first, second, None, first, None, second]
    async with open_store("alone", max_batch_sessions=1) as runtime:
        alone = await answers(runtime, mixed, together=False)
    async with open_store("together") as runtime:
        together = await answers(runtime, mixed, together=True)
        batches = runtime.stats().decode_batches
    assert together == alone
    assert len(set(alone)) >= 3
    # sessions of one adapter share a forward pass; there are two of each
    assert max(batches) == 2


async def test_memory_made_under_another_adapter_is_refused_by_name(open_store, adapters, ids) -> None:
    first, second = adapters
    async with open_store() as runtime:
        await logits(runtime, "adapted", ids[:100], first)
        await logits(runtime, "plain", ids[:100], None)
        again = await runtime.session("adapted", adapter=first)
        assert again is await runtime.session("adapted")
        with pytest.raises(IncompatibleMemoryError, match="adapter"):
            await runtime.session("adapted", adapter=second)
    async with open_store() as runtime:
        for name, adapter in (("adapted", second), ("adapted", None), ("plain", first)):
            with pytest.raises(IncompatibleMemoryError, match="adapter is"):
                await runtime.session(name, adapter=adapter)
        session = await runtime.session("adapted", adapter=first)
        assert session.position == 100
        await (await runtime.session("plain")).observe(ids[100:110])


async def test_a_session_goes_on_under_its_adapter_after_a_restart_and_in_a_fork(open_store, adapters, ids) -> None:
    async with open_store("whole") as runtime:
        whole = await logits(runtime, "s", ids, adapters[0])
    async with open_store() as runtime:
        await logits(runtime, "s", ids[:150], adapters[0])
    async with open_store() as runtime:
        session = await runtime.session("s", adapter=adapters[0])
        copy = await session.fork("t")
        await session.close()
        rest = (await copy.observe(ids[150:], logits=True)).logits
    assert (rest - whole[150:]).abs().max() < 1e-9


async def test_an_exported_session_is_taken_in_under_its_adapter_only(
    open_store, adapters, ids, tmp_path: Path
) -> None:
    first, second = adapters
    async with open_store("here") as runtime:
        await logits(runtime, "s", ids[:80], first)
        await (await runtime.session("s")).export(tmp_path / "s.memtier")
    async with open_store("there") as runtime:
        for wrong in (second, None):
            with pytest.raises(IncompatibleMemoryError, match="adapter is"):
                await runtime.import_session(tmp_path / "s.memtier", adapter=wrong)
        taken = await runtime.import_session(tmp_path / "s.memtier", adapter=first)
        assert taken.position == 80
        assert (await taken.inspect()).weights.adapters == ("first",)


async def test_the_report_names_the_adapter(open_store, adapters, ids) -> None:
    async with open_store() as runtime:
        sessions = [await runtime.session(str(a), adapter=a) for a in (adapters[0], None)]
        for session in sessions:
            await session.observe(ids[:10])
        adapted, plain = [(await session.inspect()).weights for session in sessions]
    assert (adapted.adapters, plain.adapters) == (("first",), ())
    assert adapted.fingerprint != plain.fingerprint
    assert (adapted.parameters, adapted.bytes) == (plain.parameters, plain.bytes)


async def test_an_adapter_is_let_go_with_its_last_session_and_a_model_is_given_back_as_it_came(
    open_store, adapters, ids, model
) -> None:
    modules = {name: type(module) for name, module in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    async with open_store() as runtime:
        tier = runtime._weights
        for name in ("a", "b"):
            await logits(runtime, name, ids[:20], adapters[0])
        used = tier.model
        assert any(".lora_" in name for name, _ in used.named_parameters())
        await (await runtime.session("a")).close()
        assert any(".lora_" in name for name, _ in used.named_parameters())
        await (await runtime.session("b")).close()
        assert {name: type(module) for name, module in used.named_modules()} == modules
        assert all(torch.equal(value, used.state_dict()[name]) for name, value in values.items())
        assert not hasattr(used, "peft_config")
        # and it can come back
        assert (await runtime.session("a", adapter=adapters[0])).position == 20
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in values.items())
    assert all(p.requires_grad for p in model.parameters())


async def test_a_model_that_was_loaded_by_name_takes_adapters_too(tmp_path: Path, adapters, ids) -> None:
    tiny_model(dtype=torch.float64).save_pretrained(tmp_path / "model")
    async with memtier.open(tmp_path / "store", model=tmp_path / "model", dtype="float64") as runtime:
        plain = await logits(runtime, "plain", ids[:50], None)
        adapted = await logits(runtime, "adapted", ids[:50], adapters[0])
        again = await logits(runtime, "plain-2", ids[:50], None)
    assert torch.equal(plain, again) and (plain - adapted).abs().max() > 0.1


async def test_what_is_no_adapter_of_this_model_is_refused_and_leaves_the_runtime_usable(
    open_store, adapters, ids, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", 3, hidden_size=24)
    broken = make_adapter(tmp_path / "broken", 4)
    (broken / TENSORS_NAME).write_bytes(b"x")
    kind = make_adapter(tmp_path / "kind", 4)
    (kind / CONFIG_NAME).write_text('{"peft_type": "IA3"}')
    config = read_adapter(adapters[0])
    partly = tmp_path / "partly"
    write_adapter(partly, config.config, {n: t for n, t in config.tensors.items() if "layers.1.mixer.q_proj" not in n})
    async with open_store() as runtime:
        for folder, word in ((tmp_path, "adapter_config"), (other, "another model"), (broken, "cannot be read"),
                             (kind, "IA3"), (partly, "q_proj")):  # fmt: skip
            with pytest.raises(ConfigError, match=word):
                await runtime.session("s", adapter=folder)
        await logits(runtime, "s", ids[:20], adapters[0])
        with pytest.raises(ConfigError, match="q_proj"):
            await runtime.session("t", adapter=partly)
        await logits(runtime, "s", ids[20:40], adapters[0])
        await logits(runtime, "u", ids[:20], None)


async def test_without_peft_an_adapter_says_what_to_install(open_store, adapters, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    async with open_store() as runtime:
        with pytest.raises(ConfigError, match=r"memtier\[train\]"):
            await runtime.session("s", adapter=adapters[0])


async def test_adapters_come_and_go_in_any_order(adapters) -> None:
    model, tokens = tiny_model(dtype=torch.float64), torch.arange(60)[None]
    first, second = (read_adapter(folder) for folder in adapters)
    held = AdapterSet(model)

    def read(digest: str | None) -> torch.Tensor:
        held.use(digest)
        with torch.inference_mode():
            return model(tokens).logits

    plain = read(None)
    held.add(first)
    alone = read(first.digest)
    held.add(second)
    other = read(second.digest)
    held.remove(second.digest)
    assert torch.equal(read(None), plain) and torch.equal(read(first.digest), alone)
    held.add(second)
    held.remove(first.digest)
    assert torch.equal(read(None), plain) and torch.equal(read(second.digest), other)
    held.remove(second.digest)
    assert torch.equal(read(None), plain)
    held.add(first)
    assert torch.equal(read(first.digest), alone)
