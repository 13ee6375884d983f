"""What is measured: each case builds our operation and its peers on the same numbers, ready to be called.

A peer is what a user would otherwise take. One that cannot be had here is a reason in words instead of a function, and
the reason goes into the results. Letters as in the ops' own folders.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import memtier_kernels
from memtier_kernels import Band, Paged, merge, span_attention, ssd
from memtier_kernels.testing import leaves, make_inputs, tensors

__all__ = ["CASES", "CHECKS", "Candidates", "Case"]

Candidates = dict[str, Callable[[], Any] | str]
"""By name: what to time, or why it cannot be. "memtier" is ours."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        name: as it stands in the results.
        op: whose checks must pass first.
        device: "cpu" or "cuda".
        build: makes the candidates from `sizes`.
        sizes: of the inputs.
        work: bytes that must be moved ("bytes"), arithmetic ("flops"), attended pairs ("pairs"): of one call of ours.
        demand: what ours must reach, in words; the results give the numbers beside it.
        peer_pairs: attended pairs of a peer that computes others than ours.
        same: outputs of the peers must equal ours before anything is timed.
    """

    name: str
    op: str
    device: str
    build: Callable[..., Candidates]
    sizes: dict[str, int]
    work: dict[str, float]
    demand: str = ""
    peer_pairs: dict[str, float] = field(default_factory=dict)
    same: bool = True


FULL_CAUSAL = ("SDPA flash, full causal", "SDPA cuDNN, full causal")

# sizes at which an op must agree with its float64 reference before it is timed
CHECKS: dict[str, list[dict[str, int]]] = {
    "causal_conv1d": [{"T": 63, "C": 48}, {"T": 1}],
    "gated_rms_norm": [{}],
    "innovation": [{"T": 63, "E": 192}],
    "keep_surprising": [{"n": 200, "m": 16}],
    "landmarks": [{"S": 16, "D": 48}],
    "select_blocks": [{"n": 300, "k": 8}],
    "span_attention": [{"T": 65, "D": 64}, {"T": 1, "D": 128, "H": 8}, {"T": 63, "D": 48, "S": 16, "r": 16}],
    "ssd": [{"T": 130, "P": 64, "N": 64}, {"T": 1}, {"T": 63, "P": 16, "N": 48}],
}


def _not_there(*modules: str) -> str | None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"not installed: {error}"
    return None


def _with_backward(call: Callable[[], Any], wanted: list[torch.Tensor]) -> Callable[[], Any]:
    flows: list[torch.Tensor] = []

    def both() -> Any:
        outputs = [t for t in tensors(call()) if t.requires_grad]
        if not flows:
            flows.extend(torch.randn_like(t) for t in outputs[:1])
        return torch.autograd.grad(outputs[:1], wanted, flows, allow_unused=True)

    return both


# -- span_attention


def _prefill_inputs(T: int, D: int, H: int, G: int, W: int, r: int, S: int, K: int) -> dict[str, Any]:
    """A long sequence that sees an exact window, and K of its own sealed blocks a group of r queries."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(1, T, H, D), normal(1, T, G, D), normal(1, T, G, D)
    now = torch.arange(T, device="cuda")
    group = now // r
    boundary = torch.arange(T // r, device="cuda") * r
    # only blocks that lie wholly before the group's window can be chosen, so no key counts twice
    visible = (boundary - W + 1).clamp(min=0) // S
    scores = torch.rand(T // r, T // S, generator=draw, device="cuda")
    scores = scores.masked_fill(torch.arange(T // S, device="cuda") >= visible[:, None], -1.0)
    best = scores.topk(K, dim=-1)
    table = best.indices.masked_fill(best.values < 0, -1).sort(-1).values
    start = (now - W + 1).clamp(min=0)
    return {"q": q, "k": k, "v": v, "group": group, "table": table, "start": start, "now": now}


def _prefill(*, backward: bool, T: int, D: int, H: int, G: int, W: int, r: int, S: int, K: int) -> Candidates:
    x = _prefill_inputs(T, D, H, G, W, r, S, K)
    q, k, v, group, table = x["q"], x["k"], x["v"], x["group"], x["table"]
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)

    def ours() -> torch.Tensor:
        pool = k.unflatten(1, (T // S, S)), v.unflatten(1, (T // S, S))
        return span_attention(
            q, group=group, window=Band(k, v, x["start"], x["now"] + 1), span=Paged(*pool, table[None]), impl="triton"
        ).out

    def sdpa_causal() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            heads = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    def cudnn_causal() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            heads = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    candidates: Candidates = {"memtier": ours, "flex_attention": _flex(x, T, W, r, S)}
    if not backward:
        candidates["gather + flash + merge"] = _gather_and_merge(x, T, D, H, G, W, r, S, K)
    candidates |= dict(zip(FULL_CAUSAL, (sdpa_causal, cudnn_causal), strict=True))
    if backward:
        return {name: c if isinstance(c, str) else _with_backward(c, [q, k, v]) for name, c in candidates.items()}
    return candidates


def _flex(x: dict[str, Any], T: int, W: int, r: int, S: int) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    chosen = torch.zeros(T // r, T // S + 1, dtype=torch.bool, device="cuda")
    chosen.scatter_(1, torch.where(x["table"] < 0, T // S, x["table"]), True)

    def seen(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return ((j <= i) & (j > i - W)) | chosen[i // r, j // S]

    mask = create_block_mask(seen, None, None, T, T, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)

    def run() -> torch.Tensor:
        heads = (x[name].transpose(1, 2) for name in "qkv")
        out = compiled(*heads, block_mask=mask, enable_gqa=True)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2)

    return run


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, H, D) and its log-sum-exp (B, T, H), by FlashAttention as torch ships it."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, window is not None, False,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )  # fmt: skip
    return out, lse.transpose(1, 2)[:, : q.shape[1]]


def _gather_and_merge(
    x: dict[str, Any], T: int, D: int, H: int, G: int, W: int, r: int, S: int, K: int
) -> Callable[[], torch.Tensor]:
    """The span copied out by group, both parts by FlashAttention, merged by their log-sum-exps."""
    there = (x["table"] >= 0).all(-1)
    full = there.nonzero().flatten()

    def run() -> torch.Tensor:
        q, k, v = (x[name] for name in "qkv")
        near, near_lse = _flash(q, k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2), W)
        # groups without a full span are few, at the start; FlashAttention has no mask to leave single blocks out
        rows = x["table"][full]
        keys = k.view(T // S, S, G, D)[rows].flatten(1, 2)
        values = v.view(T // S, S, G, D)[rows].flatten(1, 2)
        queries = q.view(T // r, r, H, D)[full]
        far, far_lse = _flash(queries, keys, values, None)
        out, _ = merge(
            [(near.view(T // r, r, H, D)[full], near_lse.reshape(T // r, r, H)[full].float()), (far, far_lse.float())]
        )
        result = near.view(T // r, r, H, D).clone()
        result[full] = out.to(result.dtype)
        return result.view(1, T, H, D)

    return run


def _decode(*, B: int, D: int, H: int, G: int, W: int, S: int, K: int) -> Candidates:
    """One new token in each of B sessions: a full window of its own and K blocks of a shared pool."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(B, 1, H, D), normal(B, W, G, D), normal(B, W, G, D)
    pool_k, pool_v = normal(1, B * K, S, G, D), normal(1, B * K, S, G, D)
    table = torch.randperm(B * K, generator=draw, device="cuda").view(B, 1, K)
    lengths = torch.full((B, 1), W, device="cuda")
    from_copy = torch.empty((B * W + B * K * S) * G * D, device="cuda", dtype=torch.bfloat16)
    to_copy = torch.empty_like(from_copy)

    def ours() -> torch.Tensor:
        span = Paged(pool_k.expand(B, -1, -1, -1, -1), pool_v.expand(B, -1, -1, -1, -1), table)
        return span_attention(q, window=Band(k, v, lengths - W, lengths), span=span, impl="triton").out

    def gathered() -> torch.Tensor:
        keys = torch.cat([pool_k[0][table[:, 0]].flatten(1, 2), k], dim=1)
        values = torch.cat([pool_v[0][table[:, 0]].flatten(1, 2), v], dim=1)
        queries, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
        return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True).transpose(1, 2)

    # a copy reads and writes once each: the bytes that the read-out reads, moved in the least time the card can
    return {"memtier": ours, "gather + SDPA": gathered, "copy of as many bytes": lambda: to_copy.copy_(from_copy)}


# -- ssd


def _scan(*, backward: bool, B: int, T: int, H: int, P: int, N: int) -> Candidates:
    x = make_inputs("ssd", dtype=torch.bfloat16, device="cuda", B=B, T=T, H=H, G=1, P=P, N=N)
    del x["state"]
    wanted = leaves(x)
    candidates: Candidates = {"memtier": lambda: ssd(**x, impl="triton")[0]}
    if refusal := _not_there("mamba_ssm.ops.triton.ssd_combined"):
        candidates["mamba_ssm"] = refusal
    else:
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        candidates["mamba_ssm"] = lambda: combined(x["x"], x["dt"], x["A"], x["B"], x["C"], 256, D=x["D"])
    if refusal := _not_there("fla.ops.simple_gla"):
        candidates["fla simple_gla"] = refusal
    else:
        candidates["fla simple_gla"] = _simple_gla(x)
    candidates["torch reference"] = lambda: ssd(**x, impl="reference")[0]
    if backward:
        return {name: c if isinstance(c, str) else _with_backward(c, wanted) for name, c in candidates.items()}
    return candidates


def _simple_gla(x: dict[str, Any]) -> Callable[[], torch.Tensor]:
    chunk = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def run() -> torch.Tensor:
        heads = x["x"].shape[2]
        k, q = (x[name].expand(-1, -1, heads, -1).contiguous() for name in "BC")
        v = x["x"] * x["dt"][..., None].to(x["x"].dtype)
        out, _ = chunk(q, k, v, x["dt"] * x["A"], scale=1.0)
        return out + x["D"][:, None] * x["x"]

    return run


# -- the small ops: against what torch makes of the same lines


def _against_torch(*, op: str, **sizes: int) -> Candidates:
    x = make_inputs(op, dtype=torch.bfloat16, device="cuda", **sizes)
    door = getattr(memtier_kernels, op)
    compiled = torch.compile(lambda: door(**x, impl="reference"))
    return {
        "memtier": lambda: door(**x, impl="triton"),
        "torch reference": lambda: door(**x, impl="reference"),
        "torch reference, compiled": compiled,
    }


# -- on the CPU


@torch.no_grad()
def _mamba_layer(*, T: int, E: int) -> Candidates:
    """Prefill of one Mamba-2 layer with the same weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    from memtier.layers.mamba2 import Mamba2

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=E, num_heads=2 * E // 64, head_dim=64, state_size=128, expand=2, n_groups=1, chunk_size=256
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    mine = Mamba2(
        E, expand=2, head_dim=64, state_size=128, groups=1, conv_size=4, chunk_tokens=64, eps=config.layer_norm_epsilon
    )
    mine.load_state_dict(theirs.state_dict())
    h = torch.randn(1, T, E)
    return {
        "memtier": lambda: mine(h, None)[0],
        "transformers Mamba2Mixer": lambda: theirs(h),
    }


@torch.no_grad()
def _window_layer(*, T: int, W: int, E: int, H: int) -> Candidates:
    """A whole attention layer, projections and all: our window against full causal attention by SDPA."""
    from memtier.layers.bmojo import BMojoMixer
    from memtier.layers.plan import make_plan
    from memtier.models.bmojo import BMojoConfig

    torch.manual_seed(0)
    config = BMojoConfig(
        hidden_size=E, num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=H, head_dim=E // H,
        layer_types=["sliding_attention"], window_tokens=W, eidetic_tokens=0, sink_tokens=0, memory_layers=[],
        rope_theta=None, kv_conv_size=0, ssm_head_dim=E // H,
    )  # fmt: skip
    layer = BMojoMixer(config, 0, fading=False).eval()
    h = torch.randn(1, T, E)
    plan = make_plan(config.memory_settings(), 0, T, (), -1, h.device)

    def full() -> torch.Tensor:
        q, k, v = (p(h).unflatten(2, (H, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    return {"memtier": lambda: layer(h, plan, None, None)[0], "full attention, SDPA": full}


def _reference(*, op: str, **sizes: Any) -> Candidates:
    x = make_inputs(op, **sizes)
    return {"memtier": lambda: getattr(memtier_kernels, op)(**x)}


# -- the list


def _prefill_case(T: int, r: int, *, backward: bool) -> Case:
    sizes = {"T": T, "D": 128, "H": 32, "G": 8, "W": 2048, "r": r, "S": 64, "K": 8}
    pairs = 32 * (T * 2048 - 2048 * 2047 / 2 + max(0, T - 2048) * 512)
    return Case(
        f"span_attention {'forward + backward' if backward else 'prefill'}, T {T}, r {r}", "span_attention", "cuda",
        lambda **s: _prefill(backward=backward, **s), sizes, {"pairs": pairs, "flops": pairs * 4 * 128},
        "at least as fast as flex_attention and gather + merge; at least 0.6 of SDPA's rate a pair",
        dict.fromkeys(FULL_CAUSAL, 32 * T * (T + 1) / 2), same=False,
    )  # fmt: skip


def _decode_case(B: int) -> Case:
    sizes = {"B": B, "D": 128, "H": 32, "G": 8, "W": 2048, "S": 64, "K": 8}
    moved = 2.0 * 2 * B * (2048 + 512) * 8 * 128
    demand = {64: "at least 0.8 of the copy bandwidth", 8: "at least 0.5 of the copy bandwidth"}.get(B, "microseconds")
    return Case(
        f"span_attention decode, batch {B}", "span_attention", "cuda", _decode, sizes, {"bytes": moved}, demand,
        same=False,
    )  # fmt: skip


def _scan_case(T: int, *, backward: bool) -> Case:
    return Case(
        f"ssd {'forward + backward' if backward else 'forward'}, T {T}", "ssd", "cuda",
        lambda **s: _scan(backward=backward, **s), {"B": 4, "T": T, "H": 32, "P": 64, "N": 128}, {},
        "forward + backward at least as fast as the best peer", same=False,
    )  # fmt: skip


def _small_case(op: str, **sizes: int) -> Case:
    return Case(op, op, "cuda", lambda **s: _against_torch(op=op, **s), sizes, {}, same=False)


CASES: tuple[Case, ...] = (
    *(_prefill_case(T, r, backward=False) for T in (8192, 32768, 131072) for r in (64, 16)),
    *(_prefill_case(T, 64, backward=True) for T in (8192, 32768)),
    *(_decode_case(B) for B in (1, 8, 64)),
    *(_scan_case(T, backward=backward) for T in (2048, 16384) for backward in (False, True)),
    _small_case("causal_conv1d", B=4, T=8192, C=4096),
    _small_case("landmarks", B=1, n=2048, S=64, G=8, D=128),
    _small_case("select_blocks", B=1, R=512, n=65536, C=1024, k=8),
    _small_case("innovation", B=4, T=8192, E=2048),
    _small_case("keep_surprising", B=1, n=1024, R=64, m=64),
    _small_case("gated_rms_norm", B=4, T=8192, E=4096),
    Case(
        "Mamba-2 layer, prefill of 2k tokens", "ssd", "cpu", _mamba_layer, {"T": 2048, "E": 512}, {},
        "at least 2 times transformers' Mamba-2",
    ),
    Case(
        "window attention layer, W 512, T 32k", "span_attention", "cpu", _window_layer,
        {"T": 32768, "W": 512, "E": 256, "H": 4}, {}, "at least 10 times full attention", same=False,
    ),
    *(
        Case(f"{op}, reference", op, "cpu", lambda op=op, **s: _reference(op=op, **s), sizes, {})
        for op, sizes in {
            "span_attention": {"B": 1, "T": 512, "D": 64, "W": 256, "S": 32, "K": 4, "r": 16, "M": 16},
            "ssd": {"B": 1, "T": 512, "H": 8, "G": 1, "P": 64, "N": 64},
            "causal_conv1d": {"B": 1, "T": 512, "C": 512},
            "landmarks": {"B": 1, "n": 64, "S": 32, "G": 2, "D": 64},
            "select_blocks": {"B": 1, "R": 32, "n": 16384, "C": 128, "k": 4},
            "innovation": {"B": 1, "T": 512, "E": 512},
            "keep_surprising": {"B": 1, "n": 576, "R": 32, "m": 64},
            "gated_rms_norm": {"B": 1, "T": 512, "E": 512},
        }.items()
    ),
)  # fmt: skip
