"""``CGLoRAOptimizer(init="curvature")``: A from the first batch, without another pass.

Everything is tested twice: where values can be looked at, and where that would mean waiting.
"""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cg_optim import CGLoRAOptimizer, errors, host
from cg_optim.damped import DampedGram
from cg_optim.initialisation.first_step import FirstStep
from cg_optim.pairs import LoRAPair
from tests import processes
from tests.initialisation_models import KINDS, built, fresh_tagger, regression, squares
from tests.models import (
    LoRALinear,
    assert_close,
    assert_equal,
    batch,
    loss_of,
    parameters_of,
    snapshot,
    train,
)
from tests.strategies import relative_error


def optimizer_of(model: nn.Module, **arguments: Any) -> CGLoRAOptimizer:
    return CGLoRAOptimizer(model, **{"lr": 1e-2, "init": "curvature", **arguments})


@pytest.fixture(autouse=True, params=["at hand", "elsewhere"])
def where_values_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "elsewhere":
        monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    place: str = request.param
    return place


# --------------------------------------------------------------------- what A becomes


def layer(n: int = 9, m: int = 6, r: int = 3) -> LoRALinear:
    torch.manual_seed(0)
    one = LoRALinear(n, m, r=r).double()
    nn.init.zeros_(one.lora_B.weight)
    return one


