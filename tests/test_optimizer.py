"""The public API as a torch.optim optimizer: construction, groups, closures, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import NoPairsWarning, UnobservedPairWarning
from tests.models import (
    LoRALinear,
    Tagger,
    assert_equal,
    batch,
    curvature_state,
    loss_of,
    parameters_of,
    snapshot,
    tagger,
    train,
)

PAIRS = 10


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def pair_count(optimizer: CGLoRAOptimizer) -> int:
    return optimizer.summary().count("custom.LoRALinear")


# ------------------------------------------------------------------ first argument


FIRST_ARGUMENTS: dict[str, Callable[[Tagger], Any]] = {
    "parameters": trainable,
    "generator": lambda model: (p for p in trainable(model)),
    "named parameters": named_trainable,
    "one group": lambda model: [{"params": trainable(model)}],
    "group of named parameters": lambda model: [{"params": named_trainable(model)}],
    "empty group": lambda model: [{"params": []}, {"params": trainable(model)}],
}


@pytest.mark.parametrize("kind", FIRST_ARGUMENTS)
def test_every_form_of_the_first_argument_trains_like_the_module(kind: str) -> None:
    model, reference = tagger(), tagger()
    optimizer = CGLoRAOptimizer(FIRST_ARGUMENTS[kind](model), lr=1e-2, model=model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert len(optimizer.param_groups) == 1
    assert pair_count(optimizer) == PAIRS
    train(model, optimizer, range(3))
    train(reference, CGLoRAOptimizer(reference, lr=1e-2), range(3))
    assert_equal(parameters_of(model), parameters_of(reference))


def test_parameter_names_reach_the_groups() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(named_trainable(model), model=model)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in named_trainable(model)]


def test_without_a_model_it_warns_and_is_adamw() -> None:
    model, reference = tagger(), tagger()
    with pytest.warns(NoPairsWarning, match="model="):
        optimizer = CGLoRAOptimizer(trainable(model), lr=1e-2)
    train(model, optimizer, range(5))
    train(reference, torch.optim.AdamW(trainable(reference), lr=1e-2), range(5))
    assert_equal(parameters_of(model), parameters_of(reference))


# -------------------------------------------------------------------------- groups


def test_learning_rate_and_weight_decay_of_each_group_are_honoured() -> None:
    model = tagger()
    ups = [p for n, p in named_trainable(model) if "lora_B" in n]
    heads = [p for n, p in named_trainable(model) if "lora_" not in n]
    downs = [p for n, p in named_trainable(model) if "lora_A" in n]
    optimizer = CGLoRAOptimizer(
        [
            {"params": downs, "lr": 0.0, "weight_decay": 0.3},
            {"params": ups, "lr": 1e-2},
            {"params": heads, "lr": 1e-3, "weight_decay": 0.0},
        ],
        model=model,
        weight_decay=0.1,
    )
    before = parameters_of(model)
    train(model, optimizer, range(1))
    after = parameters_of(model)
    for name, value in after.items():
        moved = not torch.equal(value, before[name])
        assert moved == ("lora_A" not in name), name


@pytest.mark.parametrize("which", ["lora_A", "lora_B", "head"])
def test_weight_decay_is_decoupled_in_its_own_group(which: str) -> None:
    """The difference it makes to one step is exactly lr * weight_decay * parameter."""
    results = []
    for weight_decay in (0.0, 0.5):
        model = tagger().double()
        chosen = [p for n, p in named_trainable(model) if which in n]
        rest = [p for n, p in named_trainable(model) if which not in n]
        groups = [{"params": chosen, "weight_decay": weight_decay}, {"params": rest}]
        optimizer = CGLoRAOptimizer(groups, lr=1e-2, model=model, weight_decay=0.0)
        start = parameters_of(model)
        train(model, optimizer, range(1))
        results.append(parameters_of(model))
    for name, start_value in start.items():
        expected = -1e-2 * 0.5 * start_value if which in name else torch.zeros_like(start_value)
        torch.testing.assert_close(results[1][name] - results[0][name], expected)


def test_groups_replaced_from_outside_are_used() -> None:
    """Accelerate replaces the dicts in ``param_groups``."""
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = parameters_of(model)
    train(model, optimizer, range(2))
    assert_equal(parameters_of(model), before)


def test_a_group_added_later_brings_its_pairs() -> None:
    model, whole = tagger(), tagger()
    first = [p for n, p in named_trainable(model) if "blocks.1" not in n]
    second = [p for n, p in named_trainable(model) if "blocks.1" in n]
    optimizer = CGLoRAOptimizer(first, lr=1e-2, model=model)
    assert pair_count(optimizer) == PAIRS // 2
    optimizer.add_param_group({"params": second})
    assert pair_count(optimizer) == PAIRS
    train(model, optimizer, range(3))
    train(whole, CGLoRAOptimizer(whole, lr=1e-2), range(3))
    assert_equal(parameters_of(model), parameters_of(whole))
    optimizer.add_param_group({"params": []})
    assert len(optimizer.param_groups) == 2


def test_adding_a_group_keeps_the_statistics_of_the_backward_before_it() -> None:
    model = tagger()
    first = [p for n, p in named_trainable(model) if "head" not in n]
    optimizer = CGLoRAOptimizer(first, lr=1e-2, model=model)
    loss_of(model, batch()).backward()
    optimizer.add_param_group({"params": model.head.parameters()})
    optimizer.step()
    assert all(
        int(value) == 1
        for name, value in curvature_state(model, optimizer).items()
        if name.endswith("input_updates")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_factor_may_come_after_training_started(dtype: torch.dtype) -> None:
    """A alone is AdamW's; with B it becomes a pair and its moments become float32."""
    model = tagger().to(dtype)
    late = [p for n, p in named_trainable(model) if "lora_B" in n]
    early = [p for n, p in named_trainable(model) if "lora_B" not in n]
    with pytest.warns(NoPairsWarning):
        optimizer = CGLoRAOptimizer(early, lr=1e-2, model=model)
    train(model, optimizer, range(2))
    assert "B is not being optimised" in optimizer.summary()
    optimizer.add_param_group({"params": late})
    assert pair_count(optimizer) == PAIRS
    train(model, optimizer, range(2, 4))
    state = optimizer.state[model.blocks[0].q.lora_A.weight]
    assert state["exp_avg"].dtype == torch.float32
    assert int(state["step"]) == 4
    fresh = CGLoRAOptimizer([{"params": early}, {"params": late}], lr=1e-2, model=model)
    fresh.load_state_dict(optimizer.state_dict())


