"""The path of accelerators for parameters outside pairs, run on the CPU's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_optim.plain_step import step_plain, step_unless


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), torch.tensor(1e-2).double()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_like_adamw_and_leaves_a_bad_gradient_out(lr: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(5, 3, dtype=dtype))
    other = nn.Parameter(mine.detach().clone())
    theirs = torch.optim.AdamW([other], lr=1e-2, weight_decay=0.1)
    group = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    state: dict[str, Tensor] = {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(mine),
        "exp_avg_sq": torch.zeros_like(mine),
    }
    for step in range(6):
        mine.grad = torch.randn(5, 3, dtype=dtype)
        other.grad = mine.grad.clone()
        bad = step in (0, 3)
        if bad:
            mine.grad[1, 1] = torch.nan
        before = {name: value.clone() for name, value in state.items()}
        value = mine.detach().clone()
        with torch.no_grad():
            step_unless(torch.tensor(bad), mine, state, group)
        if bad:
            torch.testing.assert_close(state, before, rtol=0, atol=0)
            torch.testing.assert_close(mine.detach(), value, rtol=0, atol=0)
        else:
            theirs.step()
    torch.testing.assert_close(mine, other)
    assert float(state["step"]) == 4


def test_says_which_parameters_were_left_alone() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter, value in zip(parameters, (1.0, torch.nan, torch.inf), strict=True):
        parameter.grad = torch.full((2,), value)
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    states: list[dict[str, Any]] = [{} for _ in parameters]
    with torch.no_grad():
        left_alone = step_plain(parameters, states, group)
    assert [bool(flag) for flag in left_alone] == [False, True, True]
    assert [bool((p != 1).all()) for p in parameters] == [True, False, False]
