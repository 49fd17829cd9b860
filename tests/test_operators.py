"""On an accelerator a step takes as long as it takes to launch its operators: they are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cg_optim import CGLoRAOptimizer, host
from cg_optim.curvature_store import WARM_UP_STEPS, collects_at
from tests.models import LoRALinear

WIDTH = 12


class Operators(TorchDispatchMode):
    """Counts the operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [each.alias_info for each in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def operators_of_a_step(layers: int) -> dict[bool, int]:
    """By whether it folds in new curvature."""
    torch.manual_seed(0)
    model = nn.Sequential(*(LoRALinear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=3)
    found = {}
    for step in range(WARM_UP_STEPS + 2):
        model(torch.randn(5, WIDTH)).square().sum().backward()
        with Operators() as operators:
            optimizer.step()
        optimizer.zero_grad()
        found[collects_at(step)] = operators.count
    return found


def test_their_number_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    few, many = operators_of_a_step(2), operators_of_a_step(9)
    assert few == many
    # What an H200 was timed with was 400 for each shape of pairs, and 10 times that.
    assert few[False] < 320
    assert few[True] < 600
