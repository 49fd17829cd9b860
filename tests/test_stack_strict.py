"""``strict=True`` raises what is absorbed otherwise; warnings point at the user's line."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import (
    CGOptimError,
    NoPairsWarning,
    NumericalError,
    NumericalWarning,
    UnobservedPairWarning,
)
from cg_optim.events import MEANING
from tests.models import LoRALinear, assert_equal, batch, loss_of, parameters_of, tagger, train


def bad_pair(model: nn.Module) -> None:
    model.blocks[1].q.lora_A.weight.grad[0, 0] = math.nan


def bad_parameter(model: nn.Module) -> None:
    model.head.weight.grad[0, 0] = math.inf


@pytest.mark.parametrize(
    ("spoil", "where"),
    [(bad_pair, r"pair skipped \(blocks\.1\.q\)"), (bad_parameter, r"skipped \(head\.weight\)")],
)
def test_a_bad_gradient_is_an_error_that_names_its_place(
    spoil: Callable[[nn.Module], None], where: str
) -> None:
    model, reference = tagger(), tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2, strict=True)
    other = CGLoRAOptimizer(reference, lr=1e-2)
    for each in (model, reference):
        loss_of(each, batch()).backward()
        spoil(each)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NumericalError, match=where):
            optimizer.step()
    with pytest.warns(NumericalWarning):
        other.step()
    # Everything else is as without strict, the counts included.
    assert_equal(parameters_of(model), parameters_of(reference))
    assert optimizer.diagnostics() == other.diagnostics()
    optimizer.zero_grad()
    train(model, optimizer, range(1, 3))  # an error is raised once


def test_bad_inputs_are_an_error_that_names_their_layer() -> None:
    model = nn.ModuleDict({"one": LoRALinear(6, 5), "two": LoRALinear(6, 5)})
    optimizer = CGLoRAOptimizer(model, strict=True)
    x = torch.ones(3, 6)
    (model["one"](x) + model["two"](x * math.inf)).sum().backward()
    with pytest.raises(NumericalError, match=r"dropped \(input of two\)"):
        optimizer.step()


def test_a_repaired_factorisation_is_an_error() -> None:
    model = nn.ModuleDict({"one": LoRALinear(6, 5)})
    optimizer = CGLoRAOptimizer(model, strict=True)
    model["one"](torch.ones(3, 6)).sum().backward()
    with torch.no_grad():
        model["one"].lora_A.weight.fill_(3e38)  # A X A^T is beyond float32
    with pytest.raises(NumericalError, match="factorisation repaired"):
        optimizer.step()
    assert optimizer.diagnostics()["factorisation repaired"] == 1


def test_copies_and_pickles_stay_strict() -> None:
    _, optimizer = copy.deepcopy((model := tagger(), CGLoRAOptimizer(model, strict=True)))
    optimizer.param_groups[0]["lr"] = math.nan
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(NumericalError):
        optimizer.step()


def test_the_error_is_one_of_ours_and_a_runtime_error() -> None:
    assert issubclass(NumericalError, CGOptimError)
    assert issubclass(NumericalError, RuntimeError)


def test_healthy_training_is_the_same_with_and_without() -> None:
    model, reference = tagger(), tagger()
    train(model, CGLoRAOptimizer(model, lr=1e-2, strict=True), range(8))
    train(reference, CGLoRAOptimizer(reference, lr=1e-2), range(8))
    assert_equal(parameters_of(model), parameters_of(reference))


# --------------------------------------------------------- numbers changed during training


@pytest.mark.filterwarnings("ignore::cg_optim.errors.NumericalWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr": torch.tensor(math.nan)},
        {"lr": 1e38, "weight_decay": 1e3},
        {"weight_decay": math.nan},
        {"eps": math.nan},
        {"betas": (1.0, 1.0)},
        {"betas": (0.9, math.nan)},
    ],
    ids=str,
)
def test_a_useless_number_in_a_group_moves_nothing_and_is_counted(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tagger().to(dtype)
    optimizer = CGLoRAOptimizer(model, lr=1e-2, eps=1e-4)
    train(model, optimizer, range(2))
    before = parameters_of(model)
    healthy = {name: optimizer.param_groups[0][name] for name in changes}
    optimizer.param_groups[0].update(changes)
    train(model, optimizer, range(2, 4))
    assert_equal(parameters_of(model), before)
    # Every pair and every other parameter, in both steps.
    expected = {"pair skipped": 20, "parameter skipped": 12}
    assert optimizer.diagnostics() == {**dict.fromkeys(MEANING, 0), **expected}
    optimizer.param_groups[0].update(healthy)
    train(model, optimizer, range(4, 6))
    assert all(bool(torch.isfinite(value).all()) for value in parameters_of(model).values())
    assert not torch.equal(parameters_of(model)["head.weight"], before["head.weight"])


def half(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((3, 2), value, dtype=torch.float16))


@pytest.mark.filterwarnings("ignore::cg_optim.errors.NumericalWarning")
@pytest.mark.parametrize(
    ("start", "grad", "arguments"),
    [
        (65000.0, -1.0, {"lr": 1000.0, "eps": 1e-3}),  # leaves the range of float16
        (1.0, 1e-7, {"lr": 1e-3}),  # the square and eps vanish: 0 is divided by
        (1.0, 0.0, {"lr": 1e-3, "eps": 0.0}),  # 0 / 0
    ],
)
def test_a_step_out_of_the_range_of_a_plain_parameter_is_not_taken(
    start: float, grad: float, arguments: dict[str, float]
) -> None:
    parameter, other = half(start), nn.Parameter(torch.ones(2))
    optimizer = CGLoRAOptimizer(
        [parameter, other], curvature=None, **{"weight_decay": 0.0, **arguments}
    )
    parameter.grad = torch.full_like(parameter, grad)
    other.grad = torch.ones(2)
    optimizer.step()
    assert bool((parameter == start).all())
    assert not bool((other == 1).any())
    assert optimizer.diagnostics()["parameter skipped"] == 1
    state = optimizer.state[parameter]
    assert not any(bool(value.any()) for value in state.values())


@pytest.mark.filterwarnings("ignore::cg_optim.errors.NumericalWarning")
def test_a_step_out_of_the_range_of_a_half_precision_pair_is_not_taken() -> None:
    model = nn.ModuleDict({"one": LoRALinear(6, 5)}).half()
    optimizer = CGLoRAOptimizer(model, lr=60000.0, weight_decay=0.0)
    with torch.no_grad():
        model["one"].lora_B.weight.fill_(60000.0)
    before = parameters_of(model)
    for parameter in (model["one"].lora_A.weight, model["one"].lora_B.weight):
        parameter.grad = -torch.ones_like(parameter)
    optimizer.step()
    assert_equal(parameters_of(model), before)
    assert optimizer.diagnostics()["pair skipped"] == 1


# ------------------------------------------------------------------ where warnings point


def line_of(caught: list[warnings.WarningMessage]) -> tuple[str, int]:
    (warning,) = caught
    return warning.filename, warning.lineno


def here() -> tuple[str, int]:
    frame = sys._getframe(1)
    return __file__, frame.f_lineno


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("way", ["step", "closure", "scheduled"])
def test_numerical_warnings_point_at_the_line_that_calls_step(way: str) -> None:
    model = nn.ModuleDict({"one": LoRALinear(6, 5)})
    optimizer = CGLoRAOptimizer(model)
    if way == "scheduled":  # the scheduler wraps step
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for parameter in (model["one"].lora_A.weight, model["one"].lora_B.weight):
        parameter.grad = torch.full_like(parameter, math.nan)
    arguments = (lambda: 0.0,) if way == "closure" else ()
    with pytest.warns(NumericalWarning) as caught:
        optimizer.step(*arguments), (place := here())
    assert line_of(list(caught)) == place


def test_other_warnings_point_at_their_line_too() -> None:
    with pytest.warns(NoPairsWarning) as caught:
        CGLoRAOptimizer(nn.Linear(2, 2)), (place := here())
    assert line_of(list(caught)) == place

    class Subclass(CGLoRAOptimizer):
        pass

    model = nn.ModuleDict({"one": LoRALinear(6, 5)})
    optimizer = Subclass(model)
    one = model["one"]
    low = torch.nn.functional.linear(torch.ones(2, 6), one.lora_A.weight)
    torch.nn.functional.linear(low, one.lora_B.weight).sum().backward()
    with pytest.warns(UnobservedPairWarning) as caught:
        optimizer.step(), (place := here())
    assert line_of(list(caught)) == place
    assert "hooks, dense 6x6 (nothing seen yet)" in optimizer.summary()
