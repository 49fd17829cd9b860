"""How much of a whole training step the optimizer takes, on a small real language model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer

from ..adapters import add_lora
from ..language_model import VOCABULARY, LanguageModelRecipe, build_model, loss
from ..optimizers import trainable
from .measure import LR, adamw
from .stopwatch import BASELINES, Contender, resume_after_warm_up, summarise, take_turns


def measure_training(
    recipe: LanguageModelRecipe, *, batch_size: int, rank: int, cycles: int, device: str
) -> list[dict[str, Any]]:
    """A row for each optimizer: forward and backward without hooks, hooks, step, share of both.

    Weights and bytes are random: the cost is that of a trained model.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, recipe.sequence_length + 1)
    batch = torch.randint(VOCABULARY, shape, generator=generator).to(device)
    contenders = {}
    for name in (*BASELINES, "cg"):
        model = add_lora(build_model(recipe), rank, 2 * rank, seed=0).to(device).train()
        optimizer: torch.optim.Optimizer
        if name == "cg":
            optimizer = CGLoRAOptimizer(model, lr=LR)
            resume_after_warm_up(optimizer)
        else:
            optimizer = adamw(trainable(model), name.removeprefix("adamw_"))
        passes = partial(_forward_backward, model, batch, recipe.bf16)
        contenders[name] = Contender(optimizer, passes)
    medians = summarise(take_turns(contenders, cycles, device))
    rows = []
    for name in contenders:
        hooks = medians["ms_hooks"]["average"] if name == "cg" else 0.0
        step = medians["ms"][name]
        whole = medians["ms_forward_backward"] + hooks + step
        rows.append(
            {
                "model": f"byte-llama-{recipe.texts}",
                "batch": batch_size,
                "sequence": recipe.sequence_length,
                "rank": rank,
                "name": name,
                "ms_forward_backward": medians["ms_forward_backward"],
                "ms_hooks": hooks,
                "ms_step": step,
                "share": (hooks + step) / whole,
            }
        )
    return rows


def _forward_backward(model: nn.Module, batch: Tensor, bf16: bool) -> None:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
        value = loss(model, batch)
    value.backward()
