"""A session of a model with other mixers, rules and landmarks reads what the model reads by itself, and resumes."""

from __future__ import annotations

import pytest
import torch

from memtier.testing import tiny_model

pytestmark = pytest.mark.anyio

CHOICES = {
    "deltanet": {"fading": "gated_deltanet", "layer_types": ["gated_deltanet", "bmojo", "bmojo"]},
    "random-conv": {"eidetic_rule": "random", "innovation_predictor": "conv"},
    "recency": {"landmark_keys": 2, "recency_share": 0.4},
    "bounds-max": {"landmark_kind": "bounds", "query_kind": "max"},
}


@pytest.mark.parametrize("overrides", CHOICES.values(), ids=CHOICES)
async def test_a_session_reads_what_the_model_reads_and_goes_on_after_a_restart(open_store, ids, overrides) -> None:
    model = tiny_model(dtype=torch.float64, **overrides)
    with torch.inference_mode():
        whole = model(torch.tensor([ids])).logits[0]
    async with open_store(model=model, hot_bytes=0, snapshot_every_tokens=64) as runtime:
        one = await (await runtime.session("a")).observe(ids[:170], logits=True)
    async with open_store(model=model, hot_bytes=0) as runtime:
        two = await (await runtime.session("a")).observe(ids[170:], logits=True)
        memory = await (await runtime.session("a")).inspect()
    torch.testing.assert_close(torch.cat([one.logits, two.logits]), whole, rtol=0.0, atol=1e-9)
    assert memory.storage.blocks > 0
