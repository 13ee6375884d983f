"""TieredCache: what it carries, gives out, saves and takes back."""

import pytest
import torch

from memtier.cache import TieredCache
from memtier.errors import IncompatibleMemoryError, ModelError
from memtier.layers.host_selector import HostSpanSelector
from memtier.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


def tokens(count, seed=0):
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def read(model, x, **options):
    cache = TieredCache(model.config, dtype=torch.float64, **options)
    with torch.inference_mode():
        logits = model(x, past_key_values=cache).logits
    return cache, logits


def test_sealed_blocks_come_once_in_order_and_own_their_memory(model):
    cache, _ = read(model, tokens(60), selector=HostSpanSelector())
    blocks = cache.take_sealed()
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert len(blocks) >= 10
    assert cache.take_sealed() == []
    settings = cache.settings
    for block in blocks:
        assert (block.start, block.end) == (4 * block.index, 4 * block.index + 4)
        assert len(block.keys) == len(settings.memory_layers)
        assert block.keys[0].dtype == torch.float16
        assert block.innovation.shape == (4,)
    kept = [b.keys[0].clone() for b in blocks]
    with torch.inference_mode():
        model(tokens(60, 1), past_key_values=cache)
    assert all(torch.equal(a, b.keys[0]) for a, b in zip(kept, blocks, strict=True))
    ring = {s.attention.keys.untyped_storage().data_ptr() for s in cache.states[1:]}
    assert not ring & {b.keys[0].untyped_storage().data_ptr() for b in blocks}


def test_a_saved_state_goes_on_exactly(model):
    x = tokens(120)
    _, whole = read(model, x)
    selector = HostSpanSelector()
    cache, _ = read(model, x[:, :70], selector=selector)
    saved = {name: value.clone() for name, value in cache.state_dict().items()}
    other = TieredCache(model.config, dtype=torch.float64, selector=selector)
    other.load_state_dict(saved)
    with torch.inference_mode():
        logits = model(x[:, 70:], past_key_values=other).logits
    assert (logits - whole[:, 70:]).abs().max() < 1e-9


def test_a_clone_shares_no_tensor_and_changes_nothing(model):
    selector = HostSpanSelector()
    cache, _ = read(model, tokens(70), selector=selector)
    before = {name: value.clone() for name, value in cache.state_dict().items()}
    copy = cache.clone(selector)
    pointers = {t.untyped_storage().data_ptr() for t in cache.state_dict().values() if t.numel() > 1}
    assert not pointers & {t.untyped_storage().data_ptr() for t in copy.state_dict().values() if t.numel() > 1}
    with torch.inference_mode():
        model(tokens(3, 1), past_key_values=copy)
    assert copy.position == 73
    assert cache.position == 70
    assert all(torch.equal(before[name], value) for name, value in cache.state_dict().items())


def test_a_state_of_another_model_is_refused_by_name(model):
    cache, _ = read(model, tokens(10))
    saved = cache.state_dict()
    with pytest.raises(IncompatibleMemoryError, match=r"attention\.keys"):
        TieredCache(tiny_model(window_tokens=20).config, dtype=torch.float64).load_state_dict(saved)
    with pytest.raises(IncompatibleMemoryError, match="float32"):
        TieredCache(model.config, dtype=torch.float32).load_state_dict(saved)
    del saved["boundary"]
    with pytest.raises(IncompatibleMemoryError, match="boundary"):
        TieredCache(model.config, dtype=torch.float64).load_state_dict(saved)


def test_reports_show_contents(model):
    cache, _ = read(model, tokens(120))
    start, end = cache.window()
    assert end == 120
    assert 16 <= end - start <= cache.settings.ring_tokens
    positions, innovation = cache.eidetic(1)
    assert len(positions) == len(innovation) == 6
    assert bool((positions < start).all())
    assert cache.eidetic(0)[0].numel() == 0
    selections = cache.last_selection()
    assert [s.layer for s in selections] == [1, 2]
    mass = cache.attention_mass()
    for selection in selections:
        assert len(selection.block_ids) == 2 == len(selection.attention_mass)
        assert all(0 <= share <= 1 for share in selection.attention_mass)
        assert sum(selection.attention_mass) > 0
        assert abs(sum(mass[selection.layer].values()) - 1) < 1e-9
    assert cache.half_life(0) > 0
    assert "ssm" in cache.layer_state(0)


def test_the_mass_by_block_sums_to_the_mass_of_the_span_for_one_token(model):
    cache, _ = read(model, tokens(121))
    with torch.inference_mode():
        model(tokens(1, 2), past_key_values=cache)
    for selection in cache.last_selection():
        assert sum(selection.attention_mass) == pytest.approx(cache.attention_mass()[selection.layer]["span"])


def test_non_finite_weights_raise_before_a_block_is_stored():
    model = tiny_model()
    selector = HostSpanSelector()
    cache = TieredCache(model.config, selector=selector)
    with torch.no_grad():
        model.model.layers[1].mixer.k_proj.weight[0, 0] = float("nan")
    with torch.inference_mode(), pytest.raises(ModelError, match="non-finite"):
        model(tokens(60), past_key_values=cache)
    assert cache.take_sealed() == []
    assert cache.position == 0


def test_what_a_recurrent_memory_cannot_do_is_refused(model):
    cache, _ = read(model, tokens(10))
    with pytest.raises(ModelError, match="cropped"):
        cache.crop(5)
    with pytest.raises(ModelError, match="padding"):
        model(tokens(4), attention_mask=torch.tensor([[0, 1, 1, 1]]))
