"""Plain torch: chunks as batched matrix products, chunk states passed on by one small matrix a head.

Log decays, their sums and the states are float32 (or float64) whatever the inputs are, also under autocast: sums of
decays in 16 bits lose the far end of the memory. Letters: c chunks, Q tokens a chunk, J heads a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memtier_kernels.dispatch import compute_dtype

__all__ = ["ssd", "ssd_recurrent"]


def ssd_recurrent(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, token by token: what `ssd` is tested against, and the step used for T = 1."""
    batch, tokens, heads, head = x.shape
    full = compute_dtype(x.dtype)
    repeat = heads // B.shape[2]
    S = x.new_zeros(batch, heads, head, B.shape[3], dtype=full) if state is None else state
    a = dt.to(full) * A.to(full)
    outputs = []
    for t in range(tokens):
        B_BHN = B[:, t].to(full).repeat_interleave(repeat, dim=1)
        C_BHN = C[:, t].to(full).repeat_interleave(repeat, dim=1)
        x_BHP = x[:, t].to(full)
        S = a[:, t].exp()[..., None, None] * S + (dt[:, t].to(full)[..., None] * x_BHP)[..., None] * B_BHN[:, :, None]
        y_BHP = (S @ C_BHN[..., None]).squeeze(-1)
        outputs.append(y_BHP if D is None else y_BHP + D.to(full)[:, None] * x_BHP)
    return torch.stack(outputs, dim=1).to(x.dtype), S, a.sum(1)


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor | None,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `memtier_kernels.ssd`."""
    batch, tokens, heads, head = x.shape
    if tokens == 1:
        return ssd_recurrent(x, dt, A, B, C, D, state)
    full = compute_dtype(x.dtype)
    groups, size = B.shape[2], B.shape[3]
    J, Q = heads // groups, min(chunk_tokens, tokens)
    # a padded token has dt = 0: it neither decays the state nor adds to it
    pad = -tokens % Q
    a = dt.to(full) * A.to(full)
    X = x * dt.to(x.dtype)[..., None]
    if pad:
        a, X = F.pad(a, (0, 0, 0, pad)), F.pad(X, (0, 0, 0, 0, 0, pad))
        B, C = F.pad(B, (0, 0, 0, 0, 0, pad)), F.pad(C, (0, 0, 0, 0, 0, pad))
    c = (tokens + pad) // Q
    X_cgJQP = X.reshape(batch, c, Q, groups, J, head).permute(0, 1, 3, 4, 2, 5)
    B_cgQN = B.reshape(batch, c, Q, groups, size).transpose(2, 3)
    C_cgQN = C.reshape(batch, c, Q, groups, size).transpose(2, 3)
    cum_cgJQ = a.reshape(batch, c, Q, groups, J).permute(0, 1, 3, 4, 2).cumsum(-1)
    total_cgJ = cum_cgJQ[..., -1]

    # diagonal blocks: what a token gets from its own chunk; the log decay is masked before exp, so nothing overflows
    above = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (cum_cgJQ[..., :, None] - cum_cgJQ[..., None, :]).masked_fill(above, float("-inf")).exp()
    weight = (C_cgQN @ B_cgQN.transpose(-1, -2))[:, :, :, None] * decay.to(X.dtype)
    Y = weight.to(X.dtype) @ X_cgJQP

    # what each chunk adds to the state
    to_end = (total_cgJ[..., None] - cum_cgJQ).exp().to(X.dtype)
    added = (X_cgJQP * to_end[..., None]).transpose(-1, -2) @ B_cgQN[:, :, :, None].to(X.dtype)
    added = added.to(full)

    # states at the chunk boundaries: one (c + 1, c + 1) lower-triangular decay matrix a head
    if state is None:
        first = added.new_zeros(batch, 1, groups, J, head, size)
    else:
        first = state.to(full).reshape(batch, 1, groups, J, head, size)
    # sums from chunk to chunk are taken one by one: differences of one long sum would lose a slow stretch after a
    # fast one
    steps = F.pad(total_cgJ.permute(0, 2, 3, 1), (1, 0))
    later = torch.ones(c + 1, c + 1, dtype=torch.bool, device=x.device).tril(-1)
    between = steps[..., :, None].masked_fill(~later, 0.0).cumsum(-2).exp().tril()
    with torch.autocast(x.device.type, enabled=False):
        states = torch.einsum("bgjzc,bcgjpn->bzgjpn", between, torch.cat([first, added], dim=1))
    before, last = states[:, :-1], states[:, -1]

    # off-diagonal: what a token gets from all chunks before its own
    off = C_cgQN[:, :, :, None].to(X.dtype) @ before.to(X.dtype).transpose(-1, -2)
    Y = Y + off * cum_cgJQ.exp().to(X.dtype)[..., None]

    y = Y.permute(0, 1, 4, 2, 3, 5).reshape(batch, c * Q, heads, head)[:, :tokens].to(x.dtype)
    if D is not None:
        y = y + D.to(x.dtype)[:, None] * x
    # the last state must not keep the states of all chunks alive
    return y, last.reshape(batch, heads, head, size).clone(), a.sum(1)
