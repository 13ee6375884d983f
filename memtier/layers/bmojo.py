"""The B'MOJO mixer: window, fading, eidetic and span memory read in one softmax.

Sources: Zancato et al. 2024 (B'MOJO), Nunez et al. 2024 (expansion span).

One module serves every choice: without fading memory it is window attention, without far memories B'MOJO-F. The sizes
come with the plan of a step, so one set of weights can be read under several settings. Letters: `memtier.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from memtier.blocks import FarAttention
from memtier.layers.distill import distillation_loss
from memtier.layers.landmarks import search_queries
from memtier.layers.mamba2 import Mamba2State
from memtier.layers.memories import (
    LayerMemory,
    attention_shares,
    eidetic_step,
    hide_retrieved,
    sink_step,
    span_step,
)
from memtier.layers.norms import RMSNorm
from memtier.layers.plan import StepPlan
from memtier.layers.positions import Sources, rotate_sources
from memtier.layers.rotary import rotary_table
from memtier.layers.rules import EideticRule, RuleByName, prediction_error
from memtier.layers.state import AttentionState, empty_attention_state, extend, roll
from memtier_kernels import Band, Paged, causal_conv1d, span_attention

__all__ = ["BMojoMixer", "MixerLosses", "MixerState"]

# how many outputs of the fading memory the innovation test looks at
PREDICTOR_TOKENS = {"linear": 1, "conv": 4}


@dataclass(frozen=True)
class MixerState:
    """What a mixer carries: its attention state, and its fading memory's."""

    attention: AttentionState
    fading: Mamba2State | None


@dataclass(frozen=True)
class MixerLosses:
    """Auxiliary training losses of one mixer, scalars or None."""

    innovation: torch.Tensor | None = None
    span: torch.Tensor | None = None


