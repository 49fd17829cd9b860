"""Autocast around a step, a look at it or a weight that is moved changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from cg_optim.precision import autocast_off
from tests.models import assert_equal, batch, loss_of, snapshot, tagger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("curvature", "init"), [("auto", None), (3, None), (3, "curvature")])
def test_a_step_inside_is_bitwise_the_step_outside(
    curvature: str | int, init: str | None, dtype: torch.dtype
) -> None:
    def trained(around: bool) -> Any:
        model = tagger().to(dtype)
        for block in model.blocks:
            nn.init.zeros_(block.q.lora_B.weight)
        optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature, init=init)
        seen = []
        for step in range(3):
            loss_of(model, batch(step)).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                seen.append([str(layer) for layer in optimizer.layer_diagnostics()])
                optimizer.step()
            optimizer.zero_grad()
        return seen, snapshot(model, optimizer)

    (seen, state), (expected_seen, expected) = trained(around=True), trained(around=False)
    assert seen == expected_seen
    assert_equal(state, expected)


def test_the_closure_keeps_it() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    dtypes = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        dtypes.append(model(*batch(0)[:2]).dtype)
        loss.backward()
        return float(loss.detach())

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert dtypes == [torch.bfloat16]


def test_it_is_off_inside_and_back_on_afterwards() -> None:
    one = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_off([one, torch.empty(1, device="meta")]):
            assert (one @ one).dtype == torch.float32
        assert (one @ one).dtype == torch.bfloat16
        with autocast_off([]):
            assert (one @ one).dtype == torch.bfloat16
