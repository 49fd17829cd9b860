"""Equivalences between ways of running the same training: they must not be seen in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer
from tests.models import (
    Batch,
    Tagger,
    assert_close,
    assert_equal,
    batch,
    curvature_state,
    loss_of,
    parameters_of,
    tagger,
    train,
)

Trained = tuple[Tagger, CGLoRAOptimizer]
Loss = Callable[[nn.Module, Batch], Tensor]


def trained(
    steps: int = 4,
    loss: Loss = loss_of,
    padded: bool = True,
    curvature: str | int = "auto",
    **model: Any,
) -> Trained:
    module = tagger(**model)
    optimizer = CGLoRAOptimizer(module, lr=1e-2, curvature=curvature)
    train(module, optimizer, range(steps), loss=loss, padded=padded)
    return module, optimizer


def assert_same_training(one: Trained, other: Trained, rtol: float = 1e-3) -> None:
    assert_close(curvature_state(*one), curvature_state(*other), rtol=rtol, atol=1e-5)
    assert_close(parameters_of(one[0]), parameters_of(other[0]), rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing(checkpointing: str, padded: bool) -> None:
    plain = trained(padded=padded)
    assert_same_training(trained(padded=padded, checkpointing=checkpointing), plain, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_with_micro_batches_and_dropout(checkpointing: str) -> None:
    """However often the forward is run: the first layer's input knows no dropout."""

    def halves(model: nn.Module, data: Batch) -> Tensor:
        torch.manual_seed(0)
        first, second = (tuple(t.split(2)[i] for t in data) for i in (0, 1))
        (loss_of(model, first) / 2).backward()
        return loss_of(model, second) / 2

    plain = trained(1, halves, padded=False, p=0.3)
    saving = trained(1, halves, padded=False, p=0.3, checkpointing=checkpointing)
    first_layer = "blocks.0.q.lora_A.weight.input_gram"
    assert_close(curvature_state(*saving)[first_layer], curvature_state(*plain)[first_layer])
    assert all(int(v) == 1 for k, v in curvature_state(*saving).items() if "updates" in k)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    """The sum and the mean of the loss differ by the number of tokens."""
    mean = trained()
    total = trained(loss=lambda model, data: loss_of(model, data, "sum"))
    assert_same_training(total, mean, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side: str) -> None:
    def pad(model: nn.Module, data: Batch) -> Tensor:
        filled = []
        for tensor, value in zip(data, (3, False, -100), strict=True):
            wide = torch.full((len(tensor), 4), value, dtype=tensor.dtype)
            pair = (wide, tensor) if side == "left" else (tensor, wide)
            filled.append(torch.cat(pair, 1))
        return loss_of(model, (filled[0], filled[1], filled[2]))

    assert_same_training(trained(loss=pad, padded=False), trained(padded=False))


def test_the_order_of_tokens_does_not_matter() -> None:
    def shuffled(model: nn.Module, data: Batch) -> Tensor:
        order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
        return loss_of(model, tuple(tensor[:, order] for tensor in data))

    assert_same_training(trained(loss=shuffled), trained())


def test_a_layer_unused_in_some_steps_keeps_its_state_in_those() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    last, model.blocks = model.blocks, model.blocks[:1]
    before = parameters_of(last[1])
    state = [{**optimizer.state[p]} for p in last[1].parameters() if p.requires_grad]
    frozen = [{k: v.clone() for k, v in each.items()} for each in state]
    train(model, optimizer, range(2, 4))
    assert_equal(parameters_of(last[1]), before)
    assert_equal(state, frozen)
    model.blocks = last
    train(model, optimizer, range(4, 6))
    assert not torch.equal(parameters_of(last[1])["q.lora_A.weight"], before["q.lora_A.weight"])


