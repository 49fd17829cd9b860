"""Equivalences between ways of running the same training: they must not be seen in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import NumericalWarning
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


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_scale_of_the_loss_is_not_in_the_statistics(factor: float) -> None:
    """Powers of two, so bitwise; whether a row has a gradient is a question without a scale."""
    scaled = trained(1, loss=lambda model, data: loss_of(model, data) * factor)
    assert_equal(curvature_state(*scaled), curvature_state(*trained(1)))


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


def test_packed_sequences_train_like_separate_ones() -> None:
    """Two sequences in one row, kept apart by a block-diagonal mask."""

    def packed(model: nn.Module, data: Batch) -> Tensor:
        tokens, _, labels = (tensor.reshape(len(tensor) // 2, -1) for tensor in data)
        owner = torch.arange(tokens.shape[1]) // data[0].shape[1]
        apart = owner[:, None] == owner[None, :]
        logits = forward_within(model, tokens, apart)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    assert_same_training(trained(loss=packed, padded=False), trained(padded=False))


def forward_within(model: nn.Module, tokens: Tensor, allowed: Tensor) -> Tensor:
    """The tagger's forward with a mask for each pair of tokens."""
    x = model.embed(tokens)
    for block in model.blocks:
        seen = block.norm(x)
        scores = block.q(seen) @ block.k(seen).mT / seen.shape[-1] ** 0.5
        x = x + scores.masked_fill(~allowed, -1e4).softmax(-1) @ block.v(seen)
        x = x + block.down(functional.gelu(block.up(x)))
    return model.head(x)


def test_layers_frozen_for_a_while_stay_and_come_back() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    frozen = [p for p in model.blocks[0].parameters() if p.requires_grad]
    before, state = parameters_of(model.blocks[0]), curvature_state(model.blocks[0], optimizer)
    for parameter in frozen:
        parameter.requires_grad_(False)
    train(model, optimizer, range(2, 5))
    for parameter in frozen:
        parameter.requires_grad_(True)
    assert_equal(parameters_of(model.blocks[0]), before)
    assert_equal(curvature_state(model.blocks[0], optimizer), state)
    train(model, optimizer, range(5, 7))
    after = parameters_of(model.blocks[0])
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    assert not any(optimizer.diagnostics().values())


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_frozen_for_a_while_lets_the_other_one_train(factor: str) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    frozen = {n for n, p in model.named_parameters() if factor in n}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(2, 4))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(parameters_of(model))
    assert moved.isdisjoint(frozen)
    assert not any(optimizer.diagnostics().values())


def test_a_layer_frozen_from_the_start_is_no_business_of_the_optimizer() -> None:
    model, reference = tagger(), tagger()
    for each in (model, reference):
        each.blocks[0].requires_grad_(False)
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    mine = [p for p in reference.parameters() if p.requires_grad]
    other = CGLoRAOptimizer(mine, lr=1e-2, model=reference.blocks[1])
    train(model, optimizer, range(4))
    train(reference, other, range(4))
    assert_equal(parameters_of(model), parameters_of(reference))
    assert set(curvature_state(model, optimizer)) == set(curvature_state(reference, other))


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-3, 1e-5), (torch.bfloat16, 0.05, 0.03)]
)
def test_other_precisions_train_like_single_precision(
    dtype: torch.dtype, rtol: float, atol: float
) -> None:
    model = tagger().to(dtype)
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(4), padded=True)
    found = {name: value.float() for name, value in parameters_of(model).items()}
    assert_close(found, parameters_of(trained()[0]), rtol=rtol, atol=atol)


def test_clipping_of_a_gradient_that_is_not_finite_skips_the_step() -> None:
    """The total norm is NaN, and clipping makes every gradient so."""
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    train(model, optimizer, range(2))
    train(reference, other, range(2))
    loss_of(model, batch(50)).backward()
    model.head.weight.grad[0, 0] = torch.nan
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = parameters_of(model)
    with pytest.warns(NumericalWarning):
        optimizer.step()
    optimizer.zero_grad()
    assert_equal(parameters_of(model), before)
    assert optimizer.diagnostics()["pair skipped"] == 10
    assert optimizer.diagnostics()["parameter skipped"] == 6


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_clipping_acts_as_it_does_for_adam(max_norm: float) -> None:
    """The clipped gradient is the gradient: the same as a loss scaled by hand."""
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    for step in range(4):
        loss_of(model, batch(step)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        factor = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
        (loss_of(reference, batch(step)) * factor).backward()
        other.step()
        other.zero_grad()
    assert_same_training((model, optimizer), (reference, other))
