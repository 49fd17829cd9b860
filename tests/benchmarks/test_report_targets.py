"""The table of promises kept, against numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.cells import Cell, Result
from benchmarks.metrics import Width
from benchmarks.report.measures import Measures, Reach, Timing
from benchmarks.report.table import MISSING
from benchmarks.report.targets import COLUMNS, keep, targets
from benchmarks.report.topics import Topic
from benchmarks.sweep import Entry, Ledger, Study

TITLES = {"adamw": "AdamW", "cg": "ours", "soap": "SOAP", "full-muon": "full"}


def cell(method: str, seed: int = 1, lr: float = 1e-2) -> Cell:
    return Cell("lm", "medium", "t", method, lr, None, seed, 10, "r")


def one(method: str, mean: float, **more: object) -> Measures:
    runs = {
        seed: Result(cell(method, seed), "ok", final={"report": mean + shift})
        for seed, shift in ((1, -0.1), (2, 0.1))
    }
    return Measures(method, TITLES[method], runs=runs, **more)  # type: ignore[arg-type]


def topic(*results: Result, preset: str = "medium") -> Topic:
    study = Study("lm", preset, "t", "r", 10, tuple(Entry(name, 1e-2) for name in TITLES))
    return Topic(Ledger(study, list(results)), TITLES, "lm / t", full=frozenset({"full-muon"}))


ADAMW = one(
    "adamw", 3.0, kl=(0.2, 0.01), timing=Timing(8.0, 2.0), width_own=Width(1e-3, 2e-3, False, False)
)
OURS = one(
    "cg", 2.0, kl=(0.1, 0.01), timing=Timing(8.0, 3.0, 1.0), budget=0.8, steps=Reach(6.0), gap=0.5,
    width_own=Width(1e-3, 8e-3, False, False), width_adamw=Width(1e-3, 1e-2, False, False),
    default=1.01,
)  # fmt: skip


def test_every_promise_is_relative_to_adamw() -> None:
    kept = keep(topic(), [ADAMW, OURS, one("soap", 2.5), one("full-muon", 1.0)])
    assert kept is not None
    assert kept.steps == 0.6  # the curve comes there before the shorter run
    assert kept.seconds == pytest.approx(0.6 * 1.2)
    assert (kept.kl, kept.gap, kept.default) == (0.5, 0.5, 1.01)
    assert kept.width == pytest.approx(10.0)
    assert kept.own_width == pytest.approx(4.0)
    assert kept.peer == "SOAP: -0.500, lower"


def test_only_runs_that_diverge_where_adamw_is_good_count() -> None:
    results = [Result(cell("cg", lr=lr), "diverged") for lr in (1e-3, 2e-3, 1e-2)]
    kept = keep(topic(*results), [ADAMW, OURS])
    assert kept is not None
    assert kept.diverged == 2
    assert kept.peer == MISSING


def test_a_loss_that_is_not_reached_is_more_than_all_steps() -> None:
    never = replace(OURS, budget=None, steps=Reach(10.0, censored=True))
    kept = keep(topic(), [ADAMW, never])
    assert kept is not None
    assert kept.steps == kept.seconds == math.inf
    shown = dict(
        zip([name for name, _ in COLUMNS], [show(kept) for _, show in COLUMNS], strict=True)
    )
    assert shown["steps"] == shown["seconds"] == ">1"


def test_a_task_on_which_ours_breaks_stays_in_the_table() -> None:
    kept = keep(topic(), [ADAMW, replace(OURS, state="diverged", diverged=4)])
    assert kept is not None
    assert (kept.steps, kept.peer, kept.width, kept.diverged) == (math.inf, "diverged", 0.0, 4)


def test_a_run_that_diverged_is_named_where_there_is_no_mean() -> None:
    broken = replace(OURS, runs={**OURS.runs, 2: Result(cell("cg", 2), "diverged")})
    kept = keep(topic(), [ADAMW, broken, one("soap", 2.5)])
    assert kept is not None
    assert kept.peer == "SOAP: ours 1 of 2 diverged or failed"


def test_there_is_no_divergence_from_a_full_fine_tuning_that_is_no_goal() -> None:
    kept = keep(topic(), [ADAMW, replace(OURS, gap=None)])
    assert kept is not None
    assert kept.kl is None


def test_nothing_is_said_of_unfinished_sweeps_and_other_presets() -> None:
    assert keep(topic(), [ADAMW, replace(OURS, state="unfinished")]) is None
    assert keep(topic(), [OURS]) is None
    assert targets([(topic(preset="quick"), [ADAMW, OURS])]) == ""


def test_the_last_row_has_the_medians_of_what_was_measured() -> None:
    other = replace(OURS, gap=None, budget=0.4, width_adamw=Width(1.0, 0.0, False, False))
    lines = targets([(topic(), [ADAMW, OURS]), (topic(), [ADAMW, other])]).splitlines()
    cells = [part.strip() for part in lines[4].strip("|").split("|")]
    assert cells[:2] == ["median of 2", "0.50"]
    assert cells[4] == "50%"
    assert cells[6] == "5.00"
    assert "none" in lines[3]
