"""Every learning-rate scheduler of torch.optim drives the optimizer as it drives AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from cg_optim import CGLoRAOptimizer
from tests.models import assert_equal, parameters_of, tagger, train


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


Optimizer = torch.optim.Optimizer
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def test_no_scheduler_is_forgotten() -> None:
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type)
        and issubclass(value, lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and name not in ("LRScheduler",)
    }
    assert classes == set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_drives_it_like_adamw(name: str, tensor_lr: bool) -> None:
    """``curvature=None`` is AdamW, so any difference is in how settings are read."""
    final = []
    for ours in (True, False):
        model = tagger()
        lr: Any = torch.tensor(1e-2) if tensor_lr else 1e-2
        optimizer: Optimizer = (
            CGLoRAOptimizer(model, lr=lr, curvature=None)
            if ours
            else torch.optim.AdamW(trainable(model), lr=lr)
        )
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(6):
            train(model, optimizer, [step])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        final.append((parameters_of(model), optimizer.param_groups[0]["betas"]))
    assert_equal(*final)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momentum_cycling_leaves_the_pairs_alone_and_survives_saving(name: str) -> None:
    """These schedulers move ``betas[0]``, which is not what LoRA factors have."""
    trained = []
    for cycled in (True, False):
        model = tagger()
        optimizer = CGLoRAOptimizer(model, lr=1e-2)
        scheduler = SCHEDULERS[name](optimizer)
        betas = set()
        for step in range(4):
            (group,) = optimizer.param_groups
            betas.add(group["betas"][0])
            assert group["momentum"] == optimizer.defaults["momentum"]
            if not cycled:
                group["betas"] = (0.9, 0.999)
            torch.manual_seed(step)
            for parameter in trainable(model):  # gradients that do not depend on the model
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            scheduler.step()
        assert len(betas) > 1
        trained.append(model)
    for (parameter, value), other in zip(
        trained[0].named_parameters(), trained[1].parameters(), strict=True
    ):
        in_a_pair = "lora_" in parameter or not value.requires_grad
        assert torch.equal(value, other) is in_a_pair, parameter
    other = CGLoRAOptimizer(model, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    assert_equal(other.state_dict(), optimizer.state_dict())
