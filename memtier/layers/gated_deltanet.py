"""Fading memory: the Gated DeltaNet layer (Yang, Kautz and Hatamizadeh 2024), continuing from a carried state.

Parameters have the names, shapes and order of transformers' Qwen3NextGatedDeltaNet, so weights move between the two
unchanged. A state that forgets by a rule: before a key's new value is written, what the state would answer to that key
is taken out: ``S_t = S_{t-1} e^{g_t} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T``, ``y_t = S_t q_t``.

Letters: `memtier.blocks`; J value heads, P their size, N the size of a key, Q tokens of a chunk, c chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from memtier.layers.mamba2 import Mamba2State
from memtier.layers.norms import RMSNorm
from memtier_kernels import causal_conv1d

__all__ = ["GatedDeltaNet", "gated_delta_rule", "gated_delta_rule_recurrent"]


class GatedDeltaNet(nn.Module):
    """f = SSM(h): (B, T, E) -> (B, T, E), with the interface and the state record of `Mamba2`.

    Args:
        groups: key heads, each shared by heads / groups value heads.
    """

    def __init__(
        self, hidden_size: int, *, expand: int, head_dim: int, state_size: int, groups: int, conv_size: int,
        chunk_tokens: int, eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner = expand * hidden_size
        self.head_dim, self.state_size, self.groups, self.chunk_tokens = head_dim, state_size, groups, chunk_tokens
        self.heads = self.inner // head_dim
        self.channels = 2 * groups * state_size + self.inner
        self.in_proj_qkvz = nn.Linear(hidden_size, self.channels + self.inner, bias=False)
        self.in_proj_ba = nn.Linear(hidden_size, 2 * self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_size, groups=self.channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.heads + 1, dtype=torch.float32)))
        self.norm = RMSNorm(head_dim, eps)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)

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
        # the projections interleave by key head: its q, its k, the v and the gates of its value heads
        shared = self.heads // self.groups
        q, k, v, gate = (
            self.in_proj_qkvz(h)
            .unflatten(2, (self.groups, -1))
            .split([self.state_size, self.state_size, shared * self.head_dim, shared * self.head_dim], dim=-1)
        )
        b, a = self.in_proj_ba(h).unflatten(2, (self.groups, -1)).split([shared, shared], dim=-1)
        mixed, tail = causal_conv1d(
            torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1), self.conv1d.weight.squeeze(1), None,
            tail=None if state is None else state.conv, activation="silu",
        )  # fmt: skip
        keys = self.groups * self.state_size
        q, k, v = mixed.split([keys, keys, self.inner], dim=-1)
        # decays are kept out of 16 bits: a sum of them loses the far end of the memory
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        decay = -self.A_log.to(wide).exp() * F.softplus(a.flatten(2).to(wide) + self.dt_bias.to(wide))
        y, S, log_decay = gated_delta_rule(
            q.unflatten(2, (self.groups, -1)), k.unflatten(2, (self.groups, -1)), v.unflatten(2, (self.heads, -1)),
            decay, b.flatten(2).to(wide).sigmoid(), state=None if state is None else state.ssm,
            chunk_tokens=self.chunk_tokens,
        )  # fmt: skip
        y = self.norm(y.to(h.dtype)) * F.silu(gate.reshape(batch, tokens, self.heads, self.head_dim))
        return self.out_proj(y.flatten(2)), Mamba2State(S, tail, log_decay, tokens)


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, *,
    state: torch.Tensor | None = None, chunk_tokens: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The recurrence of the module's docstring, a chunk at a time, in float32 (float64 for float64 inputs).

    Inside a chunk the writes are those of a triangular system: what token i writes is its value less what the state
    before the chunk, and the writes before i, answer to its key (the WY form, Yang et al. 2024, section 3).

    Args:
        q, k: (B, T, groups, N); each is brought to length 1, and q scaled by N^-1/2.
        v: (B, T, J, P), J a multiple of groups.
        decay: (B, T, J), at most 0; beta: (B, T, J), in [0, 1].
        state: (B, J, P, N) before the first token; None for zeros.

    Returns:
        y (B, T, J, P), the state after the last token (B, J, P, N), and the sum of the decays (B, J).
    """
    if v.shape[1] == 1:
        return gated_delta_rule_recurrent(q, k, v, decay, beta, state=state)
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, decay, beta, S = _prepared(q, k, v, decay, beta, state)
        tokens, Q = v.shape[2], min(chunk_tokens, v.shape[2])
        # a padded token has beta = 0 and decay = 0: it neither writes nor decays
        pad = -tokens % Q
        q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, Q)) for x in (q, k, v))
        decay, beta = (F.pad(x, (0, pad)).unflatten(2, (-1, Q)) for x in (decay, beta))
        cum = decay.cumsum(-1)
        above = torch.ones(Q, Q, dtype=torch.bool, device=v.device).triu(1)
        between = (cum[..., :, None] - cum[..., None, :]).masked_fill(above, float("-inf")).exp()
        system = beta[..., None] * (k @ k.transpose(-1, -2)) * between
        right = torch.cat([beta[..., None] * v, (beta * cum.exp())[..., None] * k], dim=-1)
        # the diagonal is taken for ones
        written, read = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
            [v.shape[-1], k.shape[-1]], dim=-1
        )
        inside = (q @ k.transpose(-1, -2)) * between
        q = q * cum.exp()[..., None]
        k = k * (cum[..., -1:] - cum).exp()[..., None]
        outputs = []
        for c in range(v.shape[2]):
            new = written[:, :, c] - read[:, :, c] @ S.transpose(-1, -2)
            outputs.append(q[:, :, c] @ S.transpose(-1, -2) + inside[:, :, c] @ new)
            S = cum[:, :, c, -1, None, None].exp() * S + new.transpose(-1, -2) @ k[:, :, c]
        y = torch.cat(outputs, dim=2)[:, :, :tokens].transpose(1, 2)
        return y, S, cum[..., -1].sum(-1)


def gated_delta_rule_recurrent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, *,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The definition, token by token: what `gated_delta_rule` is tested against, and its step for one token."""
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, decay, beta, S = _prepared(q, k, v, decay, beta, state)
        outputs = []
        for t in range(v.shape[2]):
            S = decay[:, :, t, None, None].exp() * S
            answer = S @ k[:, :, t, :, None]
            new = beta[:, :, t, None, None] * (v[:, :, t, :, None] - answer)
            S = S + new * k[:, :, t, None, :]
            outputs.append((S @ q[:, :, t, :, None]).squeeze(-1))
        return torch.stack(outputs, dim=1), S, decay.sum(-1)


def _prepared(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Heads before tokens, one key head a value head, unit keys, wide numbers, and a state to begin with."""
    full = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, decay, beta = (x.to(full).transpose(1, 2) for x in (q, k, v, decay, beta))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    repeat = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(repeat, dim=1) for x in (q * q.shape[-1] ** -0.5, k))
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[1], v.shape[-1], k.shape[-1])
    return q, k, v, decay, beta, state.to(full)
