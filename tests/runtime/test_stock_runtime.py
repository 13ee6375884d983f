"""A stock model behind `memtier.open`: streams, persists, generates, is refused with its reason."""

import anyio
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import memtier
from memtier.cache import TieredCache
from memtier.config import resolve_settings
from memtier.errors import ConfigError, IncompatibleMemoryError
from memtier.models.stock import StockReader

pytestmark = pytest.mark.anyio
SIZES = {"window_tokens": 16, "span_block_tokens": 4, "span_refresh_tokens": 4, "span_blocks": 2, "sink_tokens": 2}


@pytest.fixture(scope="module")
def llama():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, max_position_embeddings=64, initializer_range=0.3, bos_token_id=256,
                eos_token_id=257,
            )
        ).eval()  # fmt: skip


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


async def test_a_folder_of_a_stock_model_streams_resumes_and_finds_again(folder, llama, ids, tmp_path):
    config = memtier.MemoryConfig(**SIZES)
    async with memtier.open(tmp_path / "store", model=folder, config=config) as runtime:
        session = await runtime.session("alice")
        first = await session.observe(ids[:170], logits=True)
        await session.flush()
        assert len(await session.recall(bytes(ids[20:40]).decode("latin-1"), k=2)) == 2
        report = await session.inspect()
        assert report.storage.blocks > 30
        assert report.state.layers == ()
        assert report.storage.last_selection[0].blocks
    async with memtier.open(tmp_path / "store", model=folder, config=config) as runtime:
        session = await runtime.session("alice")
        assert session.position == 170
        second = await session.observe(ids[170:], logits=True)
    reader = StockReader(llama)
    settings = resolve_settings(config, reader.layout.memory_settings(), reader.layout.layer_types)
    with torch.no_grad():
        wanted = reader(torch.tensor([ids]), TieredCache(reader.layout, settings=settings)).logits[0]
    assert (torch.cat([first.logits, second.logits]) - wanted).abs().max() < 1e-4 * float(wanted.abs().max())


async def test_sessions_that_generate_together_say_what_each_says_alone(open_store, llama, ids):
    async def say(runtime, name, out):
        session = await runtime.session(name)
        await session.observe(ids[: 50 + len(name)])
        async with session.generate(max_new_tokens=30) as generation:
            async for _ in generation:
                pass
            out[name] = generation.token_ids

    together, alone = {}, {}
    async with open_store("together", model=llama, **SIZES) as runtime, anyio.create_task_group() as tasks:
        for name in ("a", "bbb", "cc"):
            tasks.start_soon(say, runtime, name, together)
    async with open_store("alone", model=llama, **SIZES) as runtime:
        for name in ("a", "bbb", "cc"):
            await say(runtime, name, alone)
    assert together == alone
    assert all(together.values())


async def test_what_a_stock_model_cannot_do_is_refused(open_store, llama):
    with pytest.raises(ConfigError, match="distances up to 64"):
        async with open_store("a", model=llama, **{**SIZES, "window_tokens": 60}):
            pass
    with pytest.raises(ConfigError, match="learned positions"):
        async with open_store("b", model=GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=260))):
            pass
    with pytest.raises(ConfigError, match="PreTrainedModel"):
        async with open_store("c", model=torch.nn.Linear(2, 2)):
            pass


async def test_a_store_of_one_model_is_not_read_by_another(open_store, llama, model, ids):
    async with open_store("store", model=llama, **SIZES) as runtime:
        await (await runtime.session("a")).observe(ids[:40])
    with pytest.raises(IncompatibleMemoryError):
        async with open_store("store", model=model) as runtime:
            await runtime.session("a")


async def test_layers_are_chosen_within_a_budget_and_the_estimate_is_told(open_store, llama, caplog):
    """One layer takes 2 heads of 8 channels, twice, in 16 bits: 64 bytes a token."""
    caplog.set_level("INFO", logger="memtier")
    for budget, layers, told in ((64, (1,), 64), (128, (0, 1), 128), (10_000, (0, 1), 128)):
        auto = {"memory_layers": "auto", "kv_bytes_per_token": budget}
        async with open_store(f"auto-{budget}", model=llama, **SIZES, **auto) as runtime:
            assert runtime._settings.memory_layers == layers
        assert f"keeps {told} bytes of K/V a token in storage, of layers {layers}" in caplog.text
    with pytest.raises(ConfigError, match="64 bytes"):
        async with open_store("none", model=llama, **SIZES, memory_layers="auto", kv_bytes_per_token=63):
            pass


def test_layers_within_a_budget_are_evenly_spaced():
    layout = StockReader(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8,
                max_position_embeddings=64,
            )
        )
    ).layout  # fmt: skip
    for count, layers in ((1, (6,)), (3, (2, 6, 10)), (4, (1, 4, 7, 10)), (12, tuple(range(12)))):
        config = memtier.MemoryConfig(memory_layers="auto", kv_bytes_per_token=64 * count)
        chosen = resolve_settings(config, layout.memory_settings(), layout.layer_types, kv_channels=16)
        assert chosen.memory_layers == layers
