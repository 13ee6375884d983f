"""A small trained Llama on a stream forty times as long as its context: the loss stays what it is inside it.

Needs ../shared/data, which is no part of the project: stories260K (llama2.c's file format) and a text it can read.
`pytest -m slow -s tests/models/test_stock_stories.py` prints the numbers of docs/worklog.md.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from memtier.cache import TieredCache
from memtier.models.stock import StockReader

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL, VOCABULARY = DATA / "models" / "stories260K.bin", DATA / "models" / "tok512.bin"
STORIES = DATA / "text" / "tinystories.txt"
TOKENS, FAR, CONTEXT, WINDOW = 20_000, 3_000, 512, 224
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.exists() or not MODEL.exists(), reason=f"no development data at {DATA}"),
]


def load_model(path: Path = MODEL) -> LlamaForCausalLM:
    """Weights of a legacy llama2.c checkpoint, whose rotary pairs are (2i, 2i + 1), put into pairs (i, i + D/2)."""
    data = path.read_bytes()
    width, inner, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    assert vocab > 0, "the output head is tied"
    numbers, at = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()), 0
    size = width // heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return numbers[at - count : at].reshape(shape)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(weight.shape[0], -1, size // 2, 2, width).transpose(2, 3).reshape(weight.shape)

    embedding = take(vocab, width)
    parts = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": halves(take(layers, width, width)),
        "self_attn.k_proj": halves(take(layers, kv_heads * size, width)),
        "self_attn.v_proj": take(layers, kv_heads * size, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width),
        "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width),
    }
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(width), "lm_head.weight": embedding}
    weights |= {f"model.layers.{i}.{name}.weight": w[i] for name, w in parts.items() for i in range(layers)}
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size, max_position_embeddings=context,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


def encode(text: str, path: Path = VOCABULARY, vocab: int = 512) -> list[int]:
    """Token ids of a text: characters, then merges, the best-scoring first. No token for the begin of the text."""
    data, at = path.read_bytes(), 4
    scores: dict[bytes, tuple[float, int]] = {}
    for token in range(vocab):
        score, length = struct.unpack_from("<fi", data, at)
        scores.setdefault(data[at + 8 : at + 8 + length], (score, token))
        at += 8 + length
    ids: list[int] = []
    # a merge never crosses the space before a word, so words are merged one by one
    known: dict[str, list[int]] = {}
    for word in _words(" " + text):
        if word not in known:
            known[word] = _merge(word, scores)
        ids += known[word]
    return ids


def _words(text: str) -> list[str]:
    starts = [0, *(i for i in range(1, len(text)) if text[i] == " " and text[i - 1] != " "), len(text)]
    return [text[a:b] for a, b in pairwise(starts) if a < b]


def _merge(word: str, scores: dict[bytes, tuple[float, int]]) -> list[int]:
    pieces: list[bytes] = []
    for character in word:
        raw = character.encode()
        pieces += [raw] if raw in scores else [bytes([byte]) for byte in raw]
    while True:
        neighbours = enumerate(pairwise(pieces))
        pairs = [(scores[a + b][0], -i) for i, (a, b) in neighbours if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    # bytes without a piece of their own are tokens 3 to 258
    return [scores[p][1] if p in scores else p[0] + 3 for p in pieces]


def stream_loss(reader: StockReader, x: torch.Tensor, span_blocks: int) -> tuple[torch.Tensor, set[int]]:
    """Loss of each token of the stream, read 512 at a time, and the bytes the device held after each step."""
    settings = replace(reader.layout.memory_settings(), window_tokens=WINDOW, span_blocks=span_blocks)
    cache = TieredCache(reader.layout, settings=settings)
    losses, held = [], set()
    for start in range(0, TOKENS, 512):
        end = min(start + 512, TOKENS)
        logits = reader(x[:, start:end], cache).logits[0]
        losses.append(F.cross_entropy(logits, x[0, start + 1 : end + 1], reduction="none"))
        held.add(cache.device_bytes())
    return torch.cat(losses), held


@torch.no_grad()
def test_a_trained_model_reads_forty_times_its_context_as_well_as_inside_it():
    model = load_model()
    x = torch.tensor([[1, *encode(STORIES.read_text()[: 4 * TOKENS])]])[:, : TOKENS + 1]
    inside = []
    for start in range(1, TOKENS - CONTEXT, CONTEXT - 1):
        piece = torch.cat([x[:, :1], x[:, start : start + CONTEXT - 1]], dim=1)
        inside.append(float(F.cross_entropy(model(piece).logits[0, :-1], piece[0, 1:])))
    known = sum(inside) / len(inside)
    plain = F.cross_entropy(model(x[:, :FAR]).logits[0, -501:-1], x[0, FAR - 500 : FAR])
    reader = StockReader(model)
    off, off_bytes = stream_loss(reader, x, 0)
    on, on_bytes = stream_loss(reader, x, 4)
    far_off, far_on = float(off[FAR:].mean()), float(on[FAR:].mean())
    print(
        f"\nmean loss in nats: inside {CONTEXT} tokens {known:.4f}; plain transformers, 500 tokens before {FAR} "
        f"{float(plain):.4f}; window {WINDOW}, {FAR} to {TOKENS}: retrieval off {far_off:.4f}, on {far_on:.4f}"
    )
    assert float(plain) > 2 * known
    assert far_off <= 1.03 * known
    assert far_on <= 1.03 * known
    assert far_on <= 1.01 * far_off
    assert len(off_bytes) == len(on_bytes) == 1
