"""Divergences from full fine-tuning, and the timings measured in turns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import divergence, methods, metrics, timing
from benchmarks.cells import Cell, Result
from benchmarks.execute import predictions_path
from benchmarks.runner import Comparison
from benchmarks.works import linear


def reported(tmp_path, names=("adamw", "full-adamw", "full-muon")):
    task = linear.tasks("tiny", None, "cpu")[0]
    task = replace(task, reporting_seeds=(1, 2))
    found = Comparison(task, task.study([methods.get(name) for name in names]))
    losses = {"adamw": 2.0, "full-adamw": 1.5, "full-muon": 1.0}
    while requests := found.requests():
        for request in requests:
            cell = request.cell
            place = abs(np.log10(cell.lr) - np.log10(methods.get(cell.method).lr * 3))
            loss = losses[cell.method] + place
            found.results[cell] = Result(cell, "ok", final={"choose": loss, "report": loss})
            if request.stage == "report":
                path = predictions_path(cell, tmp_path)
                path.parent.mkdir(parents=True, exist_ok=True)
                shift = losses[cell.method] - 1.0 + 0.5 * (cell.seed - 1)
                logits = np.array([[0.0, shift], [shift, 1.0]])
                logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                np.savez_compressed(path, logp=logp)
    return found


def test_divergence_is_from_the_better_full_fine_tuning_seed_by_seed(tmp_path):
    found = reported(tmp_path)
    path = divergence.write_divergences(found, tmp_path)
    record = json.loads(path.read_text())
    assert record["reference"] == "full-muon"
    assert set(record["methods"]) == {"adamw", "full-adamw"}
    assert set(record["methods"]["adamw"]["seeds"]) == {"1", "2"}

    def logp(method, seed):
        cell = next(c for c in found.results if (c.method, c.seed) == (method, seed))
        return np.load(predictions_path(cell, tmp_path))["logp"]

    for method in ("adamw", "full-adamw"):
        for seed in (1, 2):
            expected = metrics.kl_divergence(logp("full-muon", seed), logp(method, seed))
            assert record["methods"][method]["seeds"][str(seed)] == pytest.approx(expected)
    first, second = logp("full-muon", 1), logp("full-muon", 2)
    both = metrics.kl_divergence(first, second) + metrics.kl_divergence(second, first)
    assert record["floor"] == pytest.approx(both / 2)


def test_divergences_outlive_their_predictions_but_not_their_cells(tmp_path):
    found = reported(tmp_path)
    path = divergence.write_divergences(found, tmp_path)
    before = json.loads(path.read_text())
    for file in tmp_path.rglob("*.npz"):
        file.unlink()
    divergence.write_divergences(found, tmp_path)
    assert json.loads(path.read_text()) == before
    before["methods"]["adamw"]["cells"]["1"] = "another"
    path.write_text(json.dumps(before))
    divergence.write_divergences(found, tmp_path)
    assert set(json.loads(path.read_text())["methods"]["adamw"]["seeds"]) == {"2"}


def test_a_run_without_the_better_full_fine_tuning_keeps_it_as_the_reference(tmp_path):
    found = reported(tmp_path)
    path = divergence.write_divergences(found, tmp_path)
    before = json.loads(path.read_text())
    asked = found.task.study([methods.get(name) for name in ("adamw", "full-adamw")])
    divergence.write_divergences(replace(found, study=asked), tmp_path)
    assert json.loads(path.read_text()) == before


def test_no_divergence_without_full_fine_tuning(tmp_path):
    assert divergence.write_divergences(reported(tmp_path, ("adamw",)), tmp_path) is None


def test_timing_measures_all_in_turns_and_names_the_cells(tmp_path):
    task = linear.tasks("tiny", None, "cpu")[0]
    cells = [
        Cell("linear", "tiny", task.name, name, 1e-3, None, 1, 20, task.recipe)
        for name in ("adamw", "cg", "soap")
    ]
    path = tmp_path / timing.FILE
    before = torch.get_num_threads()
    timing.measure(task, cells, 3, path, 1)
    torch.set_num_threads(before)
    record = json.loads(path.read_text())
    assert {name: timed["cell"] for name, timed in record["methods"].items()} == {
        cell.method: cell.name for cell in cells
    }
    for timed in record["methods"].values():
        assert timed["ms_forward_backward"] > 0
        assert timed["ms_step"] > 0
    assert record["methods"]["soap"]["ms_hooks"] == 0
    assert record["methods"]["cg"]["ms_hooks"] >= 0
    assert record["environment"]["threads"] == 1
