"""Values that are not finite: skipped, counted, warned about once, never in the state."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import NumericalWarning
from cg_optim.events import MEANING
from tests.models import (
    LoRALinear,
    assert_equal,
    batch,
    loss_of,
    parameters_of,
    tagger,
    train,
)

BAD = [math.nan, math.inf, -math.inf]
HEALTHY = dict.fromkeys(MEANING, 0)


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    tensors: list[Tensor] = [p.detach() for p in model.parameters()]
    tensors += [v for s in optimizer.state.values() for v in s.values()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_gradient_skips_exactly_its_pair(value: float, factor: str, at: int) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(at))
    loss_of(model, batch(at)).backward()
    q = model.blocks[1].q
    getattr(q, factor).weight.grad[0, 1] = value
    before = parameters_of(model)
    moments = [optimizer.state.get(x.weight, {}).get("exp_avg") for x in (q.lora_A, q.lora_B)]
    kept = [None if m is None else m.clone() for m in moments]
    with pytest.warns(NumericalWarning, match=r"diagnostics\(\)") as caught:
        optimizer.step()
    assert len(caught) == 1
    after = parameters_of(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    pair = {"blocks.1.q.lora_A.weight", "blocks.1.q.lora_B.weight"}
    assert moved == set(after) - pair
    assert optimizer.diagnostics() == {**HEALTHY, "pair skipped": 1}
    assert all_finite(model, optimizer)
    for module, mean in zip((q.lora_A, q.lora_B), kept, strict=True):
        now = optimizer.state[module.weight]
        assert_equal(now["exp_avg"], torch.zeros_like(now["exp_avg"]) if mean is None else mean)
        assert int(now["step"]) == at
    optimizer.zero_grad()
    train(model, optimizer, range(at + 1, at + 3))
    assert not torch.equal(q.lora_B.weight.detach(), before["blocks.1.q.lora_B.weight"])


@pytest.mark.parametrize("value", BAD)
def test_a_bad_gradient_outside_pairs_skips_exactly_its_parameter(value: float) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    loss_of(model, batch(2)).backward()
    assert model.head.weight.grad is not None
    model.head.weight.grad[1, 2] = value
    before = parameters_of(model)
    with pytest.warns(NumericalWarning):
        optimizer.step()
    after = parameters_of(model)
    assert {n for n in after if torch.equal(after[n], before[n])} == {"head.weight"}
    assert int(optimizer.state[model.head.weight]["step"]) == 2
    assert optimizer.diagnostics() == {**HEALTHY, "parameter skipped": 1}
    assert all_finite(model, optimizer)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("at", [0, 2])
def test_bad_inputs_leave_the_curvature_as_it_was(value: float, at: int) -> None:
    torch.manual_seed(0)
    one = LoRALinear(6, 5)
    model = nn.ModuleList([one])
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    for _ in range(at):
        one(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = parameters_of(model)
    x = torch.randn(4, 6)
    x[2, 3] = value
    one(x).square().mean().backward()
    with pytest.warns(NumericalWarning) as caught:
        optimizer.step()
    assert len(caught) == 2
    assert_equal(parameters_of(model), before)
    assert all_finite(model, optimizer)
    counts = {**HEALTHY, "pair skipped": 1, "curvature update dropped": 1}
    assert optimizer.diagnostics() == counts
    optimizer.zero_grad()
    one(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    assert int(optimizer.state[one.lora_A.weight]["input_updates"]) == at + 1
    assert optimizer.diagnostics() == counts


def test_each_kind_of_event_is_warned_about_once() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            loss_of(model, batch(step)).backward()
            for parameter in parameters_with_gradient(model):
                parameter.grad = torch.full_like(parameter, math.nan)
            optimizer.step()
            optimizer.zero_grad()
    assert [w.category for w in caught] == [NumericalWarning] * 2
    assert optimizer.diagnostics() == {**HEALTHY, "pair skipped": 50, "parameter skipped": 30}


def parameters_with_gradient(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def test_a_healthy_run_counts_nothing() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    assert optimizer.diagnostics() == HEALTHY
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(12))
    assert optimizer.diagnostics() == HEALTHY


EXTREME: dict[str, dict[str, Any]] = {
    "zero inputs": {"inputs": 0.0},
    "constant inputs": {"constant": True},
    "tiny inputs": {"inputs": 1e-25},
    "denormal inputs": {"inputs": 1e-42},
    "large inputs": {"inputs": 1e15},
    "squares overflow": {"inputs": 1e25},
    "tiny gradients": {"loss": 1e-30},
    "large gradients": {"loss": 1e30},
    "one row": {"rows": 1},
    "B is zero": {"up": 0.0},
    "A is zero": {"down": 0.0},
    "both are zero": {"up": 0.0, "down": 0.0},
    "rank above width": {"r": 9},
    "rank one": {"r": 1},
}


@pytest.mark.filterwarnings("ignore::cg_optim.errors.NumericalWarning")
@pytest.mark.parametrize("curvature", ["dense", 2, None])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_scales_and_shapes_stay_finite(name: str, curvature: Any) -> None:
    case = {"inputs": 1.0, "loss": 1.0, "rows": 7, "r": 2, "constant": False, **EXTREME[name]}
    torch.manual_seed(0)
    one = LoRALinear(6, 5, r=case["r"])
    with torch.no_grad():
        one.lora_A.weight.mul_(case.get("down", 1.0))
        one.lora_B.weight.mul_(case.get("up", 1.0))
    model = nn.ModuleList([one])
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature)
    for _ in range(6):
        x = torch.randn(case["rows"], 6) * case["inputs"]
        x = torch.ones_like(x) if case["constant"] else x
        (one(x).sin().mean() * case["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all_finite(model, optimizer)
    assert sum(optimizer.diagnostics().values()) <= 12


def test_a_bad_gradient_survives_saving_and_loading() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    loss_of(model, batch(0)).backward()
    assert model.blocks[0].q.lora_A.weight.grad is not None
    model.blocks[0].q.lora_A.weight.grad.fill_(math.nan)
    with pytest.warns(NumericalWarning):
        optimizer.step()
    other = CGLoRAOptimizer(model, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    assert_equal(other.state_dict(), optimizer.state_dict())