class BMojoMixer(nn.Module):
    """(B, T, E) -> (B, T, E). `config` is a BMojoConfig; `fading` turns the recurrent part on."""

    def __init__(self, config, layer: int, *, fading: bool) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.hidden_size, self.conv_size = config.hidden_size, config.kv_conv_size
        self.rotary = (
            None if config.rope_theta is None else partial(rotary_table, size=self.head_dim, theta=config.rope_theta)
        )
        channels = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        if self.conv_size:
            self.k_conv = nn.Parameter(torch.zeros(channels, self.conv_size))
            self.v_conv = nn.Parameter(torch.zeros(channels, self.conv_size))
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.fading = config.make_fading_memory() if fading else None
        # P of the innovation test: the next input predicted from the fading memory
        self.predictor = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if fading else None
        self.predictor_tokens = PREDICTOR_TOKENS[config.innovation_predictor]
        if fading and self.predictor_tokens > 1:
            self.predictor_conv = nn.Parameter(torch.zeros(config.hidden_size, self.predictor_tokens))
        self.rule_name = config.eidetic_rule
        self.rule: EideticRule = RuleByName(config.eidetic_rule, layer, config.eidetic_threshold)

    def empty_state(self, settings, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state before the first token, under the given MemorySettings."""
        attention = empty_attention_state(
            batch, settings=settings, kv_heads=self.kv_heads, head_dim=self.head_dim,
            hidden_size=self.hidden_size, conv_size=self.conv_size, predictor_tokens=self.predictor_tokens,
            fading=self.fading is not None,
            memory=self.layer in settings.memory_layers, device=device, dtype=dtype,
        )  # fmt: skip
        return MixerState(attention, None if self.fading is None else self.fading.empty_state(batch, device, dtype))

    def forward(
        self,
        h: torch.Tensor,
        plan: StepPlan,
        state: MixerState | None,
        memory: LayerMemory | None,
        *,
        far: FarAttention = "span",
    ) -> tuple[torch.Tensor, MixerState | None, MixerLosses]:
        """Read a step.

        Args:
            h: (B, T, E), normed.
            state: None for a whole sequence from position 0 (training); then no state comes back.
            memory: where sealed blocks go and spans come from; None: the sequence itself.
            far: what is read beyond the window; "dense" adds a loss that teaches landmarks which blocks attention uses.
        """
        tokens = h.shape[1]
        settings, carried = plan.settings, None if state is None else state.attention
        dense = far == "dense" and self.layer in settings.memory_layers
        q, k, v, tails = self._project(h, carried)
        keys, values = k, v
        changes: dict[str, torch.Tensor] = {}
        if carried is not None:
            changes.update(tails)
            keys, changes["keys"] = extend(carried.keys, k)
            values, changes["values"] = extend(carried.values, v)
        prefix = keys.shape[1] - tokens

        fading, f_state, surprise, losses = None, None, None, MixerLosses()
        if self.fading is not None and self.predictor is not None:
            f, f_state = self.fading(h, None if state is None else state.fading)
            fading, fading_changes = self._fading_band(f, plan, carried)
            error, last_fading = self._prediction_error(h.detach(), f, carried)
            losses = MixerLosses(innovation=error.mean())
            surprise = error.detach()
            if carried is not None:
                changes.update(fading_changes, last_fading=last_fading)
                surprise, changes["innovation"] = extend(carried.innovation, surprise)

        positions = None
        queries = search_queries(q, self.kv_heads, settings.landmark_keys)
        span, span_ids = None, None
        if self.layer in settings.memory_layers and not dense:
            step = span_step(
                self.layer, plan, carried, memory, keys, values, queries, surprise, prefix, of_batch=far == "batch"
            )  # fmt: skip
            if step is not None:
                span_ids = step.ids
                span = None if step.empty else step.paged(settings)
                if carried is not None:
                    changes.update(step.carried(h.dtype))
                    if not settings.landmark_keys:
                        changes["query_tail"] = roll(carried.query_tail, queries)
        eidetic = None
        if settings.eidetic_tokens and surprise is not None and not dense:
            chosen = eidetic_step(plan, carried, keys, values, surprise, prefix, self.rule)
            if chosen is not None:
                if carried is not None:
                    changes.update(chosen.carried())
                table = chosen.table
                if span is not None and span_ids is not None:
                    table = hide_retrieved(chosen, span_ids, settings.span_block_tokens)
                eidetic = Paged(chosen.keys.unsqueeze(2), chosen.values.unsqueeze(2), table)
                positions = chosen.positions
        sinks, sink_changes = sink_step(plan, carried, k, v)
        changes.update(sink_changes)
        distant: Paged | Band | None = span
        if dense and plan.lo[-1] > 0:
            start = torch.full_like(plan.lo_token, settings.sink_tokens)
            distant = Band(keys, values, start, plan.lo_token.clamp(min=settings.sink_tokens))

        window = Band(
            keys, values, plan.lo_token - plan.origin + prefix,
            (torch.arange(tokens, device=h.device) + (prefix + 1)).expand(plan.lo_token.shape),
        )  # fmt: skip
        sources = Sources(window, fading, sinks, eidetic, distant, positions, span_ids)
        near_q, far_q, sources = rotate_sources(
            q, sources, plan, self.rotary, self._far_sizes(settings), carried is not None
        )
        result = span_attention(
            near_q, q_far=far_q, group=plan.group, window=sources.window, fading=sources.fading, sinks=sources.sinks,
            eidetic=sources.eidetic, span=sources.span,
        )  # fmt: skip
        out = self.o_proj(result.out.to(h.dtype).flatten(2))
        if isinstance(sources.span, Band):
            losses = replace(
                losses, span=distillation_loss(far_q, sources.span, result.lse, queries, k, surprise, plan)
            )
        if carried is None:
            return out, None, losses
        changes.update(attention_shares(far_q, result, sources.span, changes.get("span_ids")))
        return out, MixerState(replace(carried, **changes), f_state), losses

    def _far_sizes(self, settings) -> tuple[int, int, int]:
        """Tokens that sinks, eidetic and span can take in this layer."""
        eidetic = 0 if self.fading is None else settings.eidetic_tokens
        memory = self.layer in settings.memory_layers
        return settings.sink_tokens, eidetic, settings.span_blocks * settings.span_block_tokens if memory else 0

    def _project(
        self, h: torch.Tensor, carried: AttentionState | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """q (B, T, H, D), k and v (B, T, G, D), and the new tails of the k/v convolutions."""
        q = self.q_proj(h).unflatten(2, (self.heads, self.head_dim))
        k, v, tails = self.k_proj(h), self.v_proj(h), {}
        if self.conv_size:
            k, key_tail = causal_conv1d(k, self.k_conv, tail=None if carried is None else carried.key_tail)
            v, value_tail = causal_conv1d(v, self.v_conv, tail=None if carried is None else carried.value_tail)
            tails = {"key_tail": key_tail, "value_tail": value_tail}
        k, v = k.unflatten(2, (self.kv_heads, self.head_dim)), v.unflatten(2, (self.kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k.to(h.dtype), v.to(h.dtype), tails

    def _prediction_error(
        self, h: torch.Tensor, f: torch.Tensor, carried: AttentionState | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How badly each token was predicted from the fading memory before it, (B, T), and the f to look at next."""
        assert self.predictor is not None
        width = self.predictor_tokens
        if carried is None:
            before = f.new_zeros(f.shape[0], width, f.shape[2])
        else:
            before = carried.last_fading.reshape(f.shape[0], width, -1).to(f.dtype)
        seen = torch.cat([before, f], dim=1)
        past = seen[:, width - 1 : -1]
        if width > 1:
            past, _ = causal_conv1d(past, self.predictor_conv, tail=seen[:, : width - 1])
        error = prediction_error(h, self.predictor(past.to(f.dtype)), self.rule_name)
        return error, seen[:, -width:].reshape(f.shape[0], *([] if width == 1 else [width]), -1).clone()

    def _fading_band(
        self, f: torch.Tensor, plan: StepPlan, carried: AttentionState | None
    ) -> tuple[Band, dict[str, torch.Tensor]]:
        """Keys of the fading memory, seen for the W positions before the window; each stands for all before it."""
        k = self.k_proj(f).unflatten(2, (self.kv_heads, self.head_dim))
        v = self.v_proj(f).unflatten(2, (self.kv_heads, self.head_dim)).to(f.dtype)
        k = (k if self.k_norm is None else self.k_norm(k)).to(f.dtype)
        changes: dict[str, torch.Tensor] = {}
        keys, values = k, v
        if carried is not None:
            keys, changes["fading_keys"] = extend(carried.fading_keys, k)
            values, changes["fading_values"] = extend(carried.fading_values, v)
        prefix = keys.shape[1] - f.shape[1]
        start = (plan.lo_token - plan.settings.window_tokens).clamp(min=0)
        return Band(keys, values, start - plan.origin + prefix, plan.lo_token - plan.origin + prefix), changes
