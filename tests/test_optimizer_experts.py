"""Several experts in one pair of parameters train as pairs of their own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer, LoRAPair
from cg_optim.discovery import find_lora_pairs
from cg_optim.errors import NumericalWarning
from tests.models import assert_equal

EXPERTS, R, N, M = 3, 2, 5, 7


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(EXPERTS * R, N, generator=generator)
    b = torch.randn(M, R * EXPERTS, generator=generator)
    return nn.Parameter(a), nn.Parameter(b)


def optimizer_of(a: nn.Parameter, b: nn.Parameter) -> CGLoRAOptimizer:
    return CGLoRAOptimizer([a, b], lr=1e-2, pairs=[LoRAPair(a, b, name="moe", experts=EXPERTS)])


def give_gradients(a: nn.Parameter, b: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    a.grad = torch.randn(a.shape, generator=generator)
    b.grad = torch.randn(b.shape, generator=generator)


def of_expert(a: torch.Tensor, b: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT says belongs to one expert."""
    return a[e * R : (e + 1) * R].clone(), b[:, e::EXPERTS].clone()


def test_they_step_as_separate_pairs_do() -> None:
    a, b = parameters()
    optimizer = optimizer_of(a, b)
    split = [tuple(map(nn.Parameter, of_expert(a.detach(), b.detach(), e))) for e in range(EXPERTS)]
    pairs = [LoRAPair(*factors, name=str(e)) for e, factors in enumerate(split)]
    separate = CGLoRAOptimizer([p for factors in split for p in factors], lr=1e-2, pairs=pairs)
    for step in range(4):
        give_gradients(a, b, step)
        for e, (one_a, one_b) in enumerate(split):
            one_a.grad, one_b.grad = of_expert(a.grad, b.grad, e)
        optimizer.step()
        separate.step()
    for e, (one_a, one_b) in enumerate(split):
        mine = of_expert(a.detach(), b.detach(), e)
        torch.testing.assert_close(mine, (one_a.detach(), one_b.detach()))
    assert optimizer.state[a]["step"] == 4
    assert optimizer.state[a]["step"].shape == ()


def test_they_are_not_stepped_as_one_matrix() -> None:
    a, b = parameters()
    whole_a, whole_b = parameters()
    whole = CGLoRAOptimizer([whole_a, whole_b], lr=1e-2, pairs=[LoRAPair(whole_a, whole_b)])
    optimizer = optimizer_of(a, b)
    give_gradients(a, b, 0)
    give_gradients(whole_a, whole_b, 0)
    optimizer.step()
    whole.step()
    assert not torch.allclose(b, whole_b, atol=1e-4)


def test_one_gradient_that_is_not_finite_leaves_all_of_them() -> None:
    a, b = parameters()
    optimizer = optimizer_of(a, b)
    give_gradients(a, b, 0)
    optimizer.step()
    before = copy.deepcopy((a.data, b.data, optimizer.state_dict()["state"]))
    give_gradients(a, b, 1)
    b.grad[0, 1] = math.nan  # of the second expert
    with pytest.warns(NumericalWarning, match="LoRA pair"):
        optimizer.step()
    assert_equal((a.data, b.data, optimizer.state_dict()["state"]), before)
    assert optimizer.diagnostics()["pair skipped"] == 1


def test_an_expert_without_tokens_and_a_factor_without_gradient() -> None:
    a, b = parameters()
    optimizer = optimizer_of(a, b)
    give_gradients(a, b, 0)
    a.grad = None
    b.grad[:, 0::EXPERTS] = 0
    first = of_expert(a.detach(), b.detach(), 0)
    optimizer.step()
    decayed = 1 - 1e-2 * optimizer.defaults["weight_decay"]
    torch.testing.assert_close(of_expert(a.detach(), b.detach(), 0), (first[0], first[1] * decayed))
    assert not any(optimizer.diagnostics().values())


def test_looking_and_resuming() -> None:
    a, b = parameters()
    optimizer = optimizer_of(a, b)
    give_gradients(a, b, 0)
    optimizer.step()
    other_a, other_b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())
    other = optimizer_of(other_a, other_b)
    other.load_state_dict(optimizer.state_dict())
    give_gradients(a, b, 1)
    give_gradients(other_a, other_b, 1)
    (layer,) = optimizer.layer_diagnostics()
    assert layer.relative_step_B > 0
    assert layer.hidden_condition >= 1
    before = b.detach().clone() * (1 - 1e-2 * optimizer.defaults["weight_decay"])
    optimizer.step()
    other.step()
    assert_equal((a, b), (other_a, other_b))
    assert layer.update_size_B == pytest.approx(
        float((b.detach() - before).square().mean().sqrt()) / 1e-2, rel=1e-3
    )


def test_peft_keeps_experts_this_way() -> None:
    peft = pytest.importorskip("peft")
    from benchmarks.peft_kinds import Mixture

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["first.weight"], init_lora_weights=False
    )
    model = peft.get_peft_model(Mixture(), config)
    (pair,) = find_lora_pairs(model).pairs
    assert (pair.experts, pair.rank) == (3, 4)
    assert pair.kind == "peft.ParamWrapper, 3 experts"
    downs, ups = pair.as_matrices(pair.A.detach(), pair.B.detach())
    (layer,) = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    delta = layer.get_delta_weight("default").detach()
    products = pair.scaling * ups @ downs
    # PEFT finds out in which order the weight has its inputs and outputs.
    swapped = getattr(layer, "_did_swap_in_out_features", False)
    torch.testing.assert_close(delta if swapped else delta.mT, products)
