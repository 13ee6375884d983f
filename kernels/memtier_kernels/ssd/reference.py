"""Plain torch: chunks as batched matrix products, the state passed on from chunk to chunk.

Log decays, their sums and the states are float32 (or float64) whatever the inputs are; matrix products have x's dtype,
also under autocast. Letters: c chunks, Q tokens a chunk, G groups, J heads a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from memtier_kernels.dispatch import compute_dtype

__all__ = ["ssd", "ssd_recurrent"]

# longer chunks do not pay on a CPU: their work grows with the length
_LARGEST_CHUNK = 32
# exp of less is as good as 0, and on a CPU arithmetic near the smallest numbers is many times slower
_SMALLEST_LOG = -60.0


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
    cu_seqlens: torch.Tensor | None,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `memtier_kernels.ssd`."""
    if cu_seqlens is not None:
        return _packed(x, dt, A, B, C, D, state, cu_seqlens, chunk_tokens)
    batch, tokens, heads, head = x.shape
    if tokens == 1:
        return ssd_recurrent(x, dt, A, B, C, D, state)
    Q = _chunk(chunk_tokens, tokens)
    c = max(1, -(-tokens // Q))
    # a padded token has dt = 0: it neither decays the state nor adds to it
    padded = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, c * Q - tokens)) if c * Q > tokens else t for t in (x, dt, B, C)]
    x_cQ, dt_cQ, B_cQ, C_cQ = (t.reshape(batch, c, Q, *t.shape[2:]) for t in padded)
    full = compute_dtype(x.dtype)
    first = x.new_zeros(batch, heads, head, B.shape[3], dtype=full) if state is None else state.to(full)
    Y, last, totals = _chunks(x_cQ, dt_cQ, A, B_cQ, C_cQ, D, first, None)
    return Y.reshape(batch, c * Q, heads, head)[:, :tokens], last, totals.sum(1)


@dataclass(frozen=True)
class _Packing:
    """For packed sequences: each chunk's sequence (n for a chunk left over), and whether it is its sequence's first."""

    sequence: torch.Tensor
    begins: torch.Tensor


