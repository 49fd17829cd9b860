"""The optimizers under comparison: a small adapter each, around the package that publishes it.

Each is a function ``(model, lr, knob, options) -> Optimizer``. Weight decay is 0 for all: it is a
setting of the task, not of a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, NAdam, Optimizer

Options = Mapping[str, Any]
Build = Callable[[nn.Module, float, "float | None", Options], Optimizer]


class Combined(Optimizer):
    """Several optimizers that step together, each on its own parameters.

    Only for methods that can't take every parameter: their groups stay the inner optimizers' own,
    so that a schedule reaches them.
    """

    def __init__(self, inner: Iterable[Optimizer]) -> None:
        self.inner = list(inner)
        super().__init__(
            [{"params": list(group["params"])} for one in self.inner for group in one.param_groups],
            {},
        )
        self.param_groups = [group for one in self.inner for group in one.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every inner optimizer."""
        for one in self.inner:
            one.step()

    @property
    def states(self) -> list[Any]:
        """The inner optimizers' states."""
        return [one.state for one in self.inner]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def give_own_rate(optimizer: Optimizer, parameters: Iterable[nn.Parameter], lr: float) -> None:
    """Move ``parameters`` to groups of their own with the learning rate ``lr``."""
    apart = {id(parameter) for parameter in parameters}
    for one in optimizer.inner if isinstance(optimizer, Combined) else [optimizer]:
        for group in list(one.param_groups):
            chosen = [parameter for parameter in group["params"] if id(parameter) in apart]
            if not chosen:
                continue
            own = {**group, "params": chosen, "lr": lr}
            group["params"] = [p for p in group["params"] if id(p) not in apart]
            one.param_groups.append(own)
    if isinstance(optimizer, Combined):
        optimizer.param_groups = [group for one in optimizer.inner for group in one.param_groups]


def lora_pairs(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Adapter factors as ``A, B, A, B, ...`` and the other trainable parameters."""
    pairs: list[nn.Parameter] = []
    for module in model.modules():
        factors_a, factors_b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(factors_a, nn.ModuleDict) and isinstance(factors_b, nn.ModuleDict):
            for adapter in factors_a:
                pairs.extend((factors_a[adapter].weight, factors_b[adapter].weight))
    known = {id(parameter) for parameter in pairs}
    return pairs, [parameter for parameter in trainable(model) if id(parameter) not in known]


def adamw(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    return AdamW(trainable(model), lr=lr, **{"weight_decay": 0.0, "fused": True, **options})


def nadam(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    """Adam with Nesterov's look-ahead, which our rule uses too: shows what the rest of it gains."""
    settings: dict[str, Any] = {"decoupled_weight_decay": True, "foreach": True, **options}
    if knob is not None:
        settings["betas"] = (knob, 0.999)
    return NAdam(trainable(model), lr=lr, **settings)


def muon(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    """Muon on matrices; embeddings, vectors and heads go to AdamW, as Muon's authors advise.

    ``match_rms_adamw`` scales Muon's step to AdamW's, so that one learning rate serves both.
    """
    from torch.optim import Muon  # since torch 2.9

    vocabulary = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    matrices, rest = [], []
    for parameter in trainable(model):
        is_matrix = parameter.ndim == 2 and id(parameter) not in vocabulary
        (matrices if is_matrix else rest).append(parameter)
    settings = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", **options}
    inner: list[Optimizer] = [Muon(matrices, lr=lr, **settings)]
    if rest:
        inner.append(AdamW(rest, lr=lr, weight_decay=0.0, fused=True))
    return Combined(inner)


def lora_plus(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    settings = dict(options)
    # PEFT's names are longer, and it ignores a ``weight_decay``.
    settings["loraplus_weight_decay"] = settings.pop("weight_decay", 0.0)
    settings["loraplus_lr_ratio"] = settings.pop("ratio", 16.0 if knob is None else knob)
    return create_loraplus_optimizer(model, AdamW, lr=lr, **settings)  # type: ignore[arg-type]


def riemannian(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    settings = {"weight_decay": 0.0, "reg": 1e-2 if knob is None else knob, **options}
    return create_riemannian_optimizer(model, AdamW, lr=lr, **settings)  # type: ignore[arg-type]


def lora_fa(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]  # type: ignore[union-attr,index]
    return create_lorafa_optimizer(
        model,  # type: ignore[arg-type]
        r=config.r,
        lora_alpha=config.lora_alpha,
        lr=lr,
        **options,
    )


def lora_rite(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from pytorch_optimizer import LoRARite

    pairs, rest = lora_pairs(model)
    optimizer = LoRARite(pairs, lr=lr, **options)
    if not rest:
        return optimizer
    return Combined([optimizer, AdamW(rest, lr=lr, weight_decay=0.0, fused=True)])


def soap(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(trainable(model), lr=lr, **{"weight_decay": 0.0, **options})


def shampoo(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    """Scalable Shampoo with the settings its authors use for grafting.

    The package's defaults (a preconditioner every 1000 steps, SGD grafting) hardly
    precondition in a fine-tuning run, so these are set as for SOAP: every 10 steps.
    """
    from pytorch_optimizer.optimizer.shampoo import LayerWiseGrafting, ScalableShampoo

    settings: dict[str, Any] = {
        "start_preconditioning_step": 10,
        "preconditioning_compute_steps": 10,
        "graft_type": LayerWiseGrafting.RMSPROP,
        "moving_average_for_momentum": True,
    }
    return ScalableShampoo(trainable(model), lr=lr, **{**settings, **options})


def kron(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from pytorch_optimizer import Kron

    return Kron(trainable(model), lr=lr, **options)


def cg(model: nn.Module, lr: float, knob: float | None, options: Options) -> Optimizer:
    from cg_optim import CGLoRAOptimizer

    settings = {"weight_decay": 0.0, **options}
    if knob is not None:
        settings["damping"] = knob
    return CGLoRAOptimizer(model, lr=lr, **settings)
