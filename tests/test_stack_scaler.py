"""``GradScaler``: the scale, its growth and its overflows leave no trace in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from tests.models import Batch, batch, loss_of, tagger, train
from tests.test_stack_passes import assert_same_training


class ScaledTraining:
    """Training through ``GradScaler("cpu")`` with chosen overflows."""

    def __init__(self, set_to_none: bool, **scaler: Any) -> None:
        self.model = tagger()
        self.optimizer = CGLoRAOptimizer(self.model, lr=1e-2)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        self.set_to_none = set_to_none
        self.taken = 0

    def step(self, data: Batch, factor: float = 1.0) -> None:
        before = self.optimizer.param_groups[0].get("steps_taken", 0)
        loss = loss_of(self.model, data) * factor
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1e3)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        self.taken += self.optimizer.param_groups[0].get("steps_taken", 0) - before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_scaler_that_grows_and_overflows_is_not_seen(set_to_none: bool) -> None:
    scaled = ScaledTraining(set_to_none, init_scale=2.0**10, growth_interval=2)
    scales = set()
    for step in range(6):
        scaled.step(batch(step, padded=True))
        scaled.step(batch(80 + step), factor=float("inf"))
        scales.add(scaled.scaler.get_scale())
    assert scaled.taken == 6
    assert len(scales) > 1
    reference = tagger()
    other = CGLoRAOptimizer(reference, lr=1e-2)
    train(reference, other, range(6), padded=True)
    assert_same_training((scaled.model, scaled.optimizer), (reference, other), rtol=1e-4)
    assert not any(scaled.optimizer.diagnostics().values())


def test_an_overflow_in_the_forward_leaves_no_trace() -> None:
    """Inputs that are not finite belong to the step that never happens."""
    scaled = ScaledTraining(True, init_scale=2.0**10)
    poison = scaled.model.blocks[0].norm.weight
    for step in range(3):
        healthy = poison.detach().clone()
        poison.data.fill_(float("inf"))
        scaled.step(batch(90 + step))
        poison.data.copy_(healthy)
        scaled.step(batch(step, padded=True))
    assert scaled.taken == 3
    assert not any(scaled.optimizer.diagnostics().values())
    reference = tagger()
    other = CGLoRAOptimizer(reference, lr=1e-2)
    train(reference, other, range(3), padded=True)
    assert_same_training((scaled.model, scaled.optimizer), (reference, other), rtol=1e-4)
