"""The report against numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cells import Cell, Result, save
from benchmarks.report import BEGIN, END, refresh_block, write_report
from benchmarks.report.table import MISSING, table
from benchmarks.sweep import Entry, Ledger, Study, plan


def finished(study: Study, loss: dict[str, float]) -> list[Result]:
    """All cells of ``study``, the loss lowest at the sweep's centre."""
    results: list[Result] = []
    while requests := plan(study, results):
        for request in requests:
            cell: Cell = request.cell
            value = loss[cell.method] + abs(cell.lr - 1e-3) + 0.01 * cell.seed
            curve = {"step": [0.0, 10.0], "seconds": [0.0, 1.0]}
            curve |= {"choose": [9.0, value], "report": [9.0, value]}
            final = {"choose": value, "report": value}
            results.append(Result(cell, "ok", curve=curve, final=final))
    return results


def study() -> Study:
    entries = (Entry("adamw", lr=1e-3), Entry("cg", lr=1e-3))
    extras = {"width": False, "defaults": False, "short": False}
    return Study("linear", "tiny", "t", "r", 10, entries, **extras)  # type: ignore[arg-type]


def test_paired_difference_and_steps(tmp_path: Path) -> None:
    ours = study()
    rows = table(Ledger(ours, finished(ours, {"adamw": 2.0, "cg": 1.0})), tmp_path).splitlines()
    row = [part.strip() for part in rows[3].strip("|").split("|")]
    # Losses 1.01, 1.02, 1.03: mean 1.02, two standard errors 2 * 0.01 / sqrt(3).
    assert row[:4] == ["cg", "0.001", MISSING, "1.02 ± 0.012"]
    assert row[4].startswith("-1 ±")
    assert row[5:7] == ["lower", "10"]


def test_unfinished_is_marked_and_missing_is_a_dash(tmp_path: Path) -> None:
    row = table(Ledger(study(), []), tmp_path).splitlines()[2]
    assert f"adamw (unfinished) | {MISSING} | {MISSING} | {MISSING}" in row


def test_only_the_block_between_markers_changes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    assert refresh_block(path, "new")
    assert path.read_text() == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    path.write_text("no markers")
    assert not refresh_block(path, "new")
    assert path.read_text() == "no markers"


def test_unknown_tasks_are_left_out(tmp_path: Path) -> None:
    cell = Cell("linear", "tiny", "nowhere", "adamw", 1e-3, None, 0, 1, "r")
    save(Result(cell, "ok"), tmp_path)
    write_report(tmp_path, refresh=False)
    assert "No finished runs." in (tmp_path / "report.md").read_text()