def test_no_curvature_stays_no_curvature_when_a_group_is_added() -> None:
    model, reference = tagger(), tagger()
    groups = [[p for n, p in named_trainable(m) if "lora" in n] for m in (model, reference)]
    optimizer = CGLoRAOptimizer(groups[0], lr=1e-2, model=model, curvature=None)
    other = torch.optim.AdamW(groups[1], lr=1e-2)
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 3e-2})
    other.add_param_group({"params": reference.head.parameters(), "lr": 3e-2})
    train(model, optimizer, range(4))
    train(reference, other, range(4))
    assert_equal(parameters_of(model), parameters_of(reference))


def test_hooks_removed_by_the_user_stay_removed_when_a_group_is_added() -> None:
    model = tagger()
    lora = [p for n, p in named_trainable(model) if "lora" in n]
    optimizer = CGLoRAOptimizer(lora, model=model)
    optimizer.remove_hooks()
    optimizer.add_param_group({"params": model.head.parameters()})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    train(model, optimizer, range(2))


# ------------------------------------------------------------------------- closures


def test_step_with_a_closure_equals_step_after_backward() -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    train(reference, other, range(3))
    for step in range(3):

        def closure(seed: int = step) -> torch.Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(model, batch(seed))
            loss.backward()
            return loss

        with torch.no_grad():
            result = optimizer.step(closure)
        assert isinstance(result, torch.Tensor)
    assert_equal(parameters_of(model), parameters_of(reference))
    assert_equal(curvature_state(model, optimizer), curvature_state(reference, other))
    assert optimizer.step() is None


def test_a_closure_that_zeroes_gradients_drops_the_backward_before_it() -> None:
    """Lightning's first batch may have been run before; its gradients are gone."""
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    loss_of(model, batch(99)).backward()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    train(reference, other, range(1))
    assert_equal(parameters_of(model), parameters_of(reference))
    assert_equal(curvature_state(model, optimizer), curvature_state(reference, other))


# -------------------------------------------------------------- the Optimizer's rest


def test_repr_shows_the_settings() -> None:
    text = repr(CGLoRAOptimizer(tagger(), lr=0.125, damping=0.25))
    assert text.startswith("CGLoRAOptimizer (")
    assert "lr: 0.125" in text
    assert "damping: 0.25" in text


def test_hooks_of_the_optimizer_run() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("after save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [f"{when} {what}" for what in ("step", "save", "load")
                     for when in ("before", "after")]  # fmt: skip


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model)
    loss_of(model, batch()).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in trainable(model)]
    assert all(g is None for g in grads) if set_to_none else not any(g.any() for g in grads)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: _saved_and_loaded(value),
}


def _saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("steps", [0, 3, 13])
def test_model_and_optimizer_are_copied_together(kind: str, steps: int) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(steps))
    model_copy, optimizer_copy = COPIES[kind]((model, optimizer))
    before = snapshot(model, optimizer)
    train(model_copy, optimizer_copy, range(steps, steps + 5))
    assert_equal(snapshot(model, optimizer), before)
    train(model, optimizer, range(steps, steps + 5))
    assert_equal(snapshot(model_copy, optimizer_copy), snapshot(model, optimizer))


def test_a_copied_optimizer_respects_removed_hooks() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    optimizer.remove_hooks()
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    assert not any(m._forward_hooks for m in model_copy.modules())
    train(model_copy, optimizer_copy, range(2))


def test_a_pair_whose_hooks_are_bypassed_is_reported_once() -> None:
    class Fused(LoRALinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = x @ self.lora_A.weight.T
            return self.base_layer(x) + low @ self.lora_B.weight.T

    model = nn.Sequential(Fused(4, 4))
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (warning,) = caught
    assert warning.category is UnobservedPairWarning
    assert "'0'" in str(warning.message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_pair_without_a_new_gradient_is_not_reported_as_bypassed(set_to_none: bool) -> None:
    model = nn.ModuleList(LoRALinear(4, 4) for _ in range(2))
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    for used in (model, model[:1], model[:1], model):
        optimizer.zero_grad(set_to_none=set_to_none)
        sum(layer(torch.randn(3, 4)).square().sum() for layer in used).backward()
        optimizer.step()
    optimizer.step()