def data(rows: int, n: int = 9, m: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    mixing = torch.randn(n, n, generator=source, dtype=torch.float64)
    x = torch.randn(rows, n, generator=source, dtype=torch.float64) @ mixing
    return x, torch.randn(rows, m, generator=source, dtype=torch.float64)


def loss_on(one: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (one(given[0]) - given[1]).square().sum(-1).mean()


def test_a_spans_the_leading_directions_of_the_densely_whitened_gradient() -> None:
    one, given, damping = layer(), data(50), 1e-3
    x = given[0]
    old = one.lora_A.weight.detach().clone()
    gradient = (one.base_layer(x) - given[1]).detach().T @ x
    optimizer = optimizer_of(one, lr=0.0, damping=damping)
    loss_on(one, given).backward()
    optimizer.step()
    gram = x.T @ x / len(x)
    damped = gram + damping * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    values, vectors = torch.linalg.eigh(damped)
    root = (vectors / values.sqrt()) @ vectors.T
    wanted = torch.linalg.svd(gradient @ root).Vh[:3] @ root
    new = one.lora_A.weight.detach()
    # The same rows up to rotation and scale, orthogonal and equally long where X is white.
    inside = torch.linalg.lstsq(wanted.T, new.T)
    assert relative_error((wanted.T @ inside.solution).T, new) < 1e-9
    hidden = new @ damped @ new.T
    assert relative_error(hidden, torch.eye(3, dtype=torch.float64) * hidden[0, 0]) < 1e-9
    torch.testing.assert_close(new.norm(), old.norm())


def test_the_gradient_of_b_becomes_the_one_for_the_new_a() -> None:
    """Exactly, for a gradient of no more directions than A has rows."""
    one, given = layer(), data(3)
    optimizer = optimizer_of(one, lr=0.0, momentum=0.0)
    loss_on(one, given).backward()
    optimizer.step()
    held = optimizer.state[one.lora_B.weight]["exp_avg"].clone()
    optimizer.zero_grad()
    loss_on(one, given).backward()
    assert relative_error(held, one.lora_B.weight.grad) < 1e-9


def test_no_other_combination_of_the_old_gradients_is_nearer_to_the_new_one() -> None:
    """With more directions than rows it is the least-squares solution of the sketch."""
    one, given = layer(), data(50)
    old = one.lora_A.weight.detach().clone()
    errors_at_output = (one.base_layer(given[0]) - given[1]).detach()
    gradient = errors_at_output.T @ given[0]
    pair = LoRAPair(A=one.lora_A.weight, B=one.lora_B.weight, input_module=one, output_module=one)
    first = FirstStep([pair])
    first.consume(0, given[0], errors_at_output)
    damped = DampedGram.from_gram(torch.eye(9).double(), torch.ones(()).double(), 0.3)
    (start,) = first.start(lambda _: damped).values()
    target, basis = gradient @ one.lora_A.weight.detach().T, gradient @ old.T
    best = torch.linalg.lstsq(basis, target).solution
    assert relative_error(start.change, best) < 1e-9  # the sketch of so small a layer is complete
    assert relative_error(basis @ start.change, target) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_bitwise_the_same(kind: str) -> None:
    model = built(kind)
    given = regression()
    optimizer = optimizer_of(model, lr=0.0)
    before = parameters_of(model)
    outputs = squares(model, given)
    outputs.backward()
    optimizer.step()
    assert torch.equal(squares(model, given), outputs)
    for name, value in parameters_of(model).items():
        assert torch.equal(value, before[name]) != ("lora_A" in name)
        torch.testing.assert_close(value.norm(), before[name].norm(), rtol=1e-3, atol=0)


# ------------------------------------------------------------------ how training goes on


def test_only_the_adapters_differ_after_the_first_step_and_nothing_is_run_twice() -> None:
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    results = []
    for init in (None, "curvature"):
        model = fresh_tagger()
        optimizer = optimizer_of(model, init=init)
        model.head.register_forward_hook(count)
        train(model, optimizer, [0])
        results.append((parameters_of(model), optimizer.param_groups[0]))
    assert runs == 2
    (plain, plain_group), (started, group) = results
    for name in plain:
        assert torch.equal(plain[name], started[name]) == ("lora" not in name)
    assert group["steps_taken"] == plain_group["steps_taken"] == 1
    assert group["lr"] == plain_group["lr"]
    assert "init_pending" not in plain_group


def test_a_schedule_of_the_learning_rate_is_not_distorted() -> None:
    rates = []
    for init in (None, "curvature"):
        model = fresh_tagger()
        optimizer = optimizer_of(model, init=init)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=6)
        seen = []
        for seed in range(5):
            seen.append(optimizer.param_groups[0]["lr"])
            train(model, optimizer, [seed])
            schedule.step()
        rates.append((seen, optimizer.param_groups[0]["steps_taken"]))
    assert rates[0] == rates[1]
    assert rates[0][1] == 5
    assert len(set(rates[0][0])) == 5


def test_every_b_moves_in_the_first_step_and_a_is_set_once() -> None:
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    train(model, optimizer, [0])
    assert optimizer.param_groups[0]["init_pending"] is False
    after_first = parameters_of(model)
    assert all(value.any() for name, value in after_first.items() if "lora_B" in name)
    train(model, optimizer, [1])
    for name, value in parameters_of(model).items():
        if "lora_A" in name:  # an Adam step, not another subspace
            assert float((value - after_first[name]).abs().max()) < 3e-2
    assert not any(optimizer.diagnostics().values())


def test_it_learns_from_there() -> None:
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    before = float(loss_of(model, batch(0)).detach())
    train(model, optimizer, [0] * 15)
    assert float(loss_of(model, batch(0)).detach()) < before - 0.1


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_add_up(parts: int) -> None:
    results = []
    for count in (1, parts):
        model = fresh_tagger()
        optimizer = optimizer_of(model)
        tokens, mask, labels = batch(0)
        for index in range(count):
            rows = slice(index, None, count)
            piece = tokens[rows], mask[rows], labels[rows]
            (loss_of(model, piece) / count).backward()
        optimizer.step()
        results.append(parameters_of(model))
    assert_close(*results, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_that_was_zeroed_is_not_learned_from(set_to_none: bool) -> None:
    results = []
    for missed in (0, 2):
        model = fresh_tagger()
        optimizer = optimizer_of(model)
        for index in range(missed):
            loss_of(model, batch(50 + index)).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
        train(model, optimizer, range(3))
        results.append(snapshot(model, optimizer))
    assert_equal(*results)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**12])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    """Neither does GradScaler's, which hooks see and ``.grad`` does not."""
    results = []
    for factor in (1.0, scale):
        model = fresh_tagger()
        optimizer = optimizer_of(model)
        (factor * loss_of(model, batch(0))).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= factor
        optimizer.step()
        results.append(parameters_of(model))
    assert_close(*results, rtol=1e-3, atol=2e-5)


