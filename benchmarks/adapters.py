"""LoRA on all linear layers through PEFT, the same initial weights for every method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

NOT_ADAPTED = ("head", "lm_head")
"""Output layers: a new classification head is trained in full, an output embedding not at all."""


def linear_layers(model: nn.Module, leave_out: Sequence[str] = NOT_ADAPTED) -> list[str]:
    """Names of all ``nn.Linear`` modules whose last name part is not in ``leave_out``."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in leave_out
    ]


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: int,
    seed: int,
    *,
    trained: Sequence[str] = ("head",),
    dropout: float = 0.0,
) -> PeftModel:
    """Wrap ``model`` with PEFT LoRA on :func:`linear_layers`.

    Args:
        model: The base model; frozen by PEFT and modified in place.
        rank: Adapter rank.
        alpha: LoRA alpha; the scaling is ``alpha / rank``.
        seed: Decides A's random weights; the global random state is left as it was.
        trained: Modules (by last name part) that are trained in full, where present.
        dropout: LoRA dropout.
    """
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear_layers(model)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in trained:
            module.requires_grad_(True)
    return adapted
