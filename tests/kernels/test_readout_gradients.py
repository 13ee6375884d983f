"""The gradients of the merged read-out are those of finite differences, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from memtier_kernels import Band, Paged, span_attention
from memtier_kernels.testing import make_inputs

SOURCES = ("window", "fading", "sinks", "eidetic", "span")
SIZES = {"B": 1, "T": 5, "H": 2, "G": 1, "D": 4, "W": 3, "S": 2, "K": 2, "blocks": 3, "M": 2, "r": 2, "sinks": 1}


@pytest.mark.parametrize("absent", [(), ("window",), ("fading", "eidetic"), ("span", "sinks")])
def test_gradients_of_output_log_sum_exp_and_parts_are_finite_differences(absent):
    drawn: dict[str, Any] = make_inputs("span_attention", seed=3, dtype=torch.float64, device="cpu", **SIZES)
    present = [name for name in SOURCES if name not in absent]

    def read(q: torch.Tensor, q_far: torch.Tensor, *kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sources: dict[str, Band | Paged] = {
            name: replace(drawn[name], k=kv[2 * i], v=kv[2 * i + 1]) for i, name in enumerate(present)
        }
        result = span_attention(q, q_far=q_far, group=drawn["group"], impl="reference", **sources)
        # the log-sum-exp of a row that sees nothing of a source is -inf, and has no gradient
        finite = [x.masked_fill(~x.isfinite(), 0.0) for x in (result.lse, *result.parts.values())]
        return result.out, *finite

    leaves = [drawn["q"], drawn["q_far"], *(x for name in present for x in (drawn[name].k, drawn[name].v))]
    assert all(x.requires_grad and x.dtype == torch.float64 for x in leaves)
    assert torch.autograd.gradcheck(read, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=False)