# --------------------------------------------------------------------- save and resume


@pytest.mark.parametrize("saved_at", [0, 1, 2, 7])
@pytest.mark.parametrize("init", [None, "curvature"])
def test_resuming_is_bitwise_and_the_saved_state_decides(saved_at: int, init: str | None) -> None:
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(saved_at))
    other = fresh_tagger(seed=7)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = optimizer_of(other, init=init)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(saved_at, 9))
    train(other, resumed, range(saved_at, 9))
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))


def test_saving_between_backward_and_step_loses_what_came_with_the_gradient() -> None:
    """As for the curvature: gradients are no part of a state dict."""
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    loss_of(model, batch(50)).backward()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    other = fresh_tagger()
    reference = optimizer_of(other)
    train(other, reference, range(2))
    assert_equal(snapshot(model, optimizer), snapshot(other, reference))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_start_alike(copied: Any) -> None:
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    other, its_optimizer = copied((model, optimizer))
    for each, stepping in ((model, optimizer), (other, its_optimizer)):
        train(each, stepping, range(3))
    assert_equal(snapshot(other, its_optimizer), snapshot(model, optimizer))


# ------------------------------------------------------------- what it leaves as it was


def test_an_adapter_that_holds_something_is_left_alone() -> None:
    model = fresh_tagger()
    kept = model.blocks[0].q
    nn.init.normal_(kept.lora_B.weight, std=0.1)
    before = parameters_of(model)
    optimizer = optimizer_of(model, lr=0.0)
    train(model, optimizer, [0])
    for name, value in parameters_of(model).items():
        moved = "lora_A" in name and "blocks.0.q" not in name
        assert torch.equal(value, before[name]) != moved


@pytest.mark.filterwarnings("ignore::cg_optim.errors.NumericalWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_first_batch_is_waited_out_where_it_is_known(
    bad: float, where_values_are: str
) -> None:
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    before = parameters_of(model)
    (bad * loss_of(model, batch(0))).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert_equal(parameters_of(model), before)
    assert optimizer.diagnostics()["pair skipped"] > 0
    assert optimizer.param_groups[0]["init_pending"] is (where_values_are == "at hand")
    train(model, optimizer, [1])
    assert optimizer.param_groups[0]["init_pending"] is False


def test_a_step_without_a_backward_does_not_use_it_up() -> None:
    model = fresh_tagger()
    optimizer = optimizer_of(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.param_groups[0]["init_pending"] is True


# ---------------------------------------------------------------------------- refusals


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(errors.HyperparameterError, match="init is 'curve'; expected 'curvature'"):
        CGLoRAOptimizer(fresh_tagger(), init="curve")
    with pytest.raises(errors.HyperparameterError, match="curvature is None; it needs one"):
        CGLoRAOptimizer(fresh_tagger(), init="curvature", curvature=None)
    wide = LoRALinear(4, 5, r=6)
    with pytest.raises(errors.InitialisationError, match=r"rank 6 is too large.*at most 4"):
        CGLoRAOptimizer(wide, init="curvature")
    CGLoRAOptimizer(wide)


# --------------------------------------------------------------------------- two ranks


def first_step_of_rank(rank: int, folder: Path, looking: bool) -> None:
    """One step of one of two ranks, and what came of it in a file."""
    if not looking:
        host.at_hand = lambda tensor: False
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = fresh_tagger()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = CGLoRAOptimizer(wrapped, lr=0.0, init="curvature")
    if rank:  # the second rank does not use the second block
        model.blocks = model.blocks[:1]
    loss_of(wrapped, batch(rank)).backward()
    optimizer.step()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    trained = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    torch.save((trained, moments), folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads do not always survive a regular end


def test_two_ranks_with_different_data_start_alike(tmp_path: Path, where_values_are: str) -> None:
    looking = where_values_are == "at hand"
    ranks = (processes.start(first_step_of_rank, rank, tmp_path, looking) for rank in range(2))
    processes.finish(*ranks)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(one, other)
    before = parameters_of(fresh_tagger())
    for after, (name, value) in zip(one[0], before.items(), strict=True):
        assert torch.equal(after, value) != ("lora_A" in name)
