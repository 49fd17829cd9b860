"""Frozen weights are moved and moved back, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import LoRAPair
from cg_optim.alignment import Factors
from cg_optim.errors import InitialisationError
from cg_optim.initialisation.base_weights import find_base_weight, find_base_weights, move
from tests.models import LoRALinear


def pair_of(layer: LoRALinear, name: str = "pair") -> LoRAPair:
    return LoRAPair(
        A=layer.lora_A.weight,
        B=layer.lora_B.weight,
        name=name,
        scaling=layer.scaling,
        input_module=layer,
        output_module=layer.lora_B,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_moving_back_is_exact_however_large_the_step(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(70, 60, r=3)
    layer.base_layer.to(dtype)
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    start = Factors(size * torch.randn(3, 70), torch.randn(60, 3))
    moved = move(find_base_weight(pair_of(layer)), start, 2.0)
    expected = before.double() - 2.0 * start.up.double() @ start.down.double()
    # A step in float32 onto a weight in float16 rounds twice.
    tolerance = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=tolerance)
    assert not torch.equal(weight, before) or size == 1e-4
    moved.move_back()
    assert torch.equal(weight, before)


def test_autocast_around_it_does_not_reach_the_weights() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(70, 60, r=3)
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    base, start = find_base_weight(pair_of(layer)), Factors(torch.randn(3, 70), torch.randn(60, 3))
    moved = move(base, start, 2.0)
    there = weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        moved.move_back()
        assert torch.equal(weight, before)
        move(base, start, 2.0)
    assert torch.equal(weight, there)


def test_moving_back_keeps_the_sign_of_zero() -> None:
    layer = LoRALinear(4, 3, r=1)
    weight = layer.base_layer.weight
    weight.data.fill_(-0.0)
    move(
        find_base_weight(pair_of(layer)), Factors(torch.ones(1, 4), torch.ones(3, 1)), 1.0
    ).move_back()
    assert bool(weight.signbit().all())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_larger_than_a_block_is_moved_whole(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(7, 23, r=2)
    if transposed:
        layer.base_layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(23, 7)
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    start = Factors(torch.randn(2, 7), torch.randn(23, 2))
    monkeypatch.setattr("cg_optim.initialisation.base_weights.BLOCK", 30)
    moved = move(find_base_weight(pair_of(layer)), start, 2.0)
    step = 2.0 * start.up @ start.down
    torch.testing.assert_close(weight.detach(), before - (step.T if transposed else step))
    assert moved.places.numel() > 0
    moved.move_back()
    assert torch.equal(weight, before)


def test_only_what_rounding_lost_is_remembered() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(200, 100, r=2)
    start = Factors(1e-2 * torch.randn(2, 200), 1e-2 * torch.randn(100, 2))
    moved = move(find_base_weight(pair_of(layer)), start, 1.0)
    assert moved.places.numel() < 0.05 * layer.base_layer.weight.numel()


def test_the_weight_of_a_conv1d_is_stored_transposed() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = LoRALinear(6, 6)
    layer.base_layer = conv1d(6, 6)
    x = torch.randn(4, 6)
    before = layer.base_layer(x).detach()
    start = Factors(torch.randn(2, 6), torch.randn(6, 2))
    move(find_base_weight(pair_of(layer)), start, 0.5)
    change = layer.base_layer(x).detach() - before
    torch.testing.assert_close(change, -0.5 * x @ start.down.T @ start.up.T)


class Quantized(nn.Module):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def test_refuses_a_quantized_weight() -> None:
    layer = LoRALinear(6, 5)
    layer.base_layer = Quantized(torch.zeros(15, 1, dtype=torch.uint8))
    with pytest.raises(InitialisationError, match=r"quantized \(torch.uint8\).*mode='keep'"):
        find_base_weight(pair_of(layer))
    layer.base_layer = nn.Linear(6, 5)
    layer.base_layer.weight.quant_state = object()
    with pytest.raises(InitialisationError, match="quantized"):
        find_base_weight(pair_of(layer))


def test_refuses_a_layer_without_a_fitting_weight() -> None:
    layer = LoRALinear(6, 5)
    layer.base_layer = nn.Linear(6, 4)
    with pytest.raises(InitialisationError, match=r"not found \(0 of shape \(5, 6\)"):
        find_base_weight(pair_of(layer))


def test_refuses_a_weight_shared_by_two_layers() -> None:
    one, two = LoRALinear(6, 5), LoRALinear(6, 5)
    two.base_layer = one.base_layer
    with pytest.raises(InitialisationError, match="share one base weight"):
        find_base_weights([pair_of(one, "one"), pair_of(two, "two")])
