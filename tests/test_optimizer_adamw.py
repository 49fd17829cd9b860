"""Everything outside pairs, and everything without curvature, is torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from tests.models import Tagger, assert_equal, parameters_of, tagger, train

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.3},
    "no weight decay": {"weight_decay": 0.0},
    "betas and eps": {"betas": (0.5, 0.9), "eps": 1e-3},
    "beta1 = 0": {"betas": (0.0, 0.99)},
    "tensor lr": {"lr": torch.tensor(3e-3)},
    "one-element lr": {"lr": torch.tensor([3e-3])},
    "lr = 0": {"lr": 0.0},
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def groups_of(model: Tagger, lr: float) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if "lora_A" in n]},
        {"params": [p for n, p in named if "lora_B" in n], "lr": 4 * lr, "betas": (0.8, 0.95)},
        {"params": [p for n, p in named if "lora_" not in n], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_without_curvature_it_is_adamw_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    settings = {"lr": 1e-2, **SETTINGS[name]}
    model, reference = tagger().to(dtype), tagger().to(dtype)
    ours = CGLoRAOptimizer(model, curvature=None, **settings)
    theirs = torch.optim.AdamW(trainable(reference), **settings)
    train(model, ours, range(8))
    train(reference, theirs, range(8))
    assert_equal(parameters_of(model), parameters_of(reference))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    mine, other = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert_equal(mine, other)


def test_several_groups_without_curvature_are_adamw_bit_for_bit() -> None:
    model, reference = tagger(), tagger()
    ours = CGLoRAOptimizer(groups_of(model, 1e-2), lr=1e-2, model=model, curvature=None)
    theirs = torch.optim.AdamW(groups_of(reference, 1e-2), lr=1e-2)
    train(model, ours, range(6))
    train(reference, theirs, range(6))
    assert_equal(parameters_of(model), parameters_of(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_outside_pairs_are_adamw(name: str, dtype: torch.dtype) -> None:
    """The same gradients are given to both, since the pairs move differently."""
    settings = {"lr": 1e-2, **SETTINGS[name]}
    model, reference = tagger().to(dtype), tagger().to(dtype)
    ours = CGLoRAOptimizer(model, **settings)
    theirs = torch.optim.AdamW(trainable(reference), **settings)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        for mine, other in zip(trainable(model), trainable(reference), strict=True):
            if (step + mine.numel()) % 3 == 0 and mine.ndim == 1:
                mine.grad = other.grad = None
                continue
            mine.grad = torch.randn(mine.shape, generator=generator).to(dtype)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    left, right = parameters_of(model), parameters_of(reference)
    outside = [n for n in left if "lora" not in n]
    assert len(outside) == 6
    assert_equal({n: left[n] for n in outside}, {n: right[n] for n in outside})


def test_the_default_dtype_does_not_reach_the_step_counter() -> None:
    """In bfloat16 the counter would stop at 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Linear(2, 2)
        optimizer = CGLoRAOptimizer(model, curvature=None)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight]["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
