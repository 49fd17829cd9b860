"""Adapters and their initialisations, each through PEFT's own code."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from cg_optim import curvature_init_

from .problem import Problem

CALIBRATION_BATCHES = 4
"""Training batches that PEFT's data-driven initialisations look at before the first step."""

CURVATURE_BATCHES = 2
"""Those that ours look at: one for the curvature and the length, one for the gradient."""

MOVING = ("curvature-newton",)
"""Initialisations after which the model is another function than before."""


def adapt(problem: Problem, seed: int, init: str | None = None) -> nn.Module:
    """The model of ``problem`` with LoRA adapters, on the problem's device.

    Args:
        problem: the task.
        seed: seed of the adapter's random weights, equal for all methods.
        init: one of :data:`INITIALISATIONS`, ``None`` for PEFT's default.
    """
    model = problem.base_model(seed).to(problem.device)
    kept = [p for p in problem.trainable_besides_lora(model) if p.requires_grad]
    torch.manual_seed(10_000 + seed)
    build = _plain if init is None else INITIALISATIONS[init]
    model = build(problem, model, seed)
    for parameter in kept:  # PEFT froze everything that is not an adapter
        parameter.requires_grad_(True)
    return model.to(problem.device)


def _config(problem: Problem, **extra: Any) -> LoraConfig:
    settings = problem.lora
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        lora_dropout=0.0,
        **extra,
    )


def _plain(problem: Problem, model: nn.Module, seed: int) -> nn.Module:
    return get_peft_model(model, _config(problem))  # type: ignore[arg-type]


def _pissa(problem: Problem, model: nn.Module, seed: int) -> nn.Module:
    return get_peft_model(model, _config(problem, init_lora_weights="pissa"))  # type: ignore[arg-type]


def _eva(problem: Problem, model: nn.Module, seed: int) -> nn.Module:
    config = _config(problem, init_lora_weights="eva", eva_config=EvaConfig())
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]

    def layer_inputs(inputs: Any, model_input: Any, name: str) -> Tensor:
        first = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
        return first.flatten(0, -2)

    def forward(module: nn.Module, batch: Any) -> None:
        problem.calibrate(module, batch)

    with contextlib.redirect_stdout(io.StringIO()):
        initialize_lora_eva_weights(
            adapted,
            dataloader=list(islice(problem.batches(seed), CALIBRATION_BATCHES)),
            forward_fn=forward,
            prepare_model_inputs_fn=None,  # type: ignore[arg-type]
            prepare_layer_inputs_fn=layer_inputs,
            show_progress_bar=False,
        )
    return adapted


def _lora_ga(problem: Problem, model: nn.Module, seed: int) -> nn.Module:
    config = _config(problem, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step() -> None:
        for batch in islice(problem.batches(seed), CALIBRATION_BATCHES):
            problem.loss(model, batch).backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _corda(problem: Problem, model: nn.Module, seed: int) -> nn.Module:
    # Here, because this module of PEFT needs attrs, which PEFT does not declare.
    from peft.tuners.lora.corda import preprocess_corda

    config = _config(
        problem, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")
    )

    def run_model() -> None:
        # PEFT's covariance hook takes one sequence at a time (it squeezes the batch dimension).
        for batch in islice(problem.batches(seed), CALIBRATION_BATCHES):
            for single in problem.singles(batch):
                problem.calibrate(model, single)

    preprocess_corda(model, config, run_model=run_model)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _curvature(mode: str) -> Callable[[Problem, nn.Module, int], nn.Module]:
    def build(problem: Problem, model: nn.Module, seed: int) -> nn.Module:
        adapted = _plain(problem, model, seed)
        batches = islice(problem.batches(seed), CURVATURE_BATCHES)
        curvature_init_(adapted, batches, problem.loss, mode=mode, seed=seed, progress=False)
        return adapted

    return build


INITIALISATIONS: dict[str, Callable[[Problem, nn.Module, int], nn.Module]] = {
    "eva": _eva,
    "lora-ga": _lora_ga,
    "pissa": _pissa,
    "corda": _corda,
    "curvature-keep": _curvature("keep"),
    "curvature-newton": _curvature("newton"),
    "curvature-shift": _curvature("shift"),
}
