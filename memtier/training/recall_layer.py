"""Which attention layer learned to recall: its memory is the one worth keeping.

Recall begins inside the window, where every attention layer can learn it, and which of them does differs from run to
run. A memory in another layer is never asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.corpus import Corpus
from memtier.training.levels import LEVELS
from memtier.training.tasks import ANSWER, fact_sequence

__all__ = ["recall_by_layer"]

# short sentences, a stretch of book text, questions: what is being learned when the layer is chosen
_LEVEL = 4


@torch.no_grad()
def recall_by_layer(
    model: BMojoForCausalLM, corpus: Corpus, *, layers: Sequence[int], seed: int = 0, sequence_tokens: int = 512,
    sequences: int = 8,
) -> dict[int, float]:  # fmt: skip
    """For each layer the mean probability of the right digit with the memory, all of it, in that layer alone.

    Only answers count whose code left the window; 0 if there is none.

    Args:
        layers: attention layers of the model.
        seed: of the sequences, whose names and text are those of training.
    """
    rows = [
        fact_sequence(corpus, LEVELS[_LEVEL], sequence_tokens, random.Random(f"recall/{seed}/{i}"))
        for i in range(sequences)
    ]
    tokens, kinds, distance = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
    settings = model.config.memory_settings()
    far = (kinds == ANSWER) & (distance > settings.window_tokens + settings.span_block_tokens)
    tokens, was_training = tokens.to(model.device), model.training
    model.eval()
    found = {}
    for layer in layers:
        alone = replace(settings, memory_layers=(layer,))
        hidden, _ = model.model(model.model.embed_tokens(tokens), None, (), "dense", alone)
        likely = model.lm_head(hidden)[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        found[layer] = float(likely.cpu()[far[:, 1:]].double().mean()) if bool(far.any()) else 0.0
    model.train(was_training)
    return found
