"""What the optimizer tells about each pair, and that telling it changes nothing."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cg_optim import CGLoRAOptimizer, LoRAPair
from cg_optim.curvature_store import collects_at
from cg_optim.diagnostics import (
    LayerDiagnostics,
    scalars,
    step_and_compare,
    table,
)
from cg_optim.errors import NumericalWarning
from cg_optim.linalg import effective_rank
from tests.models import (
    LoRALinear,
    assert_equal,
    batch,
    loss_of,
    parameters_of,
    snapshot,
    tagger,
    train,
)

#: A step before which nothing is collected, so that looking before it sees what it uses.
QUIET = next(step for step in range(100) if not collects_at(step))


def one_layer(n: int = 6, seed: int = 0) -> tuple[nn.Module, CGLoRAOptimizer, Tensor]:
    """A layer after one backward and step on ``x``, with the gradients still there."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layer": LoRALinear(n, 5, r=3)})
    optimizer = CGLoRAOptimizer(model, lr=1e-3, damping=0.5)
    x = torch.randn(64, n) * torch.logspace(0, -2, n)
    model["layer"](x).square().mean().backward()
    optimizer.step()
    return model, optimizer, x


def test_input_curvature_is_that_of_the_inputs() -> None:
    _, optimizer, x = one_layer()
    (layer,) = optimizer.layer_diagnostics()
    eigenvalues = torch.linalg.eigvalsh((x.mT @ x / len(x)).double())
    mean = eigenvalues.mean()
    assert layer.name == "layer"
    assert layer.seen
    assert (layer.curvature_updates, layer.missed_steps, layer.damping) == (1, 0, 0.5)
    assert layer.mean_curvature == pytest.approx(float(mean), rel=1e-5)
    damped = eigenvalues / mean + 0.5
    assert layer.input_condition == pytest.approx(float(damped[-1] / damped[0]), rel=1e-4)
    share = eigenvalues / eigenvalues.sum()
    assert layer.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()), 1e-4)


def test_hidden_condition_is_that_of_the_damped_p() -> None:
    model, optimizer, x = one_layer()
    (layer,) = optimizer.layer_diagnostics()
    covariance = (x.mT @ x / len(x)).double()
    damped = covariance / covariance.trace() * 6 + 0.5 * torch.eye(6)
    down = model["layer"].lora_A.weight.detach().double()
    eigenvalues = torch.linalg.eigvalsh(down @ damped @ down.mT)
    eigenvalues = eigenvalues + 0.5 * eigenvalues.mean()
    expected = float(eigenvalues[-1] / eigenvalues[0])
    assert layer.hidden_condition == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("features", [1, 7])
def test_effective_rank_of_known_spectra(features: int) -> None:
    assert effective_rank(torch.ones(features)) == pytest.approx(features)
    assert effective_rank(torch.eye(features)[0] * 3) == pytest.approx(1)
    assert math.isnan(effective_rank(torch.zeros(features)))


def test_a_large_input_is_described_by_its_directions_and_tail() -> None:
    _, optimizer, x = one_layer(n=200)
    (layer,) = optimizer.layer_diagnostics()
    eigenvalues = torch.linalg.eigvalsh((x.mT @ x / len(x)).double()).clamp_min(0)
    assert layer.mean_curvature == pytest.approx(float(eigenvalues.mean()), rel=1e-4)
    assert 1 < layer.effective_rank < 200
    assert layer.input_condition > 1


def backward(model: nn.Module, seed: int) -> None:
    loss_of(model, batch(seed)).backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_step_it_tells_of_is_the_step_that_is_taken(weight_decay: float) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2, weight_decay=weight_decay)
    train(model, optimizer, range(QUIET))
    backward(model, QUIET)
    told = optimizer.layer_diagnostics()
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.step()
    modules = dict(model.named_modules())
    assert len(told) == len(optimizer._pairs) == 10
    for layer in told:
        decrease = 0.0
        for letter in ("A", "B"):
            factor = getattr(modules[layer.name], f"lora_{letter}").weight
            change = factor.detach() - before[factor] * (1 - 1e-2 * weight_decay)
            relative = getattr(layer, f"relative_step_{letter}")
            size = getattr(layer, f"update_size_{letter}")
            assert relative == pytest.approx(float(change.norm() / before[factor].norm()), 1e-3)
            assert size == pytest.approx(float(change.square().mean().sqrt()) / 1e-2, rel=1e-3)
            decrease -= float((factor.grad * change).sum())
        assert layer.predicted_decrease == pytest.approx(decrease, rel=1e-3)


def test_looking_changes_nothing() -> None:
    model, twin = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(twin, lr=1e-2)
    assert optimizer.layer_diagnostics()
    assert not optimizer.state
    for seed in range(8):
        backward(model, seed)
        backward(twin, seed)
        before = snapshot(model, optimizer)
        optimizer.layer_diagnostics()
        assert_equal(snapshot(model, optimizer), before)
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert_equal(parameters_of(model), parameters_of(twin))
    assert optimizer.diagnostics() == other.diagnostics()


@pytest.mark.parametrize("collecting", [True, False])
def test_repairs_are_counted_by_the_step_whether_it_was_looked_at_or_not(collecting: bool) -> None:
    ended = []
    for looking in (True, False):
        model, optimizer, _ = one_layer()
        saved = optimizer.state_dict()
        saved["state"][0]["input_gram"][0, 0] *= -4  # a damaged checkpoint: indefinite
        optimizer.load_state_dict(saved)
        if not collecting:
            optimizer.remove_hooks()
        optimizer.zero_grad()
        model["layer"](torch.ones(3, 6)).sum().backward()
        if looking:
            optimizer.layer_diagnostics()
        with pytest.warns(NumericalWarning):
            optimizer.step()
        ended.append((optimizer.diagnostics(), parameters_of(model)))
    (looked, after), (not_looked, as_well) = ended
    assert looked == not_looked
    assert looked["factorisation repaired"] > 0
    assert_equal(after, as_well)


