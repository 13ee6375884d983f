"""Hybrids of transformers behind `memtier.open`: they stream, are found again, go back, and generate together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import FalconH1Config, JambaConfig, Mamba2Config, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

import memtier
from memtier.cache import TieredCache
from memtier.config import resolve_settings
from memtier.models.stock import HybridReader

pytestmark = pytest.mark.anyio
SIZES: dict[str, Any] = {
    "window_tokens": 16, "span_block_tokens": 4, "span_refresh_tokens": 4, "span_blocks": 2, "sink_tokens": 2
}  # fmt: skip
COMMON: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "falcon-h1": FalconH1Config(
        **COMMON, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=8
    ),
    "jamba": JambaConfig(
        **COMMON, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, num_experts=2,
        num_experts_per_tok=1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


async def test_an_exported_hybrid_goes_on_from_its_snapshot(
    open_store: Any, model: PreTrainedModel, ids: list[int], tmp_path: Path
) -> None:
    async with open_store("a", model=model, **SIZES) as one, open_store("b", model=model, **SIZES) as two:
        session = await one.session("alice")
        await session.observe(ids[:130])
        await session.export(tmp_path / "alice.memtier")
        moved = await two.import_session(tmp_path / "alice.memtier")
        assert moved.timeline.restored_from == 130
        logits = [(await s.observe(ids[130:160], logits=True)).logits for s in (session, moved)]
        assert torch.equal(*logits)


async def test_a_hybrid_streams_resumes_and_goes_back(open_store: Any, model: PreTrainedModel, ids: list[int]) -> None:
    async with open_store("a", model=model, **SIZES, snapshot_every_tokens=64) as runtime:
        session = await runtime.session("alice")
        first = await session.observe(ids[:130], logits=True)
        await session.checkpoint("here")
        await session.observe(ids[150:190])
        await session.restore("here")
        report = await session.inspect()
        assert report.storage.blocks > 20
        assert {layer.kind for layer in report.state.layers} <= {"recurrent", "parallel"} and report.state.layers
    async with open_store("a", model=model, **SIZES, snapshot_every_tokens=64) as runtime:
        session = await runtime.session("alice")
        assert session.position == 130
        second = await session.observe(ids[130:180], logits=True)
    reader = HybridReader(model)
    settings = resolve_settings(
        memtier.MemoryConfig(**SIZES), reader.layout.memory_settings(), reader.layout.layer_types
    )  # fmt: skip
    with torch.no_grad():
        wanted = reader(torch.tensor([ids[:180]]), TieredCache(reader.layout, settings=settings)).logits[0]
    got = torch.cat([first.logits, second.logits])
    assert (got - wanted).abs().max() < 1e-4 * float(wanted.abs().max())


async def test_hybrid_sessions_that_generate_together_say_what_each_says_alone(
    open_store: Any, model: PreTrainedModel, ids: list[int]
) -> None:
    async def say(runtime: Any, name: str, out: dict[str, Any]) -> None:
        session = await runtime.session(name)
        await session.observe(ids[: 30 + len(name)])
        async with session.generate(max_new_tokens=12) as generation:
            async for _ in generation:
                pass
            out[name] = generation.token_ids

    together: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    async with open_store("together", model=model, **SIZES) as runtime, anyio.create_task_group() as tasks:
        for name in ("a", "bbb"):
            tasks.start_soon(say, runtime, name, together)
    async with open_store("alone", model=model, **SIZES) as runtime:
        for name in ("a", "bbb"):
            await say(runtime, name, alone)
    assert together == alone and all(together.values())


async def test_a_model_without_attention_streams_too(open_store: Any, ids: list[int]) -> None:
    config = Mamba2Config(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2,
        chunk_size=8, bos_token_id=256, eos_token_id=257, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
    async with open_store("a", model=model, window_tokens=16, span_block_tokens=4) as runtime:
        session = await runtime.session("alice")
        got = (await session.observe(ids[:60], logits=True)).logits
        with torch.no_grad():
            wanted = model(torch.tensor([ids[:60]])).logits[0]
        assert (got - wanted).abs().max() < 1e-4 * float(wanted.abs().max())
