"""States at the ends of runs of chunks, and before every chunk: forward, and backward for their gradients.

A run is walked by one program for each head and tile of the state. A first walk starts from nothing and gives what the
run adds; `_pass` hands states from run to run; a second walk starts from there. At the edge of a sequence the
walk drops what it carries and takes up that sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import launch
from memtier_kernels.ssd.triton_chunks import Chunks, Decays, locate, padded
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["kept_gradients", "kept_states", "run_states", "strides", "tiles"]


def tiles(head: int, size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the tile of a state that one walk carries."""
    rows, columns = (32, 64) if dtype == torch.float32 else (64, 128)
    return min(rows, padded(head)), min(columns, padded(size))


def run_states(
    x: torch.Tensor, B: torch.Tensor, edge: torch.Tensor | None, sums: Decays, chunks: Chunks, *, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The state with which every run begins, (runs, H, P, N) float32, and the log2 decay of its sequence until there,
    (runs, H) float64; None where there is one run.

    Args:
        x: (B, T, H, P), what is added to states; of `reverse`, the gradient of y.
        B: (B, T, G, N); of `reverse`, C.
        edge: (sequences, H, P, N), where a sequence begins; of `reverse`, the gradient of its last state.
        reverse: walk from the last chunk to the first.
    """
    if chunks.runs == 1:
        return None, None
    heads, head, size = x.shape[2], x.shape[3], B.shape[3]
    begins = torch.empty(chunks.runs, heads, head, size, dtype=torch.float32, device=x.device)
    faded, logs = (torch.empty(chunks.runs, heads, dtype=d, device=x.device) for d in (torch.float32, torch.float64))
    _walk(x, B, edge, None, sums, chunks, reverse, ends=begins, faded=faded, logs=logs)
    launch(
        _pass, (heads * triton.cdiv(head * size, 512),), begins, faded, logs, chunks.runs, heads, head * size,
        REVERSE=reverse, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return begins, logs


def kept_states(
    x: torch.Tensor, B: torch.Tensor, edge: torch.Tensor | None, sums: Decays, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state before every chunk, (chunks, H, P, N) in x's dtype; every sequence's last state and total log decay."""
    heads, head, size = x.shape[2], x.shape[3], B.shape[3]
    kept = torch.empty(chunks.total, heads, head, size, dtype=x.dtype, device=x.device)
    last = torch.empty(chunks.sequences, heads, head, size, dtype=torch.float32, device=x.device)
    log_decay = torch.empty(chunks.sequences, heads, dtype=torch.float32, device=x.device)
    begins, logs = run_states(x, B, edge, sums, chunks)
    _walk(x, B, edge, begins, sums, chunks, False, kept=kept, edges=last, logs=logs, edge_logs=log_decay)
    return kept, last, log_decay


def kept_gradients(
    dy: torch.Tensor, C: torch.Tensor, edge: torch.Tensor | None, sums: Decays, chunks: Chunks, kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradient of the state after every chunk, in dy's dtype; of each sequence's first state; of the decay across
    each chunk, as a sum over tiles yet to be taken, (tiles, chunks, H).

    Args:
        kept: the states before every chunk.
    """
    heads, head, size = dy.shape[2], dy.shape[3], C.shape[3]
    rows, columns = tiles(head, size, dy.dtype)
    grads = torch.empty_like(kept)
    first = torch.empty(chunks.sequences, heads, head, size, dtype=torch.float32, device=dy.device)
    count = triton.cdiv(head, rows) * triton.cdiv(size, columns)
    through = torch.empty(count, chunks.total, heads, dtype=torch.float32, device=dy.device)
    begins, _ = run_states(dy, C, edge, sums, chunks, reverse=True)
    _walk(dy, C, edge, begins, sums, chunks, True, kept=grads, edges=first, across=kept, through=through)
    return grads, first, through


def _walk(
    x: torch.Tensor, B: torch.Tensor, edge: torch.Tensor | None, begins: torch.Tensor | None, sums: Decays,
    chunks: Chunks, reverse: bool, *, ends: torch.Tensor | None = None, faded: torch.Tensor | None = None,
    logs: torch.Tensor | None = None, kept: torch.Tensor | None = None, edges: torch.Tensor | None = None,
    edge_logs: torch.Tensor | None = None, across: torch.Tensor | None = None, through: torch.Tensor | None = None,
) -> None:  # fmt: skip
    tokens, heads, head = x.shape[1:]
    groups, size = B.shape[2:]
    rows, columns = tiles(head, size, x.dtype)
    grid = (heads * triton.cdiv(head, rows) * triton.cdiv(size, columns) * chunks.runs,)
    launch(
        _states, grid, x, B, edge, begins, sums.dt, sums.high, sums.low, sums.whole, chunks.table,
        ends, faded, logs, kept, edges, edge_logs, across, through,
        *x.stride()[:3], *B.stride()[:3], *strides(edge), tokens, chunks.each, chunks.total, chunks.run,
        heads, heads // groups, head, size,
        Q=chunks.Q, BLOCK_P=rows, BLOCK_N=columns, REVERSE=reverse, PACKED=chunks.table is not None,
    )  # fmt: skip


def strides(state: torch.Tensor | None) -> Sequence[int]:
    """Strides of a (sequences, H, P, N) tensor that may be absent."""
    return (0, 0, 0, 0) if state is None else state.stride()


def _fits(one: triton.Config, arguments: dict[str, Any]) -> bool:
    if one.num_stages == 2:
        return True
    return one.num_warps == (4 if arguments["x"].dtype == torch.float32 else 8) and arguments["BLOCK_N"] > 32


@tuned(
    [config(warps=8, stages=2), config(warps=8, stages=3), config(warps=4, stages=3)],
    key=["P", "N", "Q", "REVERSE"], prune=_fits,
)  # fmt: skip
@triton.jit(do_not_specialize=["tokens", "each", "total", "run"])
def _states(
    x, B, edge, begins, dt, high, low, whole, table, ends, faded, logs, kept, edges, edge_logs, across,
    through, x_b, x_t, x_h, B_b, B_t, B_g, edge_s, edge_h, edge_p, edge_n, tokens, each, total, run, H, J, P, N,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_of_head = tl.cdiv(P, BLOCK_P) * tiles_n
    h = (pid % H).to(tl.int64)
    g = (pid % H // J).to(tl.int64)
    tile = pid // H % tiles_of_head
    walk = (pid // H // tiles_of_head).to(tl.int64)
    p = tile // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_ok, n_ok = p < P, n < N
    state_ok = p_ok[:, None] & n_ok[None, :]
    inside = p[:, None] * N + n[None, :]
    from_edge = edge + h * edge_h + p[:, None] * edge_p + n[None, :] * edge_n if edge is not None else 0
    i = tl.arange(0, Q)

    S = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    # how much is left of the run's first state, and of the current sequence's since its beginning or the run's
    log_faded = tl.zeros([], tl.float32)
    log_decay = tl.zeros([], tl.float64)
    if begins is not None:
        S = tl.load(begins + (walk * H + h) * P * N + inside, mask=state_ok, other=0.0)
        if edge_logs is not None:
            log_decay = tl.load(logs + walk * H + h)
    begin = pid // H // tiles_of_head * run
    stop = tl.minimum(begin + run, total)
    for k in range(begin, stop):
        c = tl.cast(begin + stop - 1 - k if REVERSE else k, tl.int32)
        batch, sequence, start, count, is_first, is_last = locate(table, c, tokens, each, Q, PACKED)
        c = c.to(tl.int64)
        fresh, done = (is_last, is_first) if REVERSE else (is_first, is_last)
        if edge is not None:
            # no row is loaded but where a sequence begins
            needed = (p < tl.where(fresh, P, 0))[:, None] & n_ok[None, :]
            taken = tl.load(from_edge + sequence * edge_s, mask=needed, other=0.0).to(tl.float32)
        else:
            taken = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        S = tl.where(fresh, taken, S)
        log_faded = tl.where(fresh, float("-inf"), log_faded)
        log_decay = tl.where(fresh, 0.0, log_decay)

        ok = i < count
        rows = start + i
        of_chunk = c * H + h
        x_QP = tl.load(
            x + batch * x_b + h * x_h + (rows * x_t)[:, None] + p[None, :], mask=ok[:, None] & p_ok[None, :], other=0.0
        )
        B_QN = tl.load(
            B + batch * B_b + g * B_g + (rows * B_t)[:, None] + n[None, :], mask=ok[:, None] & n_ok[None, :],
            other=0.0,
        )  # fmt: skip
        high_Q = tl.load(high + of_chunk * Q + i)
        log_whole = tl.load(whole + of_chunk)
        last = log_whole.to(tl.float32)
        fade = tl.exp2(last)
        if REVERSE:
            weight = tl.exp2(high_Q)
        else:
            low_Q = tl.load(low + of_chunk * Q + i)
            rest = (log_whole - last.to(tl.float64)).to(tl.float32)
            weight = tl.exp2((last - high_Q) + (rest - low_Q)) * tl.load(dt + of_chunk * Q + i)

        at = of_chunk * P * N + inside
        if kept is not None:
            tl.store(kept + at, S.to(kept.dtype.element_ty), mask=state_ok)
        S = S * fade
        if through is not None:
            before = tl.load(across + at, mask=state_ok, other=0.0).to(tl.float32)
            tl.store(through + (tile * total + c) * H + h, tl.sum(tl.sum(S * before, axis=1), axis=0))
        x_QP = (x_QP * weight[:, None]).to(x_QP.dtype)
        S += tl.dot(tl.trans(x_QP), B_QN, input_precision="tf32x3")
        log_faded += last
        log_decay += log_whole
        if edges is not None:
            tl.store(
                edges + (sequence * H + h) * P * N + inside, S, mask=(p < tl.where(done, P, 0))[:, None] & n_ok[None, :]
            )
        if edge_logs is not None:
            nats = (log_decay * 0.6931471805599453).to(tl.float32)
            tl.store(edge_logs + sequence * H + h, nats, mask=done & (tile == 0))
    if ends is not None:
        tl.store(ends + (walk * H + h) * P * N + inside, S, mask=state_ok)
        tl.store(faded + walk * H + h, log_faded, mask=tile == 0)
        tl.store(logs + walk * H + h, log_decay, mask=tile == 0)


@triton.jit(do_not_specialize=["runs"])
def _pass(states, faded, logs, runs, H, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """What each run adds, (runs, H, size), becomes, in place, the state that each run begins with; so do the logs."""
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    inside = pid // H * BLOCK + tl.arange(0, BLOCK)
    first_of_head = pid // H == 0
    carried = tl.zeros([BLOCK], tl.float32)
    carried_log = tl.zeros([], tl.float64)
    for k in range(runs):
        run = tl.cast(runs - 1 - k if REVERSE else k, tl.int64)
        at = states + (run * H + h) * size + inside
        added = tl.load(at, mask=inside < size, other=0.0)
        tl.store(at, carried, mask=inside < size)
        log_faded = tl.load(faded + run * H + h)
        # a state that ended within the run must not reach the next sequence, whatever it held
        ended = log_faded == float("-inf")
        carried = tl.where(ended, 0.0, carried * tl.exp2(log_faded)) + added
        at_log = logs + run * H + h
        added_log = tl.load(at_log, mask=first_of_head, other=0.0)
        tl.store(at_log, carried_log, mask=first_of_head)
        carried_log = tl.where(ended, 0.0, carried_log) + added_log
