"""`model.generate(..., past_key_values=memtier.TieredCache(model.config))`: as users of transformers know it.

CHECKS names the checks of transformers' own suite for `generate` (GenerationTesterMixin) that concern a cache: the test
here that makes each with ours, or why it does not apply.
"""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, TextStreamer
from transformers.cache_utils import Cache

import memtier
from memtier.cache import TieredCache as CarriedCache
from memtier.errors import ConfigError, ModelError
from memtier.models.stock import StockReader
from memtier.models.stock.families import STOCK_SIZES, tiny_stock_model

CHECKS = {
    "test_greedy_generate": "test_greedy_and_sampling_give_what_the_models_own_cache_gives",
    "test_greedy_generate_dict_outputs_use_cache": "test_outputs_as_a_dictionary",
    "test_sample_generate": "test_greedy_and_sampling_give_what_the_models_own_cache_gives",
    "test_beam_search_generate": "test_beams_give_what_the_models_own_cache_gives",
    "test_beam_search_generate_dict_outputs_use_cache": "test_outputs_as_a_dictionary",
    "test_beam_sample_generate": "test_beams_give_what_the_models_own_cache_gives",
    "test_generate_without_input_ids": "test_generating_from_nothing_and_from_embeddings",
    "test_generate_from_inputs_embeds": "test_generating_from_nothing_and_from_embeddings",
    "test_generate_continue_from_past_key_values": "test_generating_goes_on_from_a_cache",
    "test_generate_continue_from_inputs_embeds": "test_generating_goes_on_from_a_cache",
    "test_left_padding_compatibility": "test_a_padded_row_gives_what_it_gives_alone",
    "test_assisted_decoding_matches_greedy_search": "test_assisted_decoding_gives_what_greedy_search_gives",
    "test_assisted_decoding_sample": "test_assisted_decoding_gives_what_greedy_search_gives",
    "test_prompt_lookup_decoding_matches_greedy_search": "test_assisted_decoding_gives_what_greedy_search_gives",
    "test_prompt_lookup_decoding_stops_at_eos": "test_assisted_decoding_gives_what_greedy_search_gives",
    "test_generate_methods_with_logits_to_keep": "test_outputs_as_a_dictionary",
    "test_eager_matches_sdpa_generate": "test_greedy_and_sampling_give_what_the_models_own_cache_gives",
    "test_past_key_values_format": "the shape of DynamicCache's tensors; ours are windows and blocks",
    "test_greedy_generate_dict_outputs": "runs without a cache",
    "test_sample_generate_dict_output": "runs without a cache",
    "test_beam_search_generate_dict_output": "runs without a cache",
    "test_beam_sample_generate_dict_output": "runs without a cache",
    "test_generate_with_static_cache": "is of StaticCache",
    "test_generate_from_inputs_embeds_with_static_cache": "is of StaticCache",
    "test_generate_with_quant_cache": "is of QuantizedCache",
    "test_generate_compile_model_forward_fullgraph": "one graph needs a cache that reads no number on the host; "
    "compiled models are read between graphs, see test_a_compiled_model_gives_the_same",
    "test_generate_compilation_all_outputs": "as above: transformers compiles for caches of fixed graphs only",
    "test_attention_outputs": "attention over several memories has no one matrix of weights; see attention_mass",
    "test_model_parallel_beam_search": "needs two accelerators",
    "test_flash_attention_generate": "needs a GPU",
    "test_inherits_generation_mixin": "is of the model, not of a cache",
    "test_prepare_inputs_for_generation_kwargs_forwards": "is of the model, not of a cache",
}
SMALL = memtier.MemoryConfig(window_tokens=24, sink_tokens=2, span_block_tokens=4, span_refresh_tokens=4, span_blocks=3)
FAMILIES = ["llama-yarn", "phi3-longrope", "gemma2", "gemma3", "cohere2", "gpt-oss", "glm", "smollm3", "qwen3"]


def make_model(family="llama", seed=0, dtype=torch.float32, **overrides):
    model = tiny_stock_model(family, seed=seed, dtype=dtype, eos_token_id=None, **overrides)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


@pytest.fixture(scope="module")
def llama():
    return make_model()


def tokens(count, seed=0, rows=1):
    return torch.randint(2, 64, (rows, count), generator=torch.Generator().manual_seed(seed))


