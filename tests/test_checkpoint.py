"""Saving and resuming, bit for bit, and refusing state that does not belong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import StateError
from tests import processes
from tests.models import (
    LoRALinear,
    assert_equal,
    batch,
    curvature_state,
    loss_of,
    snapshot,
    tagger,
    train,
)

# Positions of the first pair among the trainable parameters of the tagger.
A, B = 2, 3


def train_and_save(
    way: str, path: Path, dtype: torch.dtype, curvature: str | int, saved_at: int
) -> None:
    """Train from the start and save on the way, or resume from there; save the end."""
    model = tagger(seed=7 if way == "resumed" else 0).to(dtype)
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature)
    if way == "resumed":
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        train(model, optimizer, range(saved_at))
        torch.save(snapshot(model, optimizer), path)
    train(model, optimizer, range(saved_at, 20))
    torch.save(snapshot(model, optimizer), f"{path}.{way}")


@pytest.mark.parametrize(
    ("dtype", "saved_at", "curvature"),
    [
        (torch.float32, 10, "auto"),
        (torch.bfloat16, 10, "auto"),
        # Inside the interval in which no statistics are collected.
        (torch.float32, 14, 3),
        (torch.bfloat16, 15, 3),
    ],
)
def test_resuming_in_a_new_process_is_bitwise(
    tmp_path: Path, dtype: torch.dtype, saved_at: int, curvature: str | int
) -> None:
    path = tmp_path / "checkpoint.pt"
    for way in ("straight", "resumed"):
        processes.finish(processes.start(train_and_save, way, path, dtype, curvature, saved_at))
    straight, resumed = (
        torch.load(f"{path}.{way}", weights_only=True) for way in ("straight", "resumed")
    )
    assert resumed["optimizer"]["param_groups"][0]["steps_taken"] == 20
    assert_equal(resumed, straight)


@pytest.mark.parametrize("saved_at", [0, 1, 9, 10, 11, 13, 16, 17])
def test_resuming_at_any_step_is_bitwise(saved_at: int) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(saved_at))
    other = tagger(seed=7)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = CGLoRAOptimizer(other, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(resumed.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(saved_at, 20))
    train(other, resumed, range(saved_at, 20))
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))


def test_saving_right_after_loading_loses_no_precision() -> None:
    model = tagger().bfloat16()
    optimizer = CGLoRAOptimizer(model, lr=1e-3)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = CGLoRAOptimizer(model, lr=1e-3)
    other.load_state_dict(saved)
    assert_equal(other.state_dict(), saved)
    first = saved["state"][A]
    assert first["exp_avg"].dtype == torch.float32
    assert first["input_updates"].dtype == torch.int64


def test_training_after_loading_does_not_write_into_the_loaded_state() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other = CGLoRAOptimizer(model, lr=1e-2)
    other.load_state_dict(saved)
    train(model, other, range(3, 6))
    assert_equal(saved["state"], before)


def test_state_follows_the_precision_of_the_model_it_is_loaded_for() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(3))
    double = copy.deepcopy(model).double()
    other = CGLoRAOptimizer(double, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    state = other.state[double.blocks[0].q.lora_A.weight]
    assert state["exp_avg"].dtype == state["input_gram"].dtype == torch.float64
    train(double, other, range(3, 5))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_follows_the_model_to_its_device() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(3))
    moved = copy.deepcopy(model).cuda()
    other = CGLoRAOptimizer(moved, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for parameter, values in other.state.items():
        assert {v.device for n, v in values.items() if n != "step"} == {parameter.device}
    loss_of(moved, tuple(tensor.cuda() for tensor in batch(3))).backward()
    other.step()
    assert not any(other.diagnostics().values())


def test_loading_drops_statistics_of_a_backward_without_a_step() -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    saved = snapshot(model, optimizer)
    late = loss_of(model, batch(50))
    loss_of(model, batch(99)).backward()
    optimizer.load_state_dict(saved["optimizer"])
    late.backward()
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    train(reference, other, range(2))
    assert_equal(snapshot(model, optimizer), snapshot(reference, other))


def test_state_hooks_adapt_what_is_loaded_and_see_the_final_state() -> None:
    model = tagger().bfloat16()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    saved = {"wrapped": copy.deepcopy(optimizer.state_dict()), "state": {}, "param_groups": []}
    other = CGLoRAOptimizer(model, lr=1e-2)
    seen: list[torch.dtype] = []
    other.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[model.blocks[0].q.lora_A.weight]["exp_avg"].dtype)
    )
    other.load_state_dict(saved)
    assert seen == [torch.float32]
    assert_equal(other.state_dict(), optimizer.state_dict())


def test_inputs_shared_before_saving_are_stored_once_after_loading() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    other = CGLoRAOptimizer(model, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        block = model.blocks[0]
        grams = {
            each.state[layer.lora_A.weight]["input_gram"].data_ptr()
            for layer in (block.q, block.k, block.v, block.up)
        }
        assert len(grams) == 2


# -------------------------------------------------------------------------- refusals


def _nan(key: str) -> Callable[[dict[str, Any]], None]:
    def tamper(saved: dict[str, Any]) -> None:
        saved["state"][A][key].fill_(float("nan"))

    return tamper


def _set(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def tamper(saved: dict[str, Any]) -> None:
        for step in path[:-1]:
            saved = saved[step]
        saved[path[-1]] = value

    return tamper


def _delete(path: list[Any]) -> Callable[[dict[str, Any]], None]:
    def tamper(saved: dict[str, Any]) -> None:
        for step in path[:-1]:
            saved = saved[step]
        del saved[path[-1]]

    return tamper


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no state": (_delete(["state"]), "expected a dict with"),
    "no groups": (_delete(["param_groups"]), "expected a dict with"),
    "state of the wrong type": (_set(["state"], [1, 2]), "wrong type"),
    "a group that is no dict": (_set(["param_groups", 0], 3), "damaged"),
    "a group without params": (_delete(["param_groups", 0, "params"]), "no 'params'"),
    "too few parameters": (_delete(["param_groups", 0, "params", -1]), "25"),
    "a parameter twice": (_set(["param_groups", 0, "params", 1], 0), "twice|unknown"),
    "lr is negative": (_set(["param_groups", 0, "lr"], -1.0), "lr is -1.0"),
    "lr is text": (_set(["param_groups", 0, "lr"], "x"), "lr is 'x'"),
    "betas out of range": (_set(["param_groups", 0, "betas"], (0.9, 2.0)), "betas"),
    "damping is missing": (_delete(["param_groups", 0, "damping"]), "damping"),
    "step count": (_set(["param_groups", 0, "steps_taken"], -3), "steps_taken is -3"),
    "unknown parameter": (_set(["state", 99], {}), "unknown parameter 99"),
    "state that is no dict": (_set(["state", A], 1.0), "float"),
    "a moment is missing": (_delete(["state", A, "exp_avg"]), "exp_avg"),
    "the curvature is missing": (_delete(["state", A, "input_gram"]), "curvature"),
    "something too much": (_set(["state", A, "extra"], torch.ones(1)), "extra"),
    "a moment of another shape": (_set(["state", A, "exp_avg"], torch.ones(1)), "shape"),
    "a moment that is no tensor": (_set(["state", A, "exp_avg"], 1.0), "float"),
    "NaN in a moment": (_nan("exp_avg"), "not finite"),
    "NaN in the curvature": (_nan("input_gram"), "not finite"),
    "negative squares": (_set(["state", A, "exp_avg_sq"], -torch.ones(2, 8)), "negative"),
    "half a pair": (_delete(["state", B]), "incomplete"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_damaged_state_is_refused_as_a_whole(name: str) -> None:
    tamper, message = TAMPERED[name]
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    before = snapshot(model, optimizer)
    tamper(saved)
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(saved)
    assert_equal(snapshot(model, optimizer), before)
    train(model, optimizer, range(4, 6))


@pytest.mark.parametrize("saved", [None, [], {}, "state", {"state": {}}])
def test_something_else_is_refused(saved: Any) -> None:
    with pytest.raises(StateError, match="not an optimizer state dict"):
        CGLoRAOptimizer(tagger()).load_state_dict(saved)


def _adamw_state() -> dict[str, Any]:
    model = tagger()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(1))
    return optimizer.state_dict()


def _state_of(model: nn.Module, x: torch.Tensor, **arguments: Any) -> dict[str, Any]:
    optimizer = CGLoRAOptimizer(model, **arguments)
    model(x).square().sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_state_of_another_optimizer_model_or_curvature_is_refused() -> None:
    with pytest.raises(StateError, match="damping"):
        CGLoRAOptimizer(tagger()).load_state_dict(_adamw_state())
    x = torch.randn(4, 12)
    saved = _state_of(nn.Sequential(LoRALinear(12, 6)), x)
    for model, arguments in (
        (LoRALinear(12, 7), {}),
        (LoRALinear(10, 6), {}),
        (LoRALinear(12, 6, r=3), {}),
        (LoRALinear(12, 6), {"curvature": 2}),
        (LoRALinear(12, 6), {"curvature": None}),
    ):
        optimizer = CGLoRAOptimizer(nn.Sequential(model), **arguments)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(StateError):
            optimizer.load_state_dict(saved)
        assert_equal(optimizer.state_dict(), before)


def test_state_with_other_names_for_the_curvature_is_refused_and_both_are_listed() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=3)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    factor = saved["state"][A].pop("input_factor")
    saved["state"][A]["input_eigenvalues"] = factor.square().sum(0)
    message = r"input_eigenvalues.*expected.*input_factor.*another version"
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("input_basis", 1e10, "above 1"), ("input_factor", 1e20, "out of range")],
)
def test_directions_that_no_training_can_have_made_are_refused(
    name: str, value: float, message: str
) -> None:
    """Loaded, they would make every later update of the curvature overflow."""
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=3)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for dtype in (torch.float32, torch.bfloat16):  # rounded they are what they were
        saved["state"][A][name] = saved["state"][A][name].to(dtype)
        optimizer.load_state_dict(copy.deepcopy(saved))
    saved["state"][A][name] = torch.full_like(saved["state"][A][name], value)
    before = snapshot(model, optimizer)
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(saved)
    assert_equal(snapshot(model, optimizer), before)


def test_nothing_is_pickled_but_tensors_and_plain_values(tmp_path: Path) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=torch.tensor(1e-2))
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_equal(loaded, optimizer.state_dict())
    assert curvature_state(model, optimizer)
