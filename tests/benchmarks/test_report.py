"""The report against numbers computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cells import Cell, Result, save, write_json
from benchmarks.marked_block import markers, refresh_block
from benchmarks.methods import METHODS
from benchmarks.metrics import Paired, Width
from benchmarks.report import BLOCK, plots, styles
from benchmarks.report.measures import NOWHERE, Measures, Reach, gap, measure
from benchmarks.report.step_cost import lines, step_costs, step_text
from benchmarks.report.summary import summary_row
from benchmarks.report.table import MISSING, markdown, number, plus_minus, size, tables, width
from benchmarks.report.topics import Topic, make_topic, topics
from benchmarks.sweep import Entry, Ledger, Study, plan

BEGIN, END = markers(BLOCK)

BASE = {"adamw": 2.0, "cg": 1.0, "full-adamw": 0.5}
TITLES = {"adamw": "AdamW", "cg": "ours", "full-adamw": "full"}
FULL = {"width": True, "defaults": True, "short": False}


def study(*names: str, **changes: object) -> Study:
    entries = tuple(Entry(name, lr=1e-3, default=1e-3) for name in names or ("adamw", "cg"))
    extras = {"width": False, "defaults": False, "short": False, **changes}
    return Study("linear", "tiny", "t", "r", 10, entries, **extras)  # type: ignore[arg-type]


def loss(cell: Cell) -> float:
    """Lowest at 0.001; half a decade away higher by 10 %; seeds 0.01 apart."""
    decades = abs(math.log10(cell.lr) + 3)
    return BASE[cell.method] * (1 + 0.2 * decades) + 0.01 * cell.seed


def record(cell: Cell, value: float) -> Result:
    curve = {"step": [0.0, 5.0, 10.0], "seconds": [0.0, 1.0, 2.0]}
    curve |= {half: [9.0, 1.5, value] for half in ("choose", "report")}
    final = {"choose": value, "report": value, "accuracy": 0.5}
    costs = {"state_bytes": 2048.0, "peak_memory": 3.0 * 2**20}
    return Result(cell, "ok", curve=curve, final=final, costs=costs)


def finished(ours: Study, value: Callable[[Cell], float] = loss) -> list[Result]:
    """All cells that the plan asks for."""
    results: list[Result] = []
    while requests := plan(ours, results):
        results += [record(request.cell, value(request.cell)) for request in requests]
    return results


def topic(ours: Study, results: list[Result]) -> Topic:
    return Topic(Ledger(ours, results), TITLES, "t")


def measured(ours: Study, results: list[Result]) -> dict[str, Measures]:
    return {one.method: one for one in measure(topic(ours, results))}


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]


def test_losses_differences_and_steps_are_paired_over_seeds() -> None:
    ours = study()
    found = measured(ours, finished(ours))
    assert list(found) == ["cg", "adamw"]  # the lowest loss first
    # Losses 1.01, 1.02, 1.03: mean 1.02, two standard errors 2 * 0.01 / sqrt(3).
    assert found["cg"].loss == (pytest.approx(1.02), pytest.approx(0.02 / math.sqrt(3)))
    assert found["cg"].difference is not None
    assert found["cg"].difference.mean == pytest.approx(-1.0)
    assert found["cg"].difference.verdict == "lower"
    assert found["adamw"].difference is None
    # The curves pass 1.5 at step 5, AdamW itself ends at its own loss.
    assert found["cg"].steps == Reach(5.0)
    assert found["adamw"].steps == Reach(5.0)
    assert found["cg"].state_bytes == 2048
    assert found["cg"].metrics == {"accuracy": (0.5, 0.0)}


def test_what_is_not_reached_is_censored() -> None:
    ours = study()
    results = finished(ours, lambda cell: loss(cell) if cell.method == "cg" else 0.1)
    steps = measured(ours, results)["cg"].steps
    assert steps == Reach(10.0, censored=True)


def test_widths_and_default() -> None:
    ours = study(**FULL)
    found = measured(ours, finished(ours))
    # Half a decade costs 10 %, so 2 % (of the loss on seed 0) are a tenth of a decade each way.
    own = found["cg"].width_own
    assert own is not None
    assert own.ratio == pytest.approx(10**0.2, rel=1e-2)
    # AdamW's loss is twice ours: five decades each way, wider than the sweep may go.
    assert found["cg"].width_adamw is not None
    assert found["cg"].width_adamw.is_open
    assert found["adamw"].width_adamw is None
    assert found["cg"].default == pytest.approx(1.0)
    worse = measured(ours, finished(ours, lambda cell: loss(cell) + 3 * (cell.method == "cg")))
    assert worse["cg"].width_adamw is NOWHERE


def test_gap_closed_uses_the_better_full_fine_tuning() -> None:
    losses = {
        "adamw": {1: 2.0, 2: 2.2},
        "cg": {1: 1.5, 2: 1.7},
        "full-adamw": {1: 1.8, 2: 2.0},
        "full-muon": {1: 1.0, 2: 1.2},
    }
    assert gap(losses, "cg") == pytest.approx(0.5)
    assert gap(losses, "full-muon") == pytest.approx(1.0)
    assert gap({name: losses[name] for name in ("adamw", "cg")}, "cg") is None
    # Within the spread of AdamW's distance there is no gap to speak of.
    assert gap({**losses, "full-muon": {1: 0.0, 2: 3.5}}, "cg") is None


def test_solo_times_and_divergences_count_for_their_own_cells_only() -> None:
    ours = study()
    results = finished(ours)
    cell = next(r.cell for r in results if r.cell.method == "cg" and r.cell.seed == 1)
    timed = {"cell": cell.name, "ms_forward_backward": 5.0, "ms_step": 3.0, "ms_hooks": 1.0}
    kl = {"seeds": {"1": 0.25, "2": 9.0}, "cells": {"1": cell.name, "2": "another"}}
    before = topic(ours, results)
    found = {
        one.method: one
        for one in measure(replace(before, timings={"cg": timed}, divergences={"cg": kl}))
    }
    timing = found["cg"].timing
    assert timing is not None
    assert (timing.forward_backward, timing.hooks, timing.step, timing.whole) == (4, 1, 3, 8)
    assert found["cg"].seconds == Reach(pytest.approx(5 * 8e-3))  # type: ignore[arg-type]
    assert found["cg"].kl == (0.25, math.inf)
    stale = replace(before, timings={"cg": {**timed, "cell": "another"}})
    assert {one.method: one.timing for one in measure(stale)}["cg"] is None


def test_unfinished_broken_and_diverged_methods_are_marked() -> None:
    ours = study("adamw", "cg", "full-adamw")
    results = finished(ours)
    results = [r for r in results if (r.cell.method, r.cell.seed) != ("cg", 3)]
    for result in results:
        if result.cell.method == "full-adamw":
            result.status, result.error = "failed", "ValueError: a | b"
    found = measured(ours, results)
    assert [found[name].state for name in ("adamw", "cg", "full-adamw")] == [
        "", "unfinished", "failed",
    ]  # fmt: skip
    assert found["full-adamw"].failed == found["full-adamw"].count > 0
    text = tables(topic(ours, results), list(found.values()))
    assert "**ours** (unfinished)" in text
    assert "full failed: `ValueError: a | b`" in text


def test_columns_without_values_are_left_out_and_missing_is_a_dash() -> None:
    columns = [
        ("name", lambda one: one.method),
        ("memory", lambda one: size(one.memory)),
        ("never", lambda one: MISSING),
    ]
    text = markdown(columns, [Measures("a", "A", memory=1.0), Measures("b", "B")])
    assert rows(text) == [["name", "memory"], ["---", "---"], ["a", "1 B"], ["b", MISSING]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.001), "0.001"),
        (number(123456), "123456"),
        (number(0.0), "0"),
        (number(None), MISSING),
        (plus_minus((1.23456, 0.0123)), "1.235 ± 0.012"),
        (plus_minus((1234.56, 123.0)), "1235 ± 123"),
        (plus_minus((1.23456, math.inf)), f"1.235 ± {MISSING}"),
        (plus_minus((math.inf, math.nan)), "diverged or failed"),
        (size(1536.0), "1.5 KiB"),
        (width(Width(1e-3, 1e-1, low_open=False, high_open=True)), "≥100"),
        (width(NOWHERE), "none"),
    ],
)
def test_numbers_are_readable(text: str, expected: str) -> None:
    assert text == expected


def registered(results: list[Result], task: str = "c1e2") -> list[Result]:
    return [replace(one, cell=replace(one.cell, task=task)) for one in results]


def test_cells_of_other_seeds_tasks_methods_and_revisions_are_reported() -> None:
    def rerun(cell: Cell) -> Cell:
        seed = cell.seed + 5 if cell.seed else 0
        return replace(
            cell, seed=seed, task="my-own", revision="old" if cell.method == "cg" else ""
        )

    results = [replace(one, cell=rerun(one.cell)) for one in finished(study())]
    gone = replace(results[0].cell, method="gone[x=1]", revision="")
    found = make_topic([*results, record(gone, 1.0)])
    assert found.study.reporting_seeds == (6, 7, 8)
    assert found.outdated == {"cg"}
    assert found.titles == {
        "adamw": "AdamW", "cg": "CGLoRAOptimizer", "gone[x=1]": "gone[x=1]",
    }  # fmt: skip
    losses = {one.method: one.losses for one in measure(found)}
    assert losses["cg"] == {6: 1.01, 7: 1.02, 8: 1.03}


def test_reported_runs_are_shown_while_tuning_is_unfinished() -> None:
    results = [r for r in finished(study()) if r.cell.seed]
    found = {one.method: one for one in measure(make_topic(registered(results)))}
    assert found["cg"].state == "unfinished"
    assert found["cg"].losses == {1: 1.01, 2: 1.02, 3: 1.03}


def test_short_budgets_are_not_taken_for_the_whole_one() -> None:
    results = registered(finished(study()), "elsewhere")
    short = replace(results[0].cell, steps=3)
    assert make_topic([record(short, 5.0), *results]).study.steps == 10


def test_two_recipes_of_a_task_are_two_topics(tmp_path: Path) -> None:
    for result in registered(finished(study())):
        save(result, tmp_path)
        save(replace(result, cell=replace(result.cell, recipe="r2")), tmp_path)
    labels = [one.label for one in topics(tmp_path)]
    assert labels == ["linear / tiny / c1e2 / r", "linear / tiny / c1e2 / r2"]


def test_broken_files_beside_the_cells_are_passed_over(tmp_path: Path) -> None:
    for result in registered(finished(study())):
        save(result, tmp_path)
    folder = tmp_path / "linear/tiny/c1e2"
    (folder / "timing.json").write_text("{")
    (folder / "divergence.json").write_text(json.dumps({"reference": "full-adamw", "floor": 0.1}))
    (found,) = topics(tmp_path)
    assert found.timings == {}
    assert found.floor == (0.1, "full-adamw")


def test_nothing_to_report_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no finished runs to report\n"
    assert list(tmp_path.iterdir()) == []


def test_curves_are_over_the_common_steps_of_runs_that_did_not_break_off() -> None:
    cells = {seed: Cell("w", "p", "t", "m", 1.0, None, seed, 10, "r") for seed in (1, 3)}
    runs = {seed: record(cell, float(seed)) for seed, cell in cells.items()}
    runs[3].curve = {"step": [0.0, 10.0], "report": [2.0, 3.0]}
    runs[3].status = "diverged"
    broken = replace(runs[1], status="diverged", curve={"step": [0.0, 5.0], "report": [9.0, 1e9]})
    one = Measures("m", "M", runs={**runs, 2: broken})
    found = plots.curve(one, milliseconds=2.0)
    assert found == plots.Curve([0.0, 0.02], [5.5, 2.0], [2.0, 1.0], [9.0, 3.0])
    assert plots.label_of(one) == "M (2 of 3 diverged)"
    assert plots.curve(Measures("m", "M", runs={2: broken})) is None


def test_the_loss_axis_holds_the_ends_that_matter_and_cuts_off_the_rest() -> None:
    ends = {"adamw": 2.0, "cg": 1.9, "full-adamw": 1.5, "bad": 5.0}
    low, high = plots.window(1.5, ends, 10.0, log_scale=False)
    assert low < 1.5 < 2.0 < high < 5.0
    low, high = plots.window(1.5, ends, 10.0, log_scale=True)
    assert low < 1.5 < 10.0 < high
    # Nothing was learned: still an axis.
    low, high = plots.window(3.0, {"adamw": 3.0}, 3.0, log_scale=False)
    assert low < 3.0 < high
    # All went up: the start and the ends are seen, not what is far away.
    low, high = plots.window(3.0, {"adamw": 3.1, "cg": 99.0}, 3.0, log_scale=False)
    assert low < 3.0 < 3.1 < high < 99.0


def test_no_two_methods_look_alike_and_ours_is_the_widest_line() -> None:
    looks = {name: styles.style(name) for name in METHODS}
    assert len({(one["color"], str(one["linestyle"])) for one in looks.values()}) == len(METHODS)
    widths = {name: look["linewidth"] for name, look in looks.items()}
    assert widths.pop("cg") > max(widths.values())
    assert styles.style("cg[damping=1]") == styles.style("cg[damping=1]") != looks["cg"]


ROWS = [
    {"model": "7b", "rank": 16, "layers_timed": 1, "layers": 32, "ms": {"adamw": 2.0, "cg": 5.0}},
    {"model": "7b", "rank": 8, "ms": {"cg": 4.0, "adamw": None}, "state_bytes": {"cg": 1024}},
    {"model": "13b", "rank": 8, "ms": 3.0},
]


def test_step_costs_with_missing_keys(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step/a.json").write_text(json.dumps({"rows": ROWS}))
    (tmp_path / "step/b.json").write_text("[]")
    (cost,) = step_costs(tmp_path)
    found = rows(step_text(cost))
    assert found[:5] == [
        ["model", "rank", "layers timed", "ms adamw", "ms cg"],
        ["---"] * 5,
        ["7b", "16", "1 of 32", "2", "5"],
        ["7b", "8", MISSING, MISSING, "4"],
        ["13b", "8", MISSING, MISSING, MISSING],
    ]
    assert ["7b", "8", MISSING, "1 KiB"] in found
    assert lines(cost, "7b") == {"adamw": [(16, 2.0)], "cg": [(8, 4.0), (16, 5.0)]}
    assert lines(cost, "13b") == {}


def test_checks_and_graphs_of_the_step_work_are_told(tmp_path: Path) -> None:
    content = {
        "rows": ROWS,
        "training_step": [{"model": "toy", "name": "cg", "ms_step": 2.0, "share": 0.25}],
        "step_error_against_float64": [{"error": 1e-6}, {"error": 2e-5}, {}],
        "cuda_graph": {"a": {"supported": True, "ms": 1.5}, "b": {"error": "not captured"}},
    }
    write_json(tmp_path / "step/a.json", content)
    text = step_text(step_costs(tmp_path)[0])
    assert "| toy |" in text
    assert "| 25% |" in text
    assert "against float64: 2.0e-05." in text
    assert "CUDA graph, a: 1.5 ms." in text
    assert "CUDA graph, b: not captured." in text


def test_summary_names_the_best_peer_and_leaves_out_variants_of_ours() -> None:
    def one(name: str, mean: float, **more: object) -> Measures:
        cells = {s: Cell("w", "p", "t", name, 1.0, None, s, 10, "r") for s in (1, 2)}
        runs = {seed: record(cell, mean + 0.2 * seed - 0.3) for seed, cell in cells.items()}
        return Measures(name, name.upper(), runs=runs, steps=Reach(5.0), **more)  # type: ignore[arg-type]

    found = [
        one("adamw", 3.0),
        one("cg", 2.0, difference=Paired(-1.0, 0.1, 2)),
        one("cg[x=1]", 1.5),
        one("soap", 2.5),
        one("kron", 2.2, state="unfinished"),
        one("full-adamw", 1.0),
    ]
    empty = replace(topic(study(), []), full=frozenset({"full-adamw"}))
    # Losses 0.1 on either side of the mean: two standard errors are 0.2.
    assert summary_row(empty, found) == [
        "t", "3.00 ± 0.20; 5 steps (of 10)", "2.00 ± 0.20; 5 steps", "SOAP: 2.50 ± 0.20; 5 steps",
        "1.00 ± 0.20; 5 steps", "lower",
    ]  # fmt: skip
    assert summary_row(empty, found[:1]) is None


def test_the_whole_report_and_the_blocks_of_the_readmes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "benchmarks" / "results"
    results = registered(finished(study("adamw", "cg", "full-adamw", **FULL)))
    worst = max(results, key=lambda one: one.cell.lr)
    worst.status = "diverged"
    for result in results:
        save(result, out)
    write_json(out / "step" / "tiny-cpu.json", {"rows": ROWS})
    cell = next(r.cell for r in results if r.cell.method == "cg" and r.cell.seed == 1)
    timed = {"cg": {"cell": cell.name, "ms_forward_backward": 5.0, "ms_step": 3.0}}
    write_json(out / "linear/tiny/c1e2/timing.json", {"methods": timed})
    for readme in (tmp_path / "README.md", tmp_path / "benchmarks/README.md"):
        readme.write_text(f"a\n{BEGIN}\n{END}\nb\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.write_report(out, refresh=True)
    text = (out / "report.md").read_text()
    images = [line.rpartition("(")[2][:-1] for line in text.splitlines() if line.startswith("![")]
    assert [Path(image).name for image in images] == [
        "linear-tiny-c1e2-steps.png", "linear-tiny-c1e2-seconds.png", "linear-tiny-c1e2-rates.png",
        "step-tiny-cpu.png",
    ]  # fmt: skip
    for image in images:
        png = (out / image).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 60_000
        assert f"(results/{image})" in (tmp_path / "benchmarks/README.md").read_text()
    front = (tmp_path / "README.md").read_text()
    assert "| linear / tiny / c1e2 | " in front
    assert "steps (of 10) |" in front


def test_only_the_block_between_markers_changes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    assert refresh_block(path, BLOCK, "new")
    assert path.read_text() == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    path.write_text("no markers")
    assert not refresh_block(path, BLOCK, "new")
    assert path.read_text() == "no markers"
