"""The comparison of initialisations: its plan, its tables and the measurement of costs."""

import json

import pytest

from benchmarks import methods
from benchmarks.cells import Result, save
from benchmarks.report.table import MISSING
from benchmarks.starts import __main__ as command
from benchmarks.starts import compare, cost
from benchmarks.sweep import plan, rate

TINY = cost.Shape(hidden=32, intermediate=48, layers=1, batch=2, length=16, rank=4)


def test_every_start_of_the_comparison_exists():
    for name in compare.METHODS:
        method = methods.get(name)
        assert method.init or method.options or name in ("adamw", "cg")
        if method.init:
            assert method.follows in ("adamw", "cg")


def test_every_method_has_the_same_sweep_at_a_short_budget():
    (comparison,) = compare.comparisons(None, [7], ["code-b8"], ["adamw", "cg-eva"])
    assert comparison.study.steps == 7
    first = {request.cell.method: set() for request in comparison.requests()}
    for request in comparison.requests():
        assert request.cell.steps == 7
        first[request.cell.method].add(request.cell.lr)
    assert first["adamw"] == first["cg-eva"] == {rate(-10), rate(-8), rate(-6)}


def finish(comparison, out):
    """Run the plan with made-up losses: ``cg-eva`` is lower than ``cg`` by 0.1 on every seed."""
    results = []
    while requests := plan(comparison.study, results):
        for request in requests:
            cell = request.cell
            loss = 2 + abs(cell.lr - 1e-2) + 0.01 * cell.seed - 0.1 * (cell.method == "cg-eva")
            results.append(Result(cell, "ok", final={"choose": loss, "report": loss}))
            save(results[-1], out)


def test_the_table_compares_each_start_with_its_own_optimizer(tmp_path):
    (comparison,) = compare.comparisons(None, [7], ["code-b8"], ["adamw", "cg", "cg-eva", "eva"])
    finish(comparison, tmp_path)
    lines = compare.table(comparison, tmp_path).splitlines()
    assert lines[0] == "**lm / code-b8, 7 steps**"
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[4:]}
    assert next(iter(rows)) == "EVA + CGLoRAOptimizer"
    assert "-0.1" in rows["EVA + CGLoRAOptimizer"]
    assert "lower" in rows["EVA + CGLoRAOptimizer"]
    assert "level" in rows["EVA + AdamW"]


def test_a_start_is_not_compared_with_an_optimizer_that_diverged(tmp_path):
    (comparison,) = compare.comparisons(None, [7], ["code-b8"], ["cg", "cg-eva"])
    finish(comparison, tmp_path)
    for path in (tmp_path / comparison.task.folder / "cg").glob("*-s2-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"status": "diverged"}))
    (row,) = [line for line in compare.table(comparison, tmp_path).splitlines() if "EVA" in line]
    assert row.split(" | ")[-2:] == [MISSING, f"{MISSING} |"]


@pytest.mark.parametrize("start", [None, "lora-ga", "curvature-newton", cost.FIRST_STEP])
def test_costs_are_measured(start):
    found = cost.measure(start, TINY)
    assert found["seconds"] > 0 or start == cost.FIRST_STEP
    assert found["bytes"] >= 0


def test_a_start_that_takes_too_long_is_given_up():
    endless = cost.Shape(hidden=512, intermediate=512, layers=16, batch=64, length=256)
    found = cost.measure_all(endless, threads=1, starts=["lora-ga"], limit=2)
    assert found["starts"] == {"lora-ga": {"error": "not done after 2 s"}}


def test_quick_starts_are_measured_several_times(monkeypatch):
    seconds = {"plain": iter([1.0, 3.0, 2.0]), "pissa": iter([cost.SLOW + 1.0])}

    def run(start, *_):
        return {"seconds": next(seconds[start or "plain"]), "bytes": 8.0}

    monkeypatch.setattr(cost, "_in_own_process", run)
    found = cost.measure_all(TINY, threads=1, starts=[None, "pissa"], rounds=3)
    assert found["starts"]["plain"] == {"seconds": 2.0, "bytes": 8.0}
    assert found["starts"]["pissa"] == {"seconds": 11.0, "bytes": 8.0}


def test_the_table_of_costs_refers_to_plain_adapters_and_to_lora_ga():
    starts = {
        "plain": {"seconds": 1.0, "bytes": 100.0},
        "lora-ga": {"seconds": 9.0, "bytes": 1124.0},
        "curvature-keep": {"seconds": 3.0, "bytes": 356.0},
        "corda": {"error": "ModuleNotFoundError: attrs"},
        cost.FIRST_STEP: {"seconds": 2.0, "bytes": 512.0},
    }
    batches = {"peft": 4, "curvature": 3}
    record = json.loads(json.dumps({"shape": vars(TINY), "batches": batches, "starts": starts}))
    rows = {line.split(" | ")[0].strip("| "): line for line in cost.table(record).splitlines()}
    assert "| 2.00 | 256 B | 25% | 25% |" in rows["curvature-keep"]
    assert "| 2.00 | 512 B | 25% | 50% |" in rows['CGLoRAOptimizer(init="curvature")']
    assert "ModuleNotFoundError" in rows["corda"]
    assert "4 batches of 2 x 16 tokens for PEFT's" in cost.table(record)
    assert "3 for curvature_init_" in cost.table(record)


def test_a_wrong_method_is_a_wrong_request(capsys):
    assert command.main(["table", "--methods", "cg-evil"]) == 2
    assert "unknown method 'cg-evil'" in capsys.readouterr().err
