"""The optimizer of every recipe."""

from __future__ import annotations

import torch

__all__ = ["make_optimizer"]


def make_optimizer(
    model: torch.nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) of the parameters that require gradients.

    Matrices decay, vectors (norms, biases, decays of the recurrence) do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].device.type == "cuda"
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=on_gpu)
