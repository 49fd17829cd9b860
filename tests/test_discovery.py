"""What holds for all layers: names, sharing, frozen halves and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cg_optim.discovery import Discovery, find_lora_pairs
from cg_optim.errors import AdapterError, PairError
from tests.lora_layers import (
    Generic,
    M,
    OnSubclass,
    R,
    Stack,
    only_pair,
    parameter,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
def test_wrapped_models_keep_their_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Stack(OnSubclass(), nn.ReLU(), Generic()))
    names = {module: name for name, module in model.named_modules()}
    for pair in find_lora_pairs(model).pairs:
        assert pair.input_module is not None
        assert pair.name == names[pair.input_module]


def test_a_compiled_layer_is_found_once() -> None:
    assert only_pair(find_lora_pairs(Stack(torch.compile(OnSubclass())))).name  # type: ignore[arg-type]


def test_the_model_itself_may_be_the_layer() -> None:
    assert only_pair(find_lora_pairs(OnSubclass())).name == "OnSubclass"


# ------------------------------------------------------------------- training or not, ties


def test_half_frozen_pairs_are_left_out() -> None:
    layer = OnSubclass()
    layer.lora_A.requires_grad_(False)
    assert find_lora_pairs(Stack(layer)) == Discovery(
        (), {"layers.0.lora_B": "its partner layers.0.lora_A is frozen"}
    )


def test_refuses_a_model_whose_adapters_are_all_frozen() -> None:
    model = Stack(OnSubclass(), Generic())
    model.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"layers\.0\.lora_A.*frozen.*is_trainable=True"):
        find_lora_pairs(model)
    model.layers[1].requires_grad_(True)
    assert only_pair(find_lora_pairs(model)).name == "layers.1"


def test_a_layer_used_twice_is_found_once() -> None:
    layer = OnSubclass()
    pair = only_pair(find_lora_pairs(Stack(layer, nn.ReLU(), layer)))
    assert (pair.name, pair.observed) == ("layers.0", True)


def test_tied_pairs_are_found_once_and_not_observed() -> None:
    first, second = OnSubclass(), OnSubclass()
    second.lora_A, second.lora_B = first.lora_A, first.lora_B
    pair = only_pair(find_lora_pairs(Stack(first, second)))
    assert pair.name == "layers.0"
    assert not pair.observed
    assert "tied" in pair.note


@pytest.mark.parametrize("by_view", [False, True])
def test_factors_of_several_pairs_are_left_out(by_view: bool) -> None:
    first, second, third = OnSubclass(), OnSubclass(), OnSubclass()
    second.lora_A = nn.Parameter(first.lora_A.detach()) if by_view else first.lora_A
    found = find_lora_pairs(Stack(first, second, third))
    assert [pair.name for pair in found.pairs] == ["layers.2"]
    assert {"layers.0.lora_A", "layers.0.lora_B", "layers.1.lora_B"} <= found.left_out.keys()
    assert set(found.left_out.values()) == {"shared between several adapters"}


# ----------------------------------------------------------------------------- refusals


def test_refuses_ranks_that_disagree() -> None:
    layer = OnSubclass()
    layer.lora_B = parameter(M, R + 1)
    with pytest.raises(PairError, match=r"layers\.0: A \(2, 6\) has rank 2 but B \(10, 3\)"):
        find_lora_pairs(Stack(layer))


def test_refuses_a_partitioned_factor() -> None:
    layer = OnSubclass()
    layer.lora_A = nn.Parameter(torch.empty(0))
    with pytest.raises(AdapterError, match=r"layers\.0\.lora_A.*ZeRO-3"):
        find_lora_pairs(Stack(layer))


def test_refuses_a_flat_parameter_with_lora_inside() -> None:
    model = nn.Module()
    model._flat_param = parameter(40)
    model._flat_param._fqns = ("weight", "layers.0.lora_A")  # as FSDP1 records its content
    with pytest.raises(AdapterError, match=r"layers\.0\.lora_A.*FSDP1"):
        find_lora_pairs(model)
