"""B'MOJO language models: embedding, blocks of mixer and gated MLP, tied head. Letters: `memtier.blocks`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from memtier.blocks import FarAttention, MemorySettings
from memtier.cache import TieredCache
from memtier.decode_cache import DecodeCache
from memtier.errors import ModelError
from memtier.layers.bmojo import BMojoMixer, MixerLosses, MixerState
from memtier.layers.finite import check_logits
from memtier.layers.gated_deltanet import GatedDeltaNet
from memtier.layers.grouped import GroupedGatedDeltaNet, GroupedMamba2
from memtier.layers.mamba2 import Mamba2, Mamba2State
from memtier.layers.norms import RMSNorm
from memtier.layers.plan import StepPlan, make_plan
from memtier.models.bmojo.configuration_bmojo import BMojoConfig

__all__ = ["BMojoForCausalLM", "BMojoModel", "BMojoOutput", "BMojoPreTrainedModel"]

StepCache = TieredCache | DecodeCache


@dataclass
class BMojoOutput(CausalLMOutputWithPast):
    """As CausalLMOutputWithPast; the parts of `loss` are there too, unweighted."""

    lm_loss: torch.Tensor | None = None
    innovation_loss: torch.Tensor | None = None
    span_loss: torch.Tensor | None = None


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class BMojoBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: BMojoConfig, layer: int) -> None:
        super().__init__()
        self.mixer = config.make_mixer(layer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if config.intermediate_size else None
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.intermediate_size else None

    def forward(
        self, x: torch.Tensor, plan: StepPlan, state: MixerState | Mamba2State | None, cache: StepCache | None,
        far: FarAttention,
    ) -> tuple[torch.Tensor, MixerState | Mamba2State | None, MixerLosses]:  # fmt: skip
        h = self.norm(x)
        losses = MixerLosses()
        if not isinstance(self.mixer, BMojoMixer):
            assert state is None or isinstance(state, Mamba2State)
            mixed, state = self.mixer(h, state)
        else:
            mixed, state, losses = self.mixer(h, plan, state, cache, far=far)
        x = x + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state, losses


class BMojoPreTrainedModel(PreTrainedModel):
    """Weights, and what transformers wants to know about the family."""

    config_class = BMojoConfig
    config: BMojoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BMojoBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, Mamba2 | GatedDeltaNet | GroupedMamba2 | GroupedGatedDeltaNet):
            fresh = Mamba2.initial_ssm(module.heads)
            for name, value in fresh.items():
                if hasattr(module, name):
                    init.copy_(getattr(module, name), value)
        if isinstance(module, Mamba2 | GatedDeltaNet):
            bound = module.conv1d.kernel_size[0] ** -0.5
            init.uniform_(module.conv1d.weight, -bound, bound)
            init.normal_(module.out_proj.weight, mean=0.0, std=self.config.initializer_range * depth)
        elif isinstance(module, BMojoMixer):
            init.normal_(module.o_proj.weight, mean=0.0, std=self.config.initializer_range * depth)
            if module.conv_size:
                for weight in (module.k_conv, module.v_conv):
                    # begins near the identity: the newest tap is 1
                    start = torch.randn_like(weight) * 0.1
                    start[:, -1] += 1.0
                    init.copy_(weight, start)
            if module.fading is not None and module.predictor_tokens > 1:
                start = torch.zeros_like(module.predictor_conv)
                start[:, -1] = 1.0
                init.copy_(module.predictor_conv, start)
        elif isinstance(module, GatedMLP):
            init.normal_(module.down_proj.weight, mean=0.0, std=self.config.initializer_range * depth)


class BMojoModel(BMojoPreTrainedModel):
    """The stack without the head."""

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BMojoBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, x: torch.Tensor, cache: StepCache | None, marks: Collection[int], far: FarAttention,
        settings: MemorySettings | None = None,
    ) -> tuple[torch.Tensor, list[MixerLosses]]:  # fmt: skip
        """Read embedded tokens (B, T, E); with a cache, from its position on, and the cache is moved on.

        Nothing of the cache changes before every layer has run. Without a cache, `settings` are the sizes to read
        under (None: the model's own); a cache has its own.
        """
        if cache is None:
            plan = make_plan(settings or self.config.memory_settings(), 0, x.shape[1], marks, -1, x.device)
        else:
            plan = cache.plan(x.shape[1], marks, x.device)
        carried = [None] * len(self.layers) if cache is None else cache.states
        states, losses = [], []
        for layer, before in zip(self.layers, carried, strict=True):
            x, state, loss = layer(x, plan, before, cache, far)
            states.append(state)
            losses.append(loss)
        if cache is not None:
            cache.advance(plan, states)
        return self.norm(x), losses


class BMojoForCausalLM(BMojoPreTrainedModel, GenerationMixin):
    """A language model that reads with all of its memories."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.model = BMojoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` leaves the cache to forward(), which makes a TieredCache
        return False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: StepCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        *,
        loss_weights: torch.Tensor | None = None,
        marks: Collection[int] = (),
        far_attention: FarAttention = "span",
        **kwargs: Any,
    ) -> BMojoOutput:
        """Read tokens; with a cache, as the continuation of what it holds.

        Args:
            input_ids: (B, T) int64, or inputs_embeds (B, T, E).
            attention_mask: all ones, or None: padding is refused.
            past_key_values: carried memory; it is moved on by T tokens.
            labels: (B, T) int64, shifted inside; -100 is ignored.
            loss_weights: (B, T), how much predicting each label counts; None for equal.
            use_cache: True without a cache makes a new TieredCache.
            logits_to_keep: only the last n positions' logits; 0 for all.
            marks: absolute positions at which the span is chosen anew besides the regular boundaries.
            far_attention: what the far memory is; all but "span" train retrieval, without a cache.

        Raises:
            ModelError: padding; positions that blocks of other sequences do not have; non-finite logits with a cache.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ModelError(
                "attention_mask hides tokens; B'MOJO models read whole sequences. "
                "Pass rows of one length, without padding."
            )
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if far_attention == "batch" and self.config.rope_theta is not None and self.config.far_positions == "true":
            raise ModelError(
                "far_attention is 'batch' and far_positions 'true', but blocks of other sequences have no position in "
                "this one. Use far_positions 'compact' or 'none'."
            )
        cache = past_key_values
        if use_cache and cache is None:
            cache = TieredCache(
                self.config, batch_size=inputs_embeds.shape[0], device=inputs_embeds.device, dtype=inputs_embeds.dtype
            )
        hidden, losses = self.model(inputs_embeds, cache, marks, far_attention)
        if labels is None and logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        if cache is not None:
            tokens = inputs_embeds.shape[1]
            check_logits(logits, tokens, cache.position - tokens)
        output = BMojoOutput(logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]
        if labels is not None:
            self._add_losses(output, labels, loss_weights, losses)
        return output

    def _add_losses(
        self, output: BMojoOutput, labels: torch.Tensor, weights: torch.Tensor | None, parts: list[MixerLosses]
    ) -> None:
        assert output.logits is not None
        logits = output.logits[:, :-1].float().flatten(0, 1)
        token_loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
        counted = (labels[:, 1:] != -100).float().flatten()
        if weights is not None:
            counted = counted * weights[:, 1:].flatten()
        loss = (token_loss * counted).sum() / counted.sum().clamp(min=1e-9)
        output.lm_loss = loss.detach()
        innovation = [p.innovation for p in parts if p.innovation is not None]
        if innovation:
            mean = torch.stack(innovation).mean()
            output.innovation_loss = mean.detach()
            loss = loss + self.config.innovation_loss_weight * mean
        span = [p.span for p in parts if p.span is not None]
        if span:
            mean = torch.stack(span).mean()
            output.span_loss = mean.detach()
            loss = loss + self.config.span_loss_weight * mean
        output.loss = loss  # pyright: ignore[reportAttributeAccessIssue]