class Operations(TorchDispatchMode):
    """Notes every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model: nn.Module, optimizer: CGLoRAOptimizer, seed: int) -> list[str]:
    with Operations() as noted:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    return noted.names


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_who_does_not_look_pays_nothing_and_who_does_pays_once() -> None:
    model, twin = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(twin, lr=1e-2)
    for seed in range(2):
        operations_of_a_step(model, optimizer, seed)
        operations_of_a_step(twin, other, seed)
    backward(model, 2)
    assert sum(p.grad is not None for p in model.parameters())  # gives each a Python object
    alive = tensors_alive()
    with Operations() as noted:
        optimizer.layer_diagnostics()
    assert noted.names
    assert tensors_alive() == alive
    optimizer.step()
    optimizer.zero_grad()
    operations_of_a_step(twin, other, 2)
    for seed in range(3, 8):
        looked = operations_of_a_step(model, optimizer, seed)
        assert looked == operations_of_a_step(twin, other, seed)


def test_without_gradients_only_the_step_is_unknown() -> None:
    _, optimizer, _ = one_layer()
    optimizer.zero_grad()
    (layer,) = optimizer.layer_diagnostics()
    unknown = {name for name, value in asdict(layer).items() if value != value}  # NaN
    assert unknown == {
        "relative_step_A",
        "relative_step_B",
        "update_size_A",
        "update_size_B",
        "predicted_decrease",
    }


def test_a_skipped_pair_is_named() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    backward(model, 2)
    model.blocks[0].k.lora_B.weight.grad[0, 0] = math.nan
    with pytest.warns(NumericalWarning):
        optimizer.step()
    missed = {layer.name: layer.missed_steps for layer in optimizer.layer_diagnostics()}
    assert missed.pop("blocks.0.k") == 1
    assert set(missed.values()) == {0}


def test_b_at_zero_and_pairs_without_hooks() -> None:
    a, b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.zeros(4, 2))
    optimizer = CGLoRAOptimizer([a, b], pairs=[LoRAPair(a, b, name="mine")])
    a.grad, b.grad = torch.zeros(2, 5), torch.ones(4, 2)
    (layer,) = optimizer.layer_diagnostics()
    assert not layer.seen
    assert math.isnan(layer.input_condition)
    assert math.isnan(layer.relative_step_B)
    assert layer.update_size_A == 0
    assert layer.update_size_B > 0
    assert layer.predicted_decrease > 0
    assert layer.hidden_condition >= 1


def test_half_precision_adapters_are_measured_in_full_precision() -> None:
    model, twin = tagger().bfloat16(), tagger().bfloat16()
    optimizer = CGLoRAOptimizer(model, lr=1e-6)  # below what bfloat16 resolves
    backward(model, 0)
    full = copy.deepcopy(twin).float()
    reference = CGLoRAOptimizer(full, lr=1e-6)
    backward(full, 0)
    for layer, other in zip(
        optimizer.layer_diagnostics(), reference.layer_diagnostics(), strict=True
    ):
        assert layer.update_size_B > 0
        assert layer.update_size_B == pytest.approx(other.update_size_B, rel=0.1)
        assert layer.relative_step_B == pytest.approx(other.relative_step_B, rel=0.1)
    assert_equal(parameters_of(model), parameters_of(twin))


def test_the_table_has_a_line_for_each_layer() -> None:
    known = LayerDiagnostics("y.q", True, 7, 2, 0.3, 1.0, 4.0, 93.25, 5.5, 0.01234, 0.3, 1.0, 2.0)
    head, _, first, second = table([LayerDiagnostics("x", False, 0, 0, 0.3), known]).splitlines()
    assert head.startswith("layer")
    assert first.split() == ["x", "0", "0", *"------"]
    assert second.split() == ["y.q", "7", "2", "4", "93.2", "5.5", "0.0123", "0.3", "-"]


def test_scalars_sum_up_and_leave_out_what_is_unknown() -> None:
    nothing = LayerDiagnostics("x", False, 0, 2, 0.3)
    known = LayerDiagnostics("y", True, 1, 0, 0.3, 1.0, 4.0, 9.0, 5.0, 0.1, 0.3, 1.0, 2.0, 0.5)
    assert scalars([nothing]) == {"cg/unseen_pairs": 1, "cg/missed_steps": 2, "cg/events": 0}
    numbers = scalars([nothing, known], events=[1, 2], prefix="")
    assert numbers == {
        "predicted_decrease": 0.5,
        "relative_step": pytest.approx(0.2),
        "relative_step_max": 0.3,
        "update_size": 1.5,
        "input_condition_max": 9.0,
        "hidden_condition_max": 5.0,
        "effective_rank": 4.0,
        "unseen_pairs": 1.0,
        "missed_steps": 2.0,
        "events": 3.0,
    }


@pytest.mark.parametrize("kind", ["ours", "adamw"])
def test_a_short_step_lowers_the_loss_as_predicted(kind: str) -> None:
    model = tagger(p=0.3)
    optimizer: torch.optim.Optimizer = CGLoRAOptimizer(model, lr=1e-5, weight_decay=0)
    if kind == "adamw":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    found = step_and_compare(optimizer, lambda: loss_of(model, batch(0, rows=32)))
    assert found.predicted > 0
    assert found.ratio == pytest.approx(1, abs=0.1)


def test_a_step_that_is_too_long_shows() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=30.0)
    assert step_and_compare(optimizer, lambda: loss_of(model, batch(0))).ratio < 0
