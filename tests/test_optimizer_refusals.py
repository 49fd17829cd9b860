"""Bad input is refused with a typed error that names it, and nothing is half changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer, LoRAPair
from cg_optim.errors import (
    AdapterError,
    CGOptimError,
    GradientError,
    HyperparameterError,
    NoPairsWarning,
    PairError,
    ParameterError,
)
from tests.models import assert_equal, batch, loss_of, snapshot, tagger, train

NAN, INF = math.nan, math.inf

BAD_NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1e-3}, "-0.001"),
    ({"lr": NAN}, "nan"),
    ({"lr": INF}, "inf"),
    ({"lr": "fast"}, "fast"),
    ({"lr": True}, "True"),
    ({"lr": torch.tensor([0.1, 0.2])}, r"\(2,\)"),
    ({"lr": torch.tensor(-1.0)}, "-1.0"),
    ({"lr": torch.tensor(NAN)}, "nan"),
    ({"momentum": 1.0}, "momentum is 1.0"),
    ({"momentum": NAN}, "momentum is nan"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
    ({"betas": (0.9, NAN)}, r"betas\[1\] is nan"),
    ({"betas": (0.9,)}, "two numbers"),
    ({"betas": 0.9}, "two numbers"),
    ({"eps": -1e-8}, "eps is -1e-08"),
    ({"eps": NAN}, "eps is nan"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"weight_decay": INF}, "weight_decay is inf"),
    ({"damping": 0.0}, "damping is 0.0"),
    ({"damping": -1.0}, "damping is -1.0"),
    ({"damping": NAN}, "damping is nan"),
    ({"curvature": "full"}, "'full'"),
    ({"curvature": 0}, "curvature is 0"),
    ({"curvature": True}, "curvature is True"),
    ({"curvature": 1.5}, "curvature is 1.5"),
]


def has_hooks(model: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    ) or any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(("arguments", "message"), BAD_NUMBERS)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    model = tagger()
    with pytest.raises(HyperparameterError, match=message):
        CGLoRAOptimizer(model, **arguments)
    assert not has_hooks(model)
    if "curvature" not in arguments:
        groups = [{"params": list(model.head.parameters()), **arguments}]
        with pytest.raises(HyperparameterError, match=message):
            CGLoRAOptimizer(groups, model=model)
        optimizer = CGLoRAOptimizer(list(model.blocks.parameters())[:1], curvature=None)
        with pytest.raises(HyperparameterError, match=message):
            optimizer.add_param_group(groups[0])
        assert len(optimizer.param_groups) == 1


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


BAD_PARAMETERS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: [], "nothing to optimise"),
    "only an empty group": (lambda: [{"params": []}], "nothing to optimise"),
    "a single tensor": (lambda: nn.Parameter(torch.ones(2)), "Parameter"),
    "a number": (lambda: 3, "int"),
    "a string": (lambda: ["weight"], "str"),
    "a group without params": (lambda: [{"lr": 0.1}], "'params'"),
    "a group among tensors": (lambda: [nn.Parameter(torch.ones(2)), {"params": []}], "dict"),
    "a set": (lambda: {nn.Parameter(torch.ones(2))}, "set"),
    "a set in a group": (lambda: [{"params": {nn.Parameter(torch.ones(2))}}], "set"),
    "complex": (lambda: [nn.Parameter(torch.ones(2, dtype=torch.complex64))], "complex64"),
    "integers": (lambda: [torch.ones(2, dtype=torch.int64)], "int64"),
    "not a leaf": (lambda: [torch.ones(2, requires_grad=True) * 2], "leaf"),
    "twice": (lambda: [nn.Parameter(torch.ones(2))] * 2, "given twice"),
    "twice in groups": (
        lambda: [{"params": p, "lr": 0.1} for p in [nn.Parameter(torch.ones(2))] * 2],
        "group 1 .* given twice",
    ),
    "a module without parameters": (lambda: nn.ReLU(), "nothing to optimise|frozen"),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_parameters_that_cannot_be_optimised(name: str) -> None:
    make, message = BAD_PARAMETERS[name]
    with pytest.raises(ParameterError, match=message):
        CGLoRAOptimizer(make())


def test_a_frozen_adapter() -> None:
    model = _frozen(tagger())
    with pytest.raises(AdapterError, match=r"requires_grad|frozen"):
        CGLoRAOptimizer(model)
    assert not has_hooks(model)


def test_factors_whose_ranks_disagree() -> None:
    with pytest.raises(PairError, match=r"rank 2 .*rank 3"):
        LoRAPair(nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 3)))


def test_pairs_that_share_a_parameter() -> None:
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    pairs = [LoRAPair(a, b, name="one"), LoRAPair(a, c, name="two")]
    with pytest.raises(PairError, match="'two' already belongs to 'one'"):
        CGLoRAOptimizer([a, b, c], pairs=pairs)


@pytest.mark.parametrize("pairs", [3, LoRAPair(*(nn.Parameter(torch.ones(2, 2)) for _ in "AB"))])
def test_pairs_that_are_no_list(pairs: Any) -> None:
    with pytest.raises(PairError, match="expected a list of LoRAPair"):
        CGLoRAOptimizer(tagger(), pairs=pairs)


def test_pairs_that_are_plain_tuples() -> None:
    model = tagger()
    with pytest.raises(PairError, match=r"tuple; expected LoRAPair"):
        CGLoRAOptimizer(model, pairs=[(model.head.weight, model.head.weight)])  # type: ignore[list-item]


def test_a_model_that_is_no_module() -> None:
    with pytest.raises(ParameterError, match="model is a dict"):
        CGLoRAOptimizer([nn.Parameter(torch.ones(2))], model={})  # type: ignore[arg-type]


def test_every_error_derives_from_one_class_and_from_the_builtin() -> None:
    for error, builtin in (
        (HyperparameterError, ValueError),
        (ParameterError, ValueError),
        (AdapterError, ValueError),
        (PairError, ValueError),
        (GradientError, RuntimeError),
    ):
        assert issubclass(error, CGOptimError)
        assert issubclass(error, builtin)


# ------------------------------------------------------- nothing is half changed


def test_a_sparse_gradient_is_refused_and_training_goes_on_after_it() -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    train(model, optimizer, range(2))
    train(reference, other, range(4))
    before = snapshot(model, optimizer)
    loss_of(model, batch(2)).backward()
    dense, model.head.weight.grad = model.head.weight.grad, None
    assert dense is not None
    model.head.weight.grad = dense.to_sparse()
    with pytest.raises(GradientError, match=r"\(3, 8\).*sparse"):
        optimizer.step()
    assert_equal(snapshot(model, optimizer), before)
    model.head.weight.grad = dense
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, [3])
    assert_equal(snapshot(model, optimizer), snapshot(reference, other))


def test_an_exception_in_the_closure_changes_nothing() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)

    def closure() -> float:
        loss_of(model, batch(2)).backward()
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert_equal(snapshot(model, optimizer), before)


def test_a_refused_group_changes_nothing() -> None:
    model = tagger()
    lora = [p for n, p in model.named_parameters() if "lora" in n]
    optimizer = CGLoRAOptimizer(lora, lr=1e-2, model=model)
    before = repr(optimizer)
    known = [lora[0]]
    with pytest.raises(ParameterError, match="given twice"):
        optimizer.add_param_group({"params": known})
    for parameter in lora:
        parameter.requires_grad_(False)
    with pytest.raises(AdapterError):
        optimizer.add_param_group({"params": model.head.parameters()})
    assert repr(optimizer) == before


def test_no_pairs_in_the_given_parameters_is_only_a_warning() -> None:
    model = tagger()
    with pytest.warns(NoPairsWarning, match="no LoRA pair"):
        CGLoRAOptimizer(model.head.parameters(), model=model)


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_variants_of_adam_that_are_not_there_are_refused(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(HyperparameterError, match=name):
        CGLoRAOptimizer([{"params": [parameter], name: True}], lr=1e-3, curvature=None)


def test_two_different_models_are_refused() -> None:
    with pytest.raises(ParameterError, match="another module"):
        CGLoRAOptimizer(torch.nn.Linear(2, 2), model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float64])
def test_numbers_of_numpy_become_python_s(kind: type) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter], "weight_decay": kind(0.5)}]
    optimizer = CGLoRAOptimizer(groups, lr=kind(0.25), curvature=None)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert {type(group["lr"]), type(group["weight_decay"])} == {float}
