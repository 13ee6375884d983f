"""Fading memory: the Mamba-2 layer (Dao and Gu 2024), continuing from a carried state.

Parameters have the names and shapes of transformers' Mamba2Mixer, so weights move between the two unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memtier.layers.norms import GatedRMSNorm
from memtier_kernels import causal_conv1d, ssd

__all__ = ["Mamba2", "Mamba2State"]


@dataclass(frozen=True)
class Mamba2State:
    """What the layer carries: `ssm` (B, heads, P, N) in float32 or float64, `conv` (B, width - 1, channels).

    `log_decay` (B, heads) is the total of the last step, `log_decay_tokens` its length: they tell the half-life.
    """

    ssm: torch.Tensor
    conv: torch.Tensor
    log_decay: torch.Tensor
    log_decay_tokens: int = 0


class Mamba2(nn.Module):
    """f = SSM(h): (B, T, E) -> (B, T, E); f_t is a function of h_{<=t} and of the carried state."""

    def __init__(
        self, hidden_size: int, *, expand: int, head_dim: int, state_size: int, groups: int, conv_size: int,
        chunk_tokens: int, eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner = expand * hidden_size
        self.head_dim, self.state_size, self.groups, self.chunk_tokens = head_dim, state_size, groups, chunk_tokens
        self.heads = self.inner // head_dim
        self.channels = self.inner + 2 * groups * state_size
        self.in_proj = nn.Linear(hidden_size, self.inner + self.channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_size, groups=self.channels)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.inner, eps)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)

    @staticmethod
    def initial_ssm(heads: int, *, dt_min: float = 1e-3, dt_max: float = 0.1) -> dict[str, torch.Tensor]:
        """Initial decays of Mamba-2: A spread over [1, 16], step sizes log-uniform over [dt_min, dt_max]."""
        dt = (torch.rand(heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).exp()
        # dt_bias is the inverse of softplus, so that softplus(dt_bias) = dt
        return {
            "A_log": torch.empty(heads).uniform_(1, 16).log(),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "D": torch.ones(heads),
        }

    def empty_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        """The state before the first token."""
        full = torch.float64 if dtype == torch.float64 else torch.float32
        width = self.conv1d.kernel_size[0]
        return Mamba2State(
            ssm=torch.zeros(batch, self.heads, self.head_dim, self.state_size, dtype=full, device=device),
            conv=torch.zeros(batch, width - 1, self.channels, dtype=dtype, device=device),
            log_decay=torch.zeros(batch, self.heads, dtype=full, device=device),
        )

    def forward(self, h: torch.Tensor, state: Mamba2State | None) -> tuple[torch.Tensor, Mamba2State]:
        batch, tokens, _ = h.shape
        gate, mixed, dt = self.in_proj(h).split([self.inner, self.channels, self.heads], dim=-1)
        mixed, tail = causal_conv1d(
            mixed, self.conv1d.weight.squeeze(1), self.conv1d.bias, tail=None if state is None else state.conv,
            activation="silu",
        )  # fmt: skip
        size = self.groups * self.state_size
        x, B, C = mixed.split([self.inner, size, size], dim=-1)
        # decays are kept out of 16 bits: a sum of them loses the far end of the memory
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        y, ssm, log_decay = ssd(
            x.reshape(batch, tokens, self.heads, self.head_dim), dt, -self.A_log.to(wide).exp(),
            B.reshape(batch, tokens, self.groups, -1), C.reshape(batch, tokens, self.groups, -1),
            D=self.D, state=None if state is None else state.ssm, chunk_tokens=self.chunk_tokens,
        )  # fmt: skip
        f = self.out_proj(self.norm(y.reshape(batch, tokens, self.inner), gate))
        return f, Mamba2State(ssm, tail, log_decay, tokens)