def _packed(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences one after another, each cut into chunks of its own; no shape depends on where they begin."""
    _, tokens, heads, head = x.shape
    cu = cu_seqlens.to(torch.int64)
    n = cu.shape[0] - 1
    Q = _chunk(chunk_tokens, tokens)
    # a sequence has one chunk at least, and at most one more than whole ones
    c = tokens // Q + n
    counts = ((cu.diff() + Q - 1) // Q).clamp(min=1)
    ends = counts.cumsum(0)
    chunk = torch.arange(c, device=x.device)
    sequence = torch.searchsorted(ends, chunk, right=True)
    # one row more, for the chunks left over
    begin, end = F.pad((ends - counts), (0, 1)), F.pad(cu[1:], (0, 1))
    start = F.pad(cu[:-1], (0, 1))[sequence] + (chunk - begin[sequence]) * Q
    token = start[:, None] + torch.arange(Q, device=x.device)
    # past the end of a sequence a row of zeros is read
    token = torch.where(token < end[sequence][:, None], token, tokens)
    x_cQ, dt_cQ, B_cQ, C_cQ = (F.pad(t[0], (0, 0) * (t.ndim - 2) + (0, 1))[token][None] for t in (x, dt, B, C))
    full = compute_dtype(x.dtype)
    first = x.new_zeros(n, heads, head, B.shape[3], dtype=full) if state is None else state.to(full)
    Y, last, totals = _chunks(x_cQ, dt_cQ, A, B_cQ, C_cQ, D, first, _Packing(sequence, chunk == begin[sequence]))
    # where each token went
    place = Y.new_zeros(tokens + 1, dtype=torch.int64).scatter(0, token.flatten(), torch.arange(c * Q, device=x.device))
    y = Y.reshape(c * Q, heads, head)[place[:tokens]][None]
    log_decay = totals.new_zeros(n + 1, heads).index_add(0, sequence, totals[0])
    return y, last, log_decay[:n]


def _chunk(chunk_tokens: int, tokens: int) -> int:
    return max(1, min(chunk_tokens, _LARGEST_CHUNK, tokens))


def _exp_(log: torch.Tensor) -> torch.Tensor:
    """exp in place, 0 for what is as good as 0."""
    return torch.threshold_(log, _SMALLEST_LOG, float("-inf")).exp_()


def _chunks(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    first: torch.Tensor,
    packing: _Packing | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scan of inputs cut into chunks, (b, c, Q, ...), from the states `first` (sequences, H, P, N).

    Returns:
        y (b, c, Q, H, P); the last states; the sum of log decays of each chunk (b, c, H).
    """
    b, c, Q, H, P = x.shape
    G, N = B.shape[3:]
    J, full = H // G, first.dtype
    with torch.autocast(x.device.type, enabled=False):
        dt = dt.to(full)
        # Summed in float64 and kept as two numbers: a slow stretch after a fast one lives in the difference of two
        # large sums.
        exact = (dt.double() * A.double()).cumsum(2)
        sums = exact.to(full)
        rest = (exact.detach() - sums.detach().double()).to(full)

        # within a chunk: the log decay is masked before exp, so nothing overflows
        sums_bcHQ, rest_bcHQ = sums.transpose(2, 3).contiguous(), rest.transpose(2, 3).contiguous()
        decay = sums_bcHQ[..., :, None] - sums_bcHQ[..., None, :]
        decay.add_(rest_bcHQ[..., :, None]).sub_(rest_bcHQ[..., None, :])
        decay.masked_fill_(torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        decay = _exp_(decay).view(b, c, G, J, Q, Q)
        B_cGQN, C_cGQN = B.to(x.dtype).transpose(2, 3), C.to(x.dtype).transpose(2, 3)
        weight = decay * (C_cGQN @ B_cGQN.transpose(-1, -2))[:, :, :, None]
        weight = weight * dt.transpose(2, 3).reshape(b, c, G, J, 1, Q)
        if D is not None:
            weight.diagonal(dim1=-2, dim2=-1).add_(D.to(full).view(G, J, 1))
        Y = (weight.to(x.dtype).view(b, c, H, Q, Q) @ x.transpose(2, 3)).transpose(2, 3)

        # from chunk to chunk
        to_end = _exp_((sums[:, :, -1:] - sums) + (rest[:, :, -1:] - rest)) * dt
        x_cGQJP = (x * to_end.to(x.dtype)[..., None]).reshape(b, c, Q, G, J * P).transpose(2, 3)
        since_begin = _exp_(sums.clone())
        whole = since_begin[:, :, -1, :, None, None]
        S = first
        ends = None if packing is None else first.new_zeros(first.shape[0] + 1, *first.shape[1:])
        if packing is not None:
            first = F.pad(first, (0, 0, 0, 0, 0, 0, 0, 1))
            S = first[:1]
        far = []
        # unbound, since the gradient of one index of many is as large as the whole
        steps = zip(x_cGQJP.unbind(1), B_cGQN.unbind(1), C_cGQN.unbind(1), whole.unbind(1), strict=True)
        for k, (x_GQR, B_GQN, C_GQN, fade) in enumerate(steps):
            if packing is not None:
                taken = first.index_select(0, packing.sequence[k : k + 1])
                S = torch.where(packing.begins[k], taken, S)
            S_GRN = S.reshape(b, G, J * P, N)
            far.append((C_GQN @ S_GRN.to(x.dtype).transpose(-1, -2)).transpose(1, 2).reshape(b, Q, H, P))
            added = x_GQR.transpose(-1, -2) @ B_GQN
            S = (S * fade).add_(added.view(b, H, P, N))
            if packing is not None and ends is not None:
                ends = ends.index_copy(0, packing.sequence[k : k + 1], S)
        Y = (torch.stack(far, 1) * since_begin.to(x.dtype)[..., None]).add_(Y)
    return Y, S if ends is None else ends[:-1], exact[:, :, -1].to(full)