def new_cache(model, **overrides):
    return memtier.TieredCache(model.config, memory=SMALL.model_copy(update=overrides))


def generate(model, x, cache=None, seed=0, **options):
    """Ten tokens after x."""
    torch.manual_seed(seed)
    return model.generate(x, past_key_values=cache, **{"max_new_tokens": 10, "do_sample": False, **options})


def test_every_check_of_transformers_is_made_or_has_its_reason():
    made = {name for name in CHECKS.values() if name.startswith("test_")}
    assert made <= set(globals())
    assert len(made) == 7


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 20, "temperature": 0.9, "num_return_sequences": 2}],
    ids=["", "sampled"],
)
def test_greedy_and_sampling_give_what_the_models_own_cache_gives(llama, attention, options):
    llama.set_attn_implementation(attention)
    x = tokens(12, rows=2)
    assert torch.equal(generate(llama, x, new_cache(llama), **options), generate(llama, x, **options))
    assert llama.config._attn_implementation == attention
    llama.set_attn_implementation("sdpa")


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True}])
def test_beams_give_what_the_models_own_cache_gives(llama, options):
    x = tokens(10, rows=2)
    assert torch.equal(generate(llama, x, new_cache(llama), **options), generate(llama, x, **options))


def test_beams_of_padded_rows_go_beyond_the_window(llama):
    x, mask = padded([30, 18])
    options = {"num_beams": 3, "attention_mask": mask, "max_new_tokens": 20}
    both = generate(llama, x, new_cache(llama), **options)
    for row, length in ((0, 30), (1, 18)):
        alone = generate(llama, x[row : row + 1, -length:], new_cache(llama), num_beams=3, max_new_tokens=20)
        assert torch.equal(both[row, -20:], alone[0, -20:])


def test_outputs_as_a_dictionary(llama):
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    for more in ({"output_hidden_states": True}, {"num_beams": 2}):
        cache = new_cache(llama)
        got = generate(llama, tokens(12), cache, **options, **more)
        wanted = generate(llama, tokens(12), **options, **more)
        assert got.past_key_values is cache
        assert isinstance(cache, Cache)
        assert cache.get_seq_length() == 21
        assert torch.equal(got.sequences, wanted.sequences)
        assert (torch.stack(got.logits) - torch.stack(wanted.logits)).abs().max() < 1e-4
    assert len(got.scores) == 10


def test_generating_from_nothing_and_from_embeddings(llama):
    torch.manual_seed(0)
    got = llama.generate(max_new_tokens=5, do_sample=False, past_key_values=new_cache(llama))
    assert torch.equal(got, llama.generate(max_new_tokens=5, do_sample=False))
    embedded = llama.get_input_embeddings()(tokens(9))
    options = {"inputs_embeds": embedded, "max_new_tokens": 5, "do_sample": False}
    got = llama.generate(**options, past_key_values=new_cache(llama))
    assert torch.equal(got, llama.generate(**options))


def test_generating_goes_on_from_a_cache(llama):
    """Also beyond the window, and in chunks: any split gives the same."""
    x = tokens(40)
    whole = generate(llama, x, new_cache(llama), max_new_tokens=30)
    cache = new_cache(llama)
    first = generate(llama, x, cache, max_new_tokens=13)
    assert torch.equal(generate(llama, first, cache, max_new_tokens=17), whole)
    chunked = generate(llama, x, new_cache(llama), max_new_tokens=30, prefill_chunk_size=7)
    assert torch.equal(chunked, whole)
    cache = new_cache(llama)
    with torch.no_grad():
        llama(inputs_embeds=llama.get_input_embeddings()(x[:, :31]), past_key_values=cache)
    assert torch.equal(generate(llama, x, cache, max_new_tokens=30), whole)


