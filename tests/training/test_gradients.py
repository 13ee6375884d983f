"""Gradients of a lesson: what gradient checkpointing must not change, and what truncated back-propagation may."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from memtier.cache import TieredCache
from memtier.layers.records import flatten
from memtier.models.bmojo import BMojoForCausalLM
from memtier.testing import tiny_model
from memtier.training import gradients as training_gradients
from memtier.training.course import Lesson
from memtier.training.fit_settings import FitSettings
from memtier.training.gradients import backward
from memtier.training.objective import NO_TARGET, Losses, read_losses

TOKENS, PIECE = 90, 26
PLAIN = FitSettings(precision="float32")
PIECES = replace(PLAIN, piece_tokens=PIECE)
MODELS = {
    "all-memories": {},
    "sinks": {"sink_tokens": 2},
    "landmark-keys": {"landmark_keys": 2},
    "gated-deltanet": {"fading": "gated_deltanet", "layer_types": ["gated_deltanet", "bmojo", "bmojo"]},
    "no-span": {"memory_layers": []},
    "no-eidetic": {"eidetic_tokens": 0},
    "window": {"layer_types": ["sliding_attention"] * 3, "memory_layers": [], "eidetic_tokens": 0},
}


def make(**overrides: Any) -> BMojoForCausalLM:
    return tiny_model(dtype=torch.float64, storage_dtype="float64", qk_norm=True, **overrides).train()


def lesson(model: BMojoForCausalLM, *, dense: bool = False, rows: int = 2) -> Lesson:
    text = np.random.default_rng(0).integers(0, 256, (rows, TOKENS + 1))
    # what comes again can be retrieved
    text[:, 60:80] = text[:, 5:25]
    targets = text[:, 1:].copy()
    targets[0, 30:50] = NO_TARGET
    return Lesson(text[:, :-1].copy(), targets, model.config.memory_settings(), dense)


def gradients(model: BMojoForCausalLM, made: Lesson, settings: FitSettings) -> tuple[Losses, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = backward(model, made, settings)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [PLAIN, PIECES], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(name: str, settings: FitSettings) -> None:
    model = make(**MODELS[name])
    made = lesson(model)
    loss, plain = gradients(model, made, settings)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again, checkpointed = gradients(model, made, settings)
    assert torch.equal(loss.tokens, again.tokens)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[key]), key


def test_gradient_checkpointing_changes_no_gradient_of_dense_far_attention() -> None:
    model = make()
    _, plain = gradients(model, lesson(model, dense=True), PLAIN)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    _, checkpointed = gradients(model, lesson(model, dense=True), PLAIN)
    for key, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[key]), key


def test_gradient_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for wanted in (False, True):
        model = make()
        if wanted:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        made = lesson(model)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            read_losses(model, torch.from_numpy(made.tokens), torch.from_numpy(made.targets))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("name", MODELS)
def test_one_piece_has_the_gradients_of_the_whole(name: str) -> None:
    model = make(**MODELS[name])
    made = lesson(model)
    _, whole = gradients(model, made, PLAIN)
    model.zero_grad()
    cache = TieredCache(model.config, batch_size=2, dtype=torch.float64)
    losses = read_losses(model, torch.from_numpy(made.tokens), torch.from_numpy(made.targets), cache=cache)
    losses.total(model.config).backward()
    for key, gradient in whole.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("piece", [3, 16, PIECE, 64])
def test_the_losses_of_the_pieces_sum_to_that_of_the_whole(piece: int) -> None:
    model = make(sink_tokens=2)
    made = lesson(model)
    whole, _ = gradients(model, made, PLAIN)
    pieces, _ = gradients(model, made, replace(PLAIN, piece_tokens=piece))
    torch.testing.assert_close(pieces.tokens, whole.tokens, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(pieces.innovation, whole.innovation, rtol=1e-9, atol=1e-11)


def test_what_is_used_within_a_token_has_the_whole_gradient_and_what_is_carried_does_not() -> None:
    model = make(tie_word_embeddings=False, innovation_loss_weight=0.0)
    made = lesson(model)
    _, whole = gradients(model, made, PLAIN)
    _, pieces = gradients(model, made, PIECES)
    last = "model.layers.2."
    # after the last mixing of tokens, and its queries: their path to the loss never leaves the piece
    local = ("lm_head.weight", "model.norm.weight", f"{last}mlp.", f"{last}mlp_norm.", f"{last}mixer.o_proj.",
             f"{last}mixer.q_proj.", f"{last}mixer.q_norm.")  # fmt: skip
    carried = [f"{last}mixer.k_proj.weight", f"{last}mixer.v_proj.weight", f"{last}mixer.fading.in_proj.weight",
               "model.layers.0.mixer.in_proj.weight", "model.embed_tokens.weight"]  # fmt: skip
    for key in (k for k in whole if k.startswith(local)):
        torch.testing.assert_close(pieces[key], whole[key], rtol=1e-8, atol=1e-11, msg=key)
    for key in carried:
        difference = (pieces[key] - whole[key]).norm() / whole[key].norm()
        assert 1e-3 < difference < 1.0, (key, float(difference))


def test_pieces_have_the_gradient_of_a_whole_whose_carried_memory_is_held_fixed() -> None:
    """By finite differences: memory made with the old weights, the piece read with the new."""
    # the target of the innovation loss is held fixed on purpose
    model = make(sink_tokens=2, innovation_loss_weight=0.0)
    made = lesson(model, rows=1)
    tokens, targets = torch.from_numpy(made.tokens), torch.from_numpy(made.targets)
    weight = dict(model.named_parameters())["model.layers.1.mixer.v_proj.weight"]
    cache = TieredCache(model.config, dtype=torch.float64)
    with torch.no_grad():
        read_losses(model, tokens[:, :PIECE], targets[:, :PIECE], cache=cache)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def second_piece() -> torch.Tensor:
        copy = cache.clone(_copied(cache))
        part = slice(PIECE, 2 * PIECE)
        return read_losses(model, tokens[:, part], targets[:, part], cache=copy).total(model.config)

    [gradient] = torch.autograd.grad(second_piece(), weight)
    moved = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            weight += step * direction
            moved.append(float(second_piece()))
        weight += 1e-6 * direction
    assert float((gradient * direction).sum()) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4)


def _copied(cache: TieredCache) -> Any:
    from copy import copy

    selector = copy(cache.selector)
    selector._blocks = dict(selector._blocks)  # pyright: ignore[reportAttributeAccessIssue]
    return selector


def test_nothing_carried_holds_on_to_the_past() -> None:
    model = make()
    made = lesson(model)
    cache = TieredCache(model.config, batch_size=2, dtype=torch.float64)
    for start in (0, 45):
        part = torch.from_numpy(made.tokens[:, start : start + 45])
        read_losses(model, part, torch.from_numpy(made.targets[:, start : start + 45]), cache=cache).tokens.backward()
        held = [t for state in cache.states for _, t in flatten(state)]
        held += [t for blocks in cache.selector._blocks.values() for t in blocks]  # pyright: ignore[reportAttributeAccessIssue]
        assert any(tensor.requires_grad for tensor in held)
        cache.detach()
        held = [t for state in cache.states for _, t in flatten(state)]
        held += [t for blocks in cache.selector._blocks.values() for t in blocks]  # pyright: ignore[reportAttributeAccessIssue]
        assert not any(tensor.requires_grad for tensor in held)


def test_the_graph_of_a_piece_is_gone_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = make(), []

    def reading(*arguments: Any, **options: Any) -> Losses:
        assert all(graph() is None for graph in graphs)
        losses = read_losses(*arguments, **options)
        graphs.append(weakref.ref(losses.tokens))
        return losses

    monkeypatch.setattr(training_gradients, "read_losses", reading)
    told = backward(model, lesson(model), PIECES)
    assert len(graphs) == 4
    assert not told.tokens.requires_grad
