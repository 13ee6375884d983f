"""A small trained Llama, three of its five layers converted on the CPU: as good as it was, and flat to forty contexts.

Needs ../shared/data, which is no part of the project. `pytest -m slow -s tests/training/test_prime_stories.py` prints
numbers such as those of docs/worklog.md, which come of a longer run.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memtier.cache import TieredCache
from memtier.training.fit_settings import FitSettings
from memtier.training.prime import Prime, prime
from memtier.training.text import TextIds, TextLessons

STORIES = runpy.run_path(str(Path(__file__).parents[1] / "models" / "test_stock_stories.py"))
TOKENS, FAR, CONTEXT, STEP = 20_000, 3_000, 512, 512
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES["STORIES"].exists(), reason="no development data"),
]


@torch.no_grad()
def inside(model: Any, x: torch.Tensor) -> float:
    """Mean loss over pieces as long as the source's context, each after the token that begins a text."""
    pieces = [
        torch.cat([x[:, :1], x[:, start : start + CONTEXT - 1]], dim=1)
        for start in range(1, TOKENS - CONTEXT, CONTEXT - 1)
    ]
    losses = [F.cross_entropy(model(piece).logits[0, :-1], piece[0, 1:]) for piece in pieces]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def stream(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, set[int]]:
    """Loss of each token of one long text, and the bytes the device held after each step."""
    cache, losses, held = TieredCache(model.config), [], set()
    for start in range(0, TOKENS, STEP):
        end = min(start + STEP, TOKENS)
        logits = model(input_ids=x[:, start:end], past_key_values=cache).logits[0]
        losses.append(F.cross_entropy(logits, x[0, start + 1 : end + 1], reduction="none"))
        held.add(cache.device_bytes())
    return torch.cat(losses), held


@pytest.mark.timeout(3600)
def test_a_primed_model_is_as_good_as_its_source_and_stays_so_for_forty_contexts(tmp_path: Path) -> None:
    source = STORIES["load_model"]()
    ids = np.array(STORIES["encode"](STORIES["STORIES"].read_text()))
    # the text that is measured is not learned
    text = TextIds(ids[30_000:-20_000], ids[-20_000:], 40_000, 1)
    x = torch.from_numpy(np.concatenate([[1], ids[:TOKENS]]))[None]
    recipe = Prime("best:3", sizes={"span_blocks": 0}, align_steps=60)
    settings = FitSettings(steps=30, learning_rate=1e-3)
    report, model = prime(
        source, text, tmp_path, recipe=recipe, settings=settings, lessons=TextLessons(batch_tokens=4096)
    )  # fmt: skip
    known, now = inside(source, x), inside(model, x)
    losses, held = stream(model, x)
    near, middle, far = (float(losses[a:b].mean()) for a, b in ((CONTEXT, FAR), (FAR, 11_000), (FAR, TOKENS)))
    print(
        f"\nlayers {report.layers}; mean loss in nats: source inside {CONTEXT} tokens {known:.4f}; primed {now:.4f}; "
        f"stream {CONTEXT} to {FAR} {near:.4f}, to 11,000 {middle:.4f}, {FAR} to {TOKENS} {far:.4f}"
    )
    assert now <= 1.1 * known
    assert far <= 1.1 * known
    assert far <= 1.05 * near
    assert len(held) == 1