def padded(lengths, seed=5):
    """Rows of these lengths, padded on the left."""
    width = max(lengths)
    x = torch.stack([torch.cat([torch.zeros(width - n, dtype=torch.int64), tokens(n, seed + n)[0]]) for n in lengths])
    return x, (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_row_gives_what_it_gives_alone(llama, attention):
    """Far beyond the window, so that blocks and boundaries of each row are its own."""
    llama.set_attn_implementation(attention)
    lengths = [50, 33, 2]
    x, mask = padded(lengths)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 25}
    both = generate(llama, x, new_cache(llama), attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = generate(llama, x[row : row + 1, -length:], new_cache(llama), **options)
        assert torch.equal(both.sequences[row, -25:], alone.sequences[0, -25:])
        logits = torch.stack(both.logits)[:, row] - torch.stack(alone.logits)[:, 0]
        assert logits.abs().max() < 1e-3
    llama.set_attn_implementation("sdpa")


def test_padding_in_the_middle_and_on_the_right_is_left_out(llama):
    x = tokens(60, rows=2)
    mask = torch.ones_like(x)
    mask[0, 20:27] = 0
    mask[1, 50:] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = new_cache(llama)
        got = torch.cat(
            [
                llama(x[:, a:b], attention_mask=mask[:, :b], position_ids=place[:, a:b], past_key_values=cache).logits
                for a, b in ((0, 24), (24, 60))
            ],
            dim=1,
        )
        for row in range(2):
            real = mask[row].bool()
            alone = llama(x[row : row + 1, real], past_key_values=new_cache(llama)).logits
            assert (got[row, real] - alone[0]).abs().max() < 1e-3


@pytest.mark.parametrize("length", [12, 40], ids=["inside the window", "beyond it"])
def test_assisted_decoding_gives_what_greedy_search_gives(llama, length):
    x = tokens(length)
    x[:, -3:] = x[:, 4:7]
    wanted = generate(llama, x, new_cache(llama), max_new_tokens=25)
    helper = make_model(seed=1)
    for options in ({"assistant_model": helper}, {"assistant_model": make_model()}, {"prompt_lookup_num_tokens": 4}):
        cache = new_cache(llama)
        assert torch.equal(generate(llama, x, cache, max_new_tokens=25, **options), wanted)
        assert cache.get_seq_length() == length + 24
    stop = int(wanted[0, length + 6])
    ended = generate(llama, x, new_cache(llama), max_new_tokens=25, prompt_lookup_num_tokens=4, eos_token_id=stop)
    assert int(ended[0, -1]) == stop
    sampled = generate(llama, x, new_cache(llama), do_sample=True, assistant_model=helper)
    assert sampled.shape[1] == length + 10


def test_a_pass_is_taken_back_to_any_of_its_tokens(llama):
    x = tokens(60)
    with torch.no_grad():
        for kept in (0, 1, 7, 19, 20):
            cache = new_cache(llama)
            cache.activate_past_recording()
            llama(x[:, :30], past_key_values=cache)
            llama(x[:, 30:50].flip(1), past_key_values=cache)
            cache.crop(kept - 20)
            again = torch.cat([x[:, :30], x[:, 30:50].flip(1)[:, :kept]], dim=1)
            straight = new_cache(llama)
            llama(again, past_key_values=straight)
            assert cache.get_seq_length() == 30 + kept
            got, wanted = (llama(x[:, 50:], past_key_values=c).logits for c in (cache, straight))
            assert (got - wanted).abs().max() < 1e-3
    with pytest.raises(ModelError, match="taken back"):
        cache.crop(-31)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_plain_transformers_reads_as_the_runtime_does(name):
    """The same numbers though positions are the stream's: keys are turned back as the model turned them."""
    model = make_model(name)
    x = tokens(110, seed=1, rows=2)
    cache = new_cache(model)
    got = torch.cat([model(piece, past_key_values=cache).logits for piece in x.split([5, 60, 1, 1, 43], dim=1)], dim=1)
    wanted = model(x[:, :24], use_cache=False).logits
    assert (got[:, :24] - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    reader = StockReader(model)
    settings = cache._settings
    read = reader(x, CarriedCache(reader.layout, settings=settings, batch_size=2)).logits
    # blocks are kept in 16 bits: a key that was turned there and back may round to the next number
    assert (got - read).abs().max() < 5e-3 * max(1.0, float(read.abs().max()))


@torch.no_grad()
def test_far_along_a_stream_numbers_are_those_of_its_beginning():
    """A stream of one block over and over: what the window holds is the same at 40 and at 200,000."""
    model = make_model(max_position_embeddings=64)
    x = tokens(40, seed=2)
    logits = []
    for offset in (0, 200_000):
        cache = new_cache(model, retrieval="off", sink_tokens=0)
        place = torch.arange(40)[None] + offset
        logits.append(model(x, position_ids=place, past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_frequencies_that_were_rounded_with_the_weights_are_found_out(dtype):
    """A model that was cast has rounded them; one that was loaded in 16 bits has not."""
    for cast in (True, False):
        model = make_model(dtype=dtype, head_dim=16)
        if not cast:
            model.model.rotary_emb.inv_freq = make_model(head_dim=16).model.rotary_emb.inv_freq
        cache = new_cache(model)
        model(tokens(60), past_key_values=cache)
        table = cache._lines._rotaries[0].frequencies
        assert torch.equal(table, table.to(dtype).double()) == cast


def test_memory_stays_constant_and_retrieval_has_its_controls(llama):
    x = tokens(300)
    texts = {}
    for mode in ("on", "off", "recent", "random"):
        cache = new_cache(llama, retrieval=mode)
        # where decoding is under way, which holds the window a second time
        generate(llama, x[:, :100], cache, max_new_tokens=4)
        held = cache.device_bytes()
        texts[mode] = generate(llama, x, cache, max_new_tokens=20)[0, -20:].tolist()
        assert cache.device_bytes() == held
        assert bool(cache.last_selection()[0].block_ids) == (mode != "off")
    assert cache.attention_mass()[0]["span"] > 0
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    assert torch.equal(generate(llama, x, cache), generate(llama, x, new_cache(llama, retrieval="random")))


def test_a_streamer_is_told_each_token(llama, capsys):
    tokenizer = AutoTokenizer.from_pretrained(Path(memtier.__file__).parent / "models" / "nano")
    x = tokens(10)
    out = generate(llama, x, new_cache(llama), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, 10:]).strip()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(llama):
    x = tokens(30)
    wanted = generate(llama, x, new_cache(llama), max_new_tokens=12)
    torch._dynamo.reset()
    compiled = make_model()
    compiled.compile(backend="aot_eager")
    assert torch.equal(generate(compiled, x, new_cache(compiled), max_new_tokens=12), wanted)
    assert compiled.config._attn_implementation == "sdpa"


def test_what_a_cache_cannot_do_is_refused(llama):
    with pytest.raises(ConfigError, match=r"model\.config"):
        memtier.TieredCache(llama)
    with pytest.raises(ConfigError, match=r"memtier\.MemoryConfig"):
        memtier.TieredCache(llama.config, memory=SMALL.model_dump())
    with pytest.raises(ConfigError, match="learned positions"):
        memtier.TieredCache(transformers.OPTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2))
    with pytest.raises(ConfigError, match="not of a causal language model"):
        memtier.TieredCache(transformers.ViTConfig())
    with pytest.raises(ConfigError, match="distances up to 64"):
        new_cache(llama, window_tokens=60)
    cache = new_cache(llama)
    with pytest.raises(ModelError, match="empty"):
        cache.last_selection()
    generate(llama, tokens(8, rows=2), cache)
    with pytest.raises(ModelError, match="holds 2 rows"):
        llama(tokens(8, rows=3), past_key_values=cache)
    assert llama.config._attn_implementation == "sdpa"
    banded = torch.ones(1, 1, 8, 8).tril().bool()
    banded[..., -1, 2] = False
    with pytest.raises(ConfigError, match="not causal with padding"):
        llama(tokens(8), attention_mask=banded, past_key_values=new_cache(llama))
    with pytest.raises(ConfigError, match="no mask of your own"):
        llama(tokens(8), attention_mask=torch.ones(1, 1, 8, 16).bool(), past_key_values=new_cache(llama))


def test_a_dynamic_embedding_is_read_inside_its_length_only():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    model = make_model(rope_parameters=parameters)
    assert generate(model, tokens(50), new_cache(model)).shape[1] == 60
    with pytest.raises(ConfigError, match="dynamic rotary embedding"):
        generate(model, tokens(60), new_cache(model))


def test_a_model_that_changes_keys_after_their_rotation_is_refused():
    """Before any weight is seen: a layer of its class is tried."""
    config = transformers.HunYuanDenseV1Config(**{**STOCK_SIZES, "head_dim": 8})
    with pytest.raises(ConfigError, match="more to queries or keys"):
        memtier.TieredCache(config)


def test_weights_that_are_not_finite_raise(llama):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match="finite"):
            model(tokens(60), past_key_values=new_cache(model))
    assert model.config._attn_implementation == "sdpa"
