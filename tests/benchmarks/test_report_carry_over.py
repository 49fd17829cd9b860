"""The table for who has a learning rate for AdamW, against losses made up by hand."""

from __future__ import annotations

import math

from benchmarks.cells import Cell, Result
from benchmarks.report.carry_over import HEADER, carry_over
from benchmarks.report.table import MISSING
from benchmarks.report.topics import Topic
from benchmarks.sweep import Entry, Ledger, Study, rate

TITLES = {"adamw": "AdamW", "cg": "ours"}
ADAMW = {-10: 3.5, -9: 3.2, -8: 3.0, -7: 3.1, -6: 4.0}
"""Loss by place of the grid: tuned to 0.01, a third of which is place -10."""


def topic(ours: dict[int, float], adamw: dict[int, float], preset: str = "medium") -> Topic:
    study = Study("lm", preset, "t", "r", 10, tuple(Entry(name, 1e-2) for name in TITLES))
    (seed,) = study.tuning_seeds
    results = [
        Result(
            Cell("lm", preset, "t", method, rate(place), None, seed, 10, "r"),
            "ok" if math.isfinite(loss) else "diverged",
            final={"choose": loss, "report": 100.0},
        )
        for method, losses in (("adamw", adamw), ("cg", ours))
        for place, loss in losses.items()
    ]
    return Topic(Ledger(study, results), TITLES, "lm / t", full=frozenset())


def row(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]


def test_ours_stands_beside_adamw_at_the_same_rate_and_one_place_further() -> None:
    text = carry_over([(topic({-10: 3.6, -9: 3.3, -8: 2.75, -7: math.inf}, ADAMW), [])])
    shown = ["lm / t", "0.01", "3.000", "-0.250", "diverged", "3.500", "+0.100", "-0.200"]
    assert row(text) == shown
    assert len(shown) == len(HEADER)


def test_what_was_not_run_is_no_number() -> None:
    assert row(carry_over([(topic({-8: 2.75}, ADAMW), [])]))[3:] == [
        "-0.250", MISSING, "3.500", MISSING, MISSING,
    ]  # fmt: skip


def test_a_loss_of_adamw_that_diverged_is_named_and_not_subtracted() -> None:
    row_ = row(carry_over([(topic({-8: 2.75, -10: 3.0}, ADAMW | {-10: math.inf}), [])]))
    assert row_[5:7] == ["diverged", MISSING]


def test_there_is_no_row_without_ours_or_before_adamw_is_tuned() -> None:
    assert carry_over([(topic({}, ADAMW), [])]) == ""
    assert carry_over([(topic({-8: 2.75}, {-8: 3.0}), [])]) == ""
    assert carry_over([(topic({-8: 2.75}, ADAMW, preset="quick"), [])]) == ""
