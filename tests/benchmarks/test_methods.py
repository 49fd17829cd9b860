"""Every method's adapter trains a toy, options reach constructors, wrong names are refused."""

import importlib.util
import statistics

import pytest
import torch
from torch import nn

from benchmarks import execute, methods, training
from benchmarks.cells import Cell, load
from benchmarks.usage import UsageError
from benchmarks.works import linear
from benchmarks.works import work as work_named
from cg_optim import LoRAPair, default_learning_rate, find_lora_pairs

NEEDS = {"corda": "attr"}
"""Packages that a method needs besides its own and does not declare."""
TASK = linear.tasks("tiny", None, "cpu")[0]


def cell(method, lr, steps=3, seed=1):
    return Cell("linear", "tiny", TASK.name, method, lr, None, seed, steps, TASK.recipe)


def missing(method):
    packages = (method.package, NEEDS.get(method.name, method.package))
    return any(importlib.util.find_spec(package) is None for package in packages)


@pytest.mark.parametrize("name", methods.METHODS | methods.STARTED_METHODS)
def test_lowers_the_loss_of_a_toy_in_three_steps(name):
    method = methods.get(name)
    if missing(method):
        pytest.skip(f"{name}: its package, or what that needs, is not installed")
    problem = linear.problem(TASK)
    result, _ = training.run(problem, method, cell(name, method.lr))
    assert result.status == "ok"
    assert result.curve["report"][-1] < result.curve["report"][0]
    assert result.costs["trained_parameters"] > 0
    assert result.costs["state_bytes"] > 0
    assert len(result.train) == 3


def test_full_fine_tuning_trains_the_weights_and_lora_does_not():
    problem = linear.problem(TASK)
    full = training.build(problem, methods.get("full-adamw"), 1)
    assert not any("lora" in name for name, _ in full.named_parameters())
    adapted = training.build(problem, methods.get("adamw"), 1)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name for name in names)


def test_initialisations_keep_the_function():
    problem = linear.problem(TASK)
    losses = []
    for name in ("adamw", "pissa", "eva", "lora-ga"):
        model = training.build(problem, methods.get(name), 1)
        losses.append(problem.evaluate(model.eval())["report"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)


def test_every_method_sees_the_same_data_and_weights():
    first = []
    for name in ("adamw", "soap", "lora+"):
        result, _ = training.run(linear.problem(TASK), methods.get(name), cell(name, 1e-3))
        first.append((result.train[0], result.curve["choose"][0]))
    assert len(set(first)) == 1


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    [
        ("cg[damping=0.3]", "damping", 0.3),
        ("cg[curvature=4]", None, 4),
        ("cg[eps=1e-6,weight_decay=0.1]", "weight_decay", 0.1),
        ("adamw[eps=1e-5]", "eps", 1e-5),
        ("lora+[eps=1e-5,ratio=2]", "eps", 1e-5),
        ("riemannian[weight_decay=0.1,reg=1]", "weight_decay", 0.1),
    ],
)
def test_options_reach_the_constructor(spec, key, value):
    method = methods.get(spec)
    model = training.build(linear.problem(TASK), method, 1)
    optimizer = method.optimizer(model, 1e-3, None)
    if key is not None:
        assert {group[key] for group in optimizer.param_groups} == {value}
    assert dict(method.options) != {}


def test_betas_and_none_can_be_given():
    method = methods.get("cg[betas=0.8:0.95,curvature=none]")
    model = training.build(linear.problem(TASK), method, 1)
    optimizer = method.optimizer(model, 1e-3, None)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    "spec", ["cg[damping=0.4]", "nadam[betas=0.7:0.999]", "lora+[ratio=2]", "riemannian[reg=0.1]"]
)
def test_a_knob_given_by_hand_is_not_swept(spec):
    method = methods.get(spec)
    assert len(methods.get(spec.partition("[")[0]).values) > 1
    assert method.values == (None,)
    assert method.entry(1.0, True).method == spec
    ((key, value),) = method.options
    optimizer = method.optimizer(training.build(linear.problem(TASK), method, 1), 1e-3, None)
    if key in optimizer.param_groups[0]:  # PEFT keeps its own where they can't be read
        assert optimizer.param_groups[0][key] == value


def test_every_second_knob_is_among_those_given_by_hand():
    swept = {name for name, method in methods.METHODS.items() if len(method.values) > 1}
    assert swept == {"cg", "nadam", "lora+", "riemannian"}


@pytest.mark.parametrize("spec", ["sgd", "cg[damping]", "cg[=1]", "cg[damping=1", "[a=1]", ""])
def test_wrong_names_are_refused_in_one_line(spec):
    with pytest.raises(UsageError) as caught:
        methods.get(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "soap", "kron", "lora-rite", "cg"])
def test_unknown_option_is_recorded_as_a_failure(name, tmp_path):
    job = execute.Job(cell(f"{name}[nonsense=1]", 1e-3), TASK, tmp_path, 1, predictions=False)
    before = torch.get_num_threads()
    execute.run_job(job)
    torch.set_num_threads(before)
    result = load(tmp_path / job.cell.path)
    assert result.status == "failed"
    assert "nonsense" in result.error
    assert str(tmp_path) not in result.error


def test_select_drops_repetitions_and_defaults_to_all():
    assert [m.name for m in methods.select(["soap", "adamw", "soap"])] == ["soap", "adamw"]
    assert [m.name for m in methods.select(None)] == list(methods.METHODS)


def test_switches_that_are_off_do_not_outdate_our_results(monkeypatch):
    before = methods._cg_revision()
    defaults = methods._cg_defaults()
    monkeypatch.setattr(methods, "_cg_defaults", lambda: {**defaults, "strict": False})
    assert methods._cg_revision() == before
    monkeypatch.setattr(methods, "_cg_defaults", lambda: {**defaults, "init": "curvature"})
    assert methods._cg_revision() != before


@pytest.mark.parametrize(
    ("work", "preset"), [("linear", "quick"), ("lm", "quick"), ("nlu", "quick")]
)
def test_our_default_rate_is_the_one_the_optimizer_would_choose(work, preset):
    task = work_named(work).tasks(preset, None, "cpu")[0]
    entry = methods.get("cg").entry(1.0, True, task.adapters)
    width, rank, scaling = task.adapters
    factors = nn.Parameter(torch.zeros(rank, width)), nn.Parameter(torch.zeros(3, rank))
    assert entry.default == default_learning_rate([LoRAPair(*factors, scaling=scaling)])
    assert methods.get("adamw").entry(1.0, True, task.adapters).default == 1e-3
    assert methods.get("cg").entry(1.0, True).default is None


def test_the_width_of_a_task_is_that_of_most_of_its_adapted_layers():
    task = work_named("linear").tasks("tiny", None, "cpu")[0]
    pairs = find_lora_pairs(training.build(linear.problem(task), methods.get("cg"), 1)).pairs
    assert statistics.median(pair.in_features for pair in pairs) == task.width
    assert pairs[0].scaling == task.adapters[2]
