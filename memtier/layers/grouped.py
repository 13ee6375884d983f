"""Recurrent layers with the heads of grouped attention: H query heads, G of keys and values.

So an attention layer's projections are theirs too: queries read the state (C of Mamba-2), keys and values are written
into it (B and x). Parameters have the names and shapes of the primed hybrids of awslabs/hybrid-model-factory, so their
weights load unchanged. Letters: `memtier.blocks`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from memtier.layers.gated_deltanet import gated_delta_rule
from memtier.layers.mamba2 import Mamba2State
from memtier.layers.norms import RMSNorm
from memtier_kernels import causal_conv1d, gated_rms_norm, ssd

__all__ = ["GroupedGatedDeltaNet", "GroupedMamba2"]

# of the norm behind the recurrence, and of those on what is written and read; the published models have no others
OUTPUT_EPS, QUERY_KEY_EPS = 1e-5, 1e-6


class _Grouped(nn.Module):
    """What both have: sizes, and an empty state. `groups` are G."""

    def __init__(self, heads: int, groups: int, head_dim: int, chunk_tokens: int, conv_size: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim, self.chunk_tokens = heads, groups, head_dim, chunk_tokens
        self.inner, self.shared = heads * head_dim, groups * head_dim
        self.conv_size, self.channels = conv_size, self.inner + 2 * self.shared

    def empty_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        """The state before the first token."""
        full = torch.float64 if dtype == torch.float64 else torch.float32
        return Mamba2State(
            ssm=torch.zeros(batch, self.heads, self.head_dim, self.head_dim, dtype=full, device=device),
            conv=torch.zeros(batch, self.conv_size - 1, self.channels, dtype=dtype, device=device),
            log_decay=torch.zeros(batch, self.heads, dtype=full, device=device),
        )

    def _each_head(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, G * D) -> (B, T, H, D): one of keys or values a query head."""
        return x.unflatten(2, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=2)


class GroupedMamba2(_Grouped):
    """(B, T, E) -> (B, T, E), with the interface and the state of `Mamba2`; a head's state is D x D.

    Args:
        qk_norm: norm each head of what is written and read (B and C), before the convolution.
    """

    def __init__(
        self, hidden_size: int, *, heads: int, groups: int, head_dim: int, conv_size: int, chunk_tokens: int,
        qk_norm: bool,
    ) -> None:  # fmt: skip
        super().__init__(heads, groups, head_dim, chunk_tokens, conv_size)
        self.in_proj = nn.Linear(hidden_size, self.inner + self.channels + heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_size, groups=self.channels)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.B_norm = RMSNorm(head_dim, QUERY_KEY_EPS) if qk_norm else None
        self.C_norm = RMSNorm(head_dim, QUERY_KEY_EPS) if qk_norm else None
        self.norm = RMSNorm(self.inner, OUTPUT_EPS)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)

    def forward(self, h: torch.Tensor, state: Mamba2State | None) -> tuple[torch.Tensor, Mamba2State]:
        gate, x, B, C, dt = self.in_proj(h).split(
            [self.inner, self.shared, self.shared, self.inner, self.heads], dim=-1
        )  # fmt: skip
        if self.B_norm is not None and self.C_norm is not None:
            B = self.B_norm(B.unflatten(2, (self.groups, -1))).flatten(2)
            C = self.C_norm(C.unflatten(2, (self.heads, -1))).flatten(2)
        mixed, tail = causal_conv1d(
            torch.cat([x, B, C], dim=-1), self.conv1d.weight.squeeze(1), self.conv1d.bias,
            tail=None if state is None else state.conv, activation="silu",
        )  # fmt: skip
        x, B, C = mixed.split([self.shared, self.shared, self.inner], dim=-1)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        y, ssm, log_decay = ssd(
            self._each_head(x), dt, -self.A_log.to(wide).exp(), self._each_head(B), C.unflatten(2, (self.heads, -1)),
            D=self.D, state=None if state is None else state.ssm, chunk_tokens=self.chunk_tokens,
        )  # fmt: skip
        # the norm is of each head alone, its weight of all
        flat = (h.shape[0], -1, self.head_dim)
        y = gated_rms_norm(
            y.reshape(flat), gate.reshape(flat), torch.ones_like(self.norm.weight[: self.head_dim]), eps=self.norm.eps
        )
        f = self.out_proj(y.reshape(gate.shape) * self.norm.weight.to(y.dtype))
        return f, Mamba2State(ssm, tail, log_decay, h.shape[1])


class GroupedGatedDeltaNet(_Grouped):
    """(B, T, E) -> (B, T, E), with the interface and the state of `Mamba2`; see `memtier.layers.gated_deltanet`."""

    def __init__(
        self, hidden_size: int, *, heads: int, groups: int, head_dim: int, conv_size: int, chunk_tokens: int,
    ) -> None:  # fmt: skip
        super().__init__(heads, groups, head_dim, chunk_tokens, conv_size)

        def projection(size: int) -> nn.Linear:
            return nn.Linear(hidden_size, size, bias=False)

        def convolution(size: int) -> nn.Conv1d:
            return nn.Conv1d(size, size, conv_size, groups=size, bias=False)

        self.q_proj, self.k_proj, self.v_proj = projection(self.inner), projection(self.shared), projection(self.shared)
        self.b_proj, self.gk_proj, self.g_proj = projection(heads), projection(heads), projection(self.inner)
        self.q_conv1d, self.k_conv1d = convolution(self.inner), convolution(self.shared)
        self.v_conv1d = convolution(self.shared)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.o_norm = RMSNorm(head_dim, OUTPUT_EPS)
        self.o_proj = nn.Linear(self.inner, hidden_size, bias=False)

    def forward(self, h: torch.Tensor, state: Mamba2State | None) -> tuple[torch.Tensor, Mamba2State]:
        weight = torch.cat([c.weight for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]).squeeze(1)
        mixed, tail = causal_conv1d(
            torch.cat([self.q_proj(h), self.k_proj(h), self.v_proj(h)], dim=-1), weight, None,
            tail=None if state is None else state.conv, activation="silu",
        )  # fmt: skip
        q, k, v = mixed.split([self.inner, self.shared, self.shared], dim=-1)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        decay = -self.A_log.to(wide).exp() * F.softplus(self.gk_proj(h).to(wide) + self.dt_bias.to(wide))
        y, ssm, log_decay = gated_delta_rule(
            q.unflatten(2, (self.heads, -1)), self._each_head(k), self._each_head(v), decay,
            self.b_proj(h).to(wide).sigmoid(), state=None if state is None else state.ssm,
            chunk_tokens=self.chunk_tokens,
        )  # fmt: skip
        y = self.o_norm(y.to(h.dtype)) * F.silu(self.g_proj(h).unflatten(2, (self.heads, -1)))
        return self.o_proj(y.flatten(2)), Mamba2State(ssm, tail, log_decay, h.shape[1])