def test_clipping_scales_the_step_and_never_the_statistics() -> None:
    """Adam divides by the gradient's size, so a constant factor changes nothing."""
    reference = tagger()
    other = CGLoRAOptimizer(reference, lr=1e-2, eps=0.0)
    train(reference, other, range(1), padded=True)
    first = curvature_state(reference, other)
    again = tagger()
    clipped = CGLoRAOptimizer(again, lr=1e-2, eps=0.0)
    loss_of(again, batch(0, padded=True)).backward()
    nn.utils.clip_grad_norm_(again.parameters(), 1e-3)
    clipped.step()
    assert_equal(curvature_state(again, clipped), first)
    assert_close(parameters_of(again), parameters_of(reference), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_other_precisions_train(dtype: torch.dtype) -> None:
    model = tagger().to(dtype)
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    first = float(loss_of(model, batch(0)).detach())
    for _ in range(15):
        train(model, optimizer, [0])
    assert float(loss_of(model, batch(0)).detach()) < 0.9 * first
    assert not any(optimizer.diagnostics().values())
    expected = torch.promote_types(dtype, torch.float32)
    state = optimizer.state[model.blocks[0].q.lora_A.weight]
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "input_gram")} == {expected}


def test_autocast_keeps_the_statistics_in_full_precision() -> None:
    def under_autocast(model: nn.Module, data: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model, data)

    def backward_inside(model: nn.Module, data: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (loss := loss_of(model, data)).backward()
        return loss.detach().requires_grad_()

    for curvature in ("dense", 3):
        outside = trained(loss=under_autocast, curvature=curvature)
        inside = trained(loss=backward_inside, curvature=curvature)
        assert_equal(curvature_state(*inside), curvature_state(*outside))
    outside, inside = trained(loss=under_autocast), trained(loss=backward_inside)
    assert_equal(curvature_state(*inside), curvature_state(*outside))
    assert_close(curvature_state(*outside), curvature_state(*trained()), rtol=0.1, atol=0.02)
    for name, value in curvature_state(*outside).items():
        if name.endswith("gram"):
            assert value.dtype == torch.float32
            assert float(torch.linalg.eigvalsh(value.double())[0]) > -1e-6


# ---------------------------------------------------------------------- gradient scaler


class ScaledTraining:
    """Training through ``GradScaler("cpu")`` with chosen overflows."""

    def __init__(self, set_to_none: bool, **scaler: Any) -> None:
        self.model = tagger()
        self.optimizer = CGLoRAOptimizer(self.model, lr=1e-2)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        self.set_to_none = set_to_none
        self.taken = 0

    def step(self, data: Batch, factor: float = 1.0) -> None:
        before = self.optimizer.param_groups[0].get("steps_taken", 0)
        loss = loss_of(self.model, data) * factor
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1e3)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        self.taken += self.optimizer.param_groups[0].get("steps_taken", 0) - before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_scaler_that_grows_and_overflows_is_not_seen(set_to_none: bool) -> None:
    scaled = ScaledTraining(set_to_none, init_scale=2.0**10, growth_interval=2)
    scales = set()
    for step in range(6):
        scaled.step(batch(step, padded=True))
        scaled.step(batch(80 + step), factor=float("inf"))
        scales.add(scaled.scaler.get_scale())
    assert scaled.taken == 6
    assert len(scales) > 1
    reference = tagger()
    other = CGLoRAOptimizer(reference, lr=1e-2)
    train(reference, other, range(6), padded=True)
    assert_same_training((scaled.model, scaled.optimizer), (reference, other), rtol=1e-4)
    assert not any(scaled.optimizer.diagnostics().values())


def test_an_overflow_in_the_forward_leaves_no_trace() -> None:
    """Inputs that are not finite belong to the step that never happens."""
    scaled = ScaledTraining(True, init_scale=2.0**10)
    poison = scaled.model.blocks[0].norm.weight
    for step in range(3):
        healthy = poison.detach().clone()
        poison.data.fill_(float("inf"))
        scaled.step(batch(90 + step))
        poison.data.copy_(healthy)
        scaled.step(batch(step, padded=True))
    assert scaled.taken == 3
    assert not any(scaled.optimizer.diagnostics().values())
    reference = tagger()
    other = CGLoRAOptimizer(reference, lr=1e-2)
    train(reference, other, range(3), padded=True)
    assert_same_training((scaled.model, scaled.optimizer), (reference, other), rtol=1e-4)
