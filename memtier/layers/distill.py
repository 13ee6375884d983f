"""Teaching landmarks: attention over all sealed blocks shows which of them a query needs.

A hard top-K passes no gradient to the choice. While far attention is dense, the share of attention that each block
received is the target of the scores by which blocks will be chosen, a boundary at a time:
``KL(stopgrad(share per block) || softmax(score))``. A block's share is that of the head that wants it most, and
boundaries count by the square of their largest share: with a mean over heads and a weight by the sum, the few
boundaries that need one certain block drowned in running text, which looks a little everywhere. Blocks of the batch's
other sequences compete.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from memtier.blocks import MemorySettings
from memtier.layers.landmarks import block_landmarks, boundary_queries, queries_a_boundary
from memtier.layers.plan import StepPlan
from memtier_kernels import Band, late_interaction

__all__ = ["distillation_loss"]

TARGET_STRIDE = 4


def distillation_loss(
    q_far: torch.Tensor, far: Band, lse: torch.Tensor, queries: torch.Tensor, raw_keys: torch.Tensor,
    innovation: torch.Tensor | None, plan: StepPlan,
) -> torch.Tensor:  # fmt: skip
    """The loss of one layer, a scalar.

    Args:
        q_far: (B, T, H, D), as they met the far keys; far: the dense far source; lse: (B, T, H) of the whole read-out.
        queries: of `search_queries`.
        raw_keys: (B, T, G, D), before rotary; innovation: (B, T), or None.
    """
    settings: MemorySettings = plan.settings
    block, count = settings.span_block_tokens, plan.sealed_to
    used = slice(0, count * block)
    with torch.no_grad():
        # every fourth token tells enough of what its group needs
        taken = slice(None, None, TARGET_STRIDE)
        mass = _block_mass(q_far[:, taken], far.k[:, used], far.start[taken], far.end[taken], lse[:, taken], block)
        rows, group = len(plan.boundaries), plan.group[taken]
        by_group = mass.new_zeros(mass.shape[0], rows, count).index_add_(1, group, mass)
        told = mass.new_zeros(rows).index_add_(0, group, torch.ones_like(group, dtype=mass.dtype))
        by_group = by_group / told.clamp(min=1)[:, None]
        # squares, so that what counts is a clear need of few blocks: running text looks a little everywhere
        target = by_group.square()
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-12)
        weight = by_group.amax(-1).square()
    surprise = None if innovation is None else innovation[:, used].unflatten(1, (count, block))
    marks = block_landmarks(
        raw_keys[:, used].unflatten(1, (count, block)).to(queries.dtype), surprise, settings.landmark_keys,
        settings.landmark_kind,
    )  # fmt: skip
    log_p = _log_choice(boundary_queries(plan, queries, None).to(marks.dtype), marks, plan)
    kl = F.kl_div(log_p, target.to(log_p.dtype), reduction="none").sum(-1)
    return (weight * kl).sum() / weight.sum().clamp(min=1e-9)


def _log_choice(queries: torch.Tensor, marks: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """(B, R, n): log-probability of each block of the own sequence, the blocks of the whole batch competing.

    A store holds far more blocks than a training sequence; those of the other sequences stand in for them. With several
    keys a block, each head has its own choice, as in `memtier.layers.landmarks.settle`; here their mean is taught.
    """
    batch, count = marks.shape[:2]
    with torch.autocast(queries.device.type, enabled=False):
        if plan.settings.landmark_keys:
            # at the scale of attention, whose own keys these are
            scores = (
                late_interaction(queries.flatten(0, 1)[None], marks.flatten(0, 1)[None])[0] * queries.shape[-1] ** -0.5
            )
        else:
            # of several queries a boundary the best counts
            scores = queries.flatten(0, 1) @ marks.flatten(0, 1).T
            scores = scores.unflatten(0, (-1, queries_a_boundary(plan.settings))).amax(1, keepdim=True)
        scores = scores.float().unflatten(0, (batch, -1)).unflatten(-1, (batch, count))
    seen = torch.arange(count, device=scores.device) < plan.visible_row[:, None]
    own = torch.eye(batch, dtype=torch.bool, device=scores.device)[:, None, None, :, None]
    competing = torch.where(own, seen[None, :, None, None, :], True)
    total = scores.masked_fill(~competing, -1e9).flatten(3).logsumexp(-1)
    log_p = scores[torch.arange(batch), :, :, torch.arange(batch)] - total[..., None]
    heads = log_p.shape[2]
    return (log_p.logsumexp(2) - math.log(heads)).masked_fill(~seen, -1e9)


def _block_mass(
    q: torch.Tensor, keys: torch.Tensor, start: torch.Tensor, end: torch.Tensor, lse: torch.Tensor, block: int
) -> torch.Tensor:
    """(B, T, n): the share of each token's softmax that went to each block, in the head that gave it most."""
    batch, tokens, heads, size = q.shape
    kv_heads, n = keys.shape[2], keys.shape[1] // block
    index = torch.arange(keys.shape[1], device=q.device)
    hidden = (index < start[:, None]) | (index >= end[:, None])
    out = lse.new_zeros(batch, tokens, n)
    repeat = heads // kv_heads
    for head in range(heads):
        scores = (q[:, :, head] * size**-0.5) @ keys[:, :, head // repeat].transpose(1, 2)
        share = (scores.to(lse.dtype) - lse[:, :, head, None]).exp().masked_fill(hidden, 0.0)
        out = torch.maximum(out, share.unflatten(-1, (n, block)).sum(-1))
    return out
