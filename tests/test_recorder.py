"""A recorded run is read as it was written, whatever stopped it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import HyperparameterError, OptimizerTypeError, RunFileError
from cg_optim.recorder import REQUIRED, RunRecorder, read_run
from tests.models import Tagger, assert_equal, batch, loss_of, parameters_of, tagger


def train(
    model: Tagger, optimizer: CGLoRAOptimizer, recorder: RunRecorder, seeds: range
) -> list[float]:
    losses = []
    for seed in seeds:
        loss = loss_of(model, batch(seed))
        loss.backward()
        recorder.record(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def test_every_look_is_a_line(path: Path) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    recorder = RunRecorder(path, optimizer, every=3)
    losses = train(model, optimizer, recorder, range(8))
    run = read_run(path)
    assert [record["step"] for record in run] == [0, 3, 6]
    assert [record["loss"] for record in run] == [losses[0], losses[3], losses[6]]
    assert all(record.keys() == REQUIRED for record in run)
    assert run[0]["lr"] == 1e-2
    assert run[0]["events"] == optimizer.diagnostics()
    known = {layer.name: asdict(layer) for layer in optimizer.layer_diagnostics()}
    assert {layer["name"] for layer in run[2]["layers"]} == known.keys()
    assert run[2]["layers"][0].keys() == known.popitem()[1].keys()
    # Before the first step no input was folded in, and JSON has no NaN.
    assert run[0]["layers"][0]["effective_rank"] is None
    assert run[1]["layers"][0]["effective_rank"] > 1


def test_a_step_of_its_own_trains_alike_and_compares(path: Path) -> None:
    model, twin = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-3), CGLoRAOptimizer(twin, lr=1e-3)
    recorder = RunRecorder(path, optimizer, every=2)
    seen = [recorder.step(lambda seed=seed: loss_of(model, batch(seed))) for seed in range(5)]
    losses = train(twin, other, RunRecorder(path.with_suffix(".twin"), other), range(5))
    assert_equal(parameters_of(model), parameters_of(twin))
    assert [decrease is None for decrease in seen] == [False, True, False, True, False]
    run, twins = read_run(path), read_run(path.with_suffix(".twin"))
    assert [record["step"] for record in run] == [0, 2, 4]
    assert [record["loss"] for record in run] == losses[::2]
    assert [record["decrease"] for record in run] == [seen[i]._asdict() for i in (0, 2, 4)]
    assert [record["layers"] for record in run] == [record["layers"] for record in twins[::2]]
    assert seen[4].ratio == pytest.approx(1, abs=0.3)


def test_a_resumed_run_goes_on_in_the_same_file_and_a_new_one_begins_anew(path: Path) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, RunRecorder(path, optimizer), range(4))
    saved = optimizer.state_dict()
    train(model, optimizer, RunRecorder(path, optimizer), range(4, 6))
    # Killed while writing; the checkpoint is older than the last lines.
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert [record["step"] for record in read_run(path)] == [0, 1, 2, 3, 4, 5]
    again = CGLoRAOptimizer(model, lr=1e-2)
    again.load_state_dict(saved)
    losses = train(model, again, RunRecorder(path, again), range(14, 17))
    run = read_run(path)
    assert [record["step"] for record in run] == [0, 1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in run[4:]] == losses
    fresh = CGLoRAOptimizer(tagger())
    RunRecorder(path, fresh)
    with pytest.raises(RunFileError, match="no record"):
        read_run(path)


def test_continuing_without_the_file_begins_one(path: Path) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, RunRecorder(path, optimizer), range(1))
    path.unlink()
    train(model, optimizer, RunRecorder(path, optimizer), range(1))
    assert [record["step"] for record in read_run(path)] == [1]


def test_numbers_that_are_not_finite_become_null(path: Path) -> None:
    optimizer = CGLoRAOptimizer(tagger())
    RunRecorder(path, optimizer).record(math.inf)
    assert json.loads(path.read_text())["loss"] is None


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_every_must_be_a_positive_integer(path: Path, every: object) -> None:
    with pytest.raises(HyperparameterError, match="every"):
        RunRecorder(path, CGLoRAOptimizer(tagger()), every=every)


def test_another_optimizer_is_refused(path: Path) -> None:
    adamw = torch.optim.AdamW(tagger().parameters())
    with pytest.raises(OptimizerTypeError, match="AdamW"):
        RunRecorder(path, adamw)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "\n\n", "[1]\n", '{"step": 1}\n', "nonsense\n{}\n"])
def test_other_files_are_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(RunFileError, match=str(path)):
        read_run(path)
