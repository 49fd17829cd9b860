"""``curvature_init_`` in all modes: what changes, what must not, what it refuses."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer, curvature_init_, errors
from tests.initialisation_models import (
    BATCHES,
    MODES,
    N,
    adapted,
    built,
    fresh_tagger,
    home_made,
    peft,
    regression,
    squares,
    state,
    train_once,
    two_layers,
)
from tests.models import assert_equal, batch, loss_of, parameters_of, train
from tests.test_hooks_lifetime import hook_count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_gradients_hooks_and_random_state_are_as_before(mode: str, fails: bool) -> None:
    model = fresh_tagger(p=0.2)
    loss_of(model, BATCHES[0]).backward()
    kept = {name: p.grad for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    random_state, hooks = torch.get_rng_state(), hook_count(model)

    def loss(model: nn.Module, data: Any) -> Tensor:
        if fails and data is BATCHES[2]:
            raise RuntimeError("out of memory")
        return loss_of(model, data)

    before = parameters_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            curvature_init_(model, BATCHES, loss, mode=mode)
        assert_equal(parameters_of(model), before)
    else:
        curvature_init_(model, BATCHES, loss, mode=mode)
    assert all(p.grad is kept[name] for name, p in model.named_parameters())
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hook_count(model) == hooks


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides(mode: str) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = fresh_tagger(p=0.2)
        torch.rand(seed + 1)
        curvature_init_(model, BATCHES, loss_of, mode=mode, seed=seed)
        return parameters_of(model)

    assert_equal(run(3), run(3))
    one, other = run(3), run(4)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_only_the_active_adapter_changes() -> None:
    model = built("peft")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    model.set_adapter("two")
    before = state(model)
    report = curvature_init_(model, [regression()], squares)
    assert [layer.rank for layer in report.layers] == [2, 2]
    for name, value in state(model).items():
        assert torch.equal(value, before[name]) != ("lora_A.two" in name)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_nothing(checkpointing: str) -> None:
    results = []
    for how in (None, checkpointing):
        model = fresh_tagger(checkpointing=how)
        curvature_init_(model, BATCHES, loss_of, mode="newton", length=0.1)
        results.append(parameters_of(model))
    assert_equal(*results)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_around_it_is_as_autocast_inside_the_loss(mode: str) -> None:
    def inside(model: nn.Module, data: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, data)

    results = []
    for around, loss in ((False, inside), (True, loss_of)):
        model = fresh_tagger()
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            curvature_init_(model, BATCHES, loss, mode=mode, length=0.1)
        results.append(parameters_of(model))
    assert_equal(*results)


def test_padding_does_not_count() -> None:
    results = []
    for padded in (False, True):
        model = fresh_tagger()
        tokens, mask, labels = batch(0)
        if padded:
            more = torch.zeros(4, 3, dtype=tokens.dtype)
            tokens, mask = torch.cat([tokens, more], 1), torch.cat([mask, more.bool()], 1)
            labels = torch.cat([labels, more - 100], 1)
        report = curvature_init_(
            model, [(tokens, mask, labels)], loss_of, mode="newton", length=0.1
        )
        results.append(parameters_of(model))
    assert report.length == 0.1
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_a_layer_without_gradient_keeps_its_start() -> None:
    model = nn.ModuleList([home_made(), home_made()])
    before = parameters_of(model[1])
    report = curvature_init_(
        model, [regression()], lambda m, data: squares(m[0], data), mode="newton"
    )
    assert set(report.left_out) == {"1.0", "1.2"}
    assert "no gradient" in report.left_out["1.0"]
    assert_equal(parameters_of(model[1]), before)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = home_made()
    before = parameters_of(model)
    report = curvature_init_(model, [regression()], lambda m, d: torch.nan * squares(m, d))
    assert_equal(parameters_of(model), before)
    assert len(report.left_out) == 2


def test_training_goes_on_from_every_start() -> None:
    for mode in MODES:
        model = fresh_tagger()
        curvature_init_(model, BATCHES, loss_of, mode=mode)
        optimizer = CGLoRAOptimizer(model, lr=1e-2)
        before = float(loss_of(model, BATCHES[0]).detach())
        train(model, optimizer, [0] * 20, padded=True)
        assert float(loss_of(model, BATCHES[0]).detach()) < before - 0.05
        assert not any(optimizer.diagnostics().values())


def test_the_report_prints_a_table() -> None:
    report = curvature_init_(home_made(), [regression()], squares, mode="newton")
    lines = str(report).splitlines()
    assert "mode 'newton'" in lines[0]
    assert len(lines) == 4
    for layer in report.layers:
        assert 0 < layer.captured_energy <= 1
        assert layer.effective_rank >= 1
        assert layer.suggested_rank >= 1


@pytest.mark.parametrize("wanted", [True, False])
def test_every_pass_moves_the_bar(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Bar(contextlib.nullcontext[Any]):
        def __init__(self, total: int, delay: float, **_: Any) -> None:
            super().__init__(self)
            seen.append(total)
            assert delay > 0

        def update(self) -> None:
            seen[0] -= 1

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    curvature_init_(fresh_tagger(), BATCHES, loss_of, progress=wanted)
    assert seen == ([0] if wanted else [])


def test_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert curvature_init_(home_made(), [regression()], squares).layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "shfit"}, "mode is 'shfit'; expected one of keep, newton, shift"),
        ({"length": 0.0}, "length is 0.0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"curvature": None}, "curvature is None"),
        ({"curvature": "full"}, "curvature is 'full'"),
    ],
)
def test_refuses_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.HyperparameterError, match=message):
        curvature_init_(home_made(), [regression()], squares, **arguments)


@pytest.mark.parametrize("mode", MODES)
def test_refuses_a_trained_adapter(mode: str) -> None:
    model = home_made()
    train_once(model, regression())
    before = parameters_of(model)
    with pytest.raises(errors.InitialisationError, match="0: its B is not zero"):
        curvature_init_(model, [regression()], squares, mode=mode)
    assert_equal(parameters_of(model), before)


def test_refuses_a_rank_that_the_layer_does_not_have() -> None:
    model = adapted(two_layers(), rank_pattern={"2": N + 1})
    with pytest.raises(errors.InitialisationError, match=f"rank {N + 1} is too large.*most {N} "):
        curvature_init_(model, [regression()], squares)


def test_refuses_a_model_without_adapters_and_data_without_batches() -> None:
    with pytest.raises(errors.InitialisationError, match="no LoRA layer of this Sequential"):
        curvature_init_(two_layers(), [regression()], squares)
    with pytest.raises(errors.InitialisationError, match="no batch"):
        curvature_init_(home_made(), [], squares)
