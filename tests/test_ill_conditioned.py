"""On ill-conditioned inputs the optimizer needs a fraction of AdamW's steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cg_optim import CGLoRAOptimizer

STEPS = 240
CONDITION = 1e4
RATES = [10 ** (exponent / 4) for exponent in range(-8, -1)]


class LoRALayer(nn.Module):
    """A frozen linear layer with an adapter."""

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(n, m, bias=False).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, n) / n**0.5)
        self.lora_B = nn.Parameter(torch.zeros(m, rank))
        self.in_features, self.out_features = n, m

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def problem(seed: int) -> tuple[LoRALayer, Tensor, Tensor]:
    """A layer, inputs whose covariance has exactly the condition number, and targets."""
    torch.manual_seed(seed)
    n, m, rank = 32, 24, 4
    layer = LoRALayer(n, m, rank)
    values = torch.logspace(0, -math.log10(CONDITION), n)
    root = torch.linalg.qr(torch.randn(n, n)).Q * (values * n / values.sum()).sqrt()
    x = torch.linalg.qr(torch.randn(4 * n, n)).Q * (4 * n) ** 0.5 @ root.T
    change = torch.randn(m, rank) @ torch.randn(rank, n)
    target = x @ change.T / change.norm()
    return layer, x, layer.base(x).detach() + target / target.square().sum(-1).mean().sqrt()


def curve(seed: int, build: Callable[[LoRALayer], Optimizer]) -> list[float]:
    """Training losses, the last one after all steps; full batch, linear decay."""
    layer, x, y = problem(seed)
    optimizer = build(layer)
    first = optimizer.param_groups[0]["lr"]
    losses = []
    for step in range(STEPS + 1):
        optimizer.param_groups[0]["lr"] = first * (1 - step / STEPS)
        loss = (layer(x) - y).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_reaches_the_best_loss_of_adamw_in_a_third_of_the_steps(seed: int) -> None:
    def adamw(layer: LoRALayer, lr: float) -> Optimizer:
        return AdamW([layer.lora_A, layer.lora_B], lr=lr, weight_decay=0.0)

    def ours(layer: LoRALayer, lr: float) -> Optimizer:
        return CGLoRAOptimizer(layer, lr=lr, weight_decay=0.0)

    best_of_adamw = min(min(curve(seed, lambda m, lr=lr: adamw(m, lr))) for lr in RATES)
    steps = [
        next((i for i, loss in enumerate(losses) if loss <= best_of_adamw), math.inf)
        for losses in (curve(seed, lambda m, lr=lr: ours(m, lr)) for lr in RATES)
    ]
    assert min(steps) <= STEPS / 3
