"""Draws a run that :class:`cg_optim.recorder.RunRecorder` has written.

``python -m cg_optim.report run.jsonl`` writes ``run.png``.  It needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cg_optim.errors import CGOptimError, RunFileError
from cg_optim.recorder import read_run

Record = dict[str, Any]

_COLOURS = {"A": "#1f77b4", "B": "#d95f02"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cg_optim.report", description="Draw a recorded training run."
    )
    parser.add_argument("run", type=Path, help="what RunRecorder has written, e.g. run.jsonl")
    parser.add_argument("-o", "--output", type=Path, help="the picture; default: run.png")
    given = parser.parse_args(arguments)
    output = given.output or given.run.with_suffix(".png")
    try:
        records = read_run(given.run)
        draw(records, output)
    except (CGOptimError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{output}: {len(records)} records, {len(records[-1]['layers'])} layers")
    for line in findings(records):
        print(line)
    return 0


def findings(records: Sequence[Record]) -> list[str]:
    """What a reader should know first: unseen pairs, missed steps, numerical events."""
    last = records[-1]
    lines = []
    unseen = [layer["name"] for layer in last["layers"] if not layer["seen"]]
    if unseen:
        lines.append(f"hooks have seen no input of {len(unseen)} pairs, e.g. {unseen[0]}")
    missed = [layer for layer in last["layers"] if layer["missed_steps"]]
    if missed:
        worst = max(missed, key=lambda layer: int(layer["missed_steps"]))
        lines.append(
            f"{len(missed)} pairs were not stepped in every step, e.g. {worst['name']}: "
            f"{worst['missed_steps']} of {last['step']} left out"
        )
    lines += [f"{kind}: {count}" for kind, count in last["events"].items() if count]
    return lines


def draw(records: Sequence[Record], path: Path) -> None:
    """Six panels in one picture.

    Args:
        records: From :func:`cg_optim.recorder.read_run`.
        path: The picture; its ending decides the format.

    Raises:
        RunFileError: If matplotlib is not installed, or cannot write that format.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a display
        from matplotlib.ticker import LogFormatter, MaxNLocator
    except ImportError as error:
        raise RunFileError(
            "drawing a run needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplots(2, 3)
    for panel in panels.flat:
        panel.set_xlabel("steps taken")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    _draw_loss(panels[0, 0], records)
    _draw_decrease(panels[0, 1], records)
    _draw_bands(panels[0, 2], records, "relative_step_A", "relative_step_B", labels=("A", "B"))
    panels[0, 2].set_title("length of the step relative to the factor")
    _draw_bands(
        panels[1, 0], records, "input_condition", "hidden_condition", labels=("X", "P = A X Aᵀ")
    )
    panels[1, 0].set_title("condition number after damping")
    _draw_bands(panels[1, 1], records, "effective_rank", labels=("X",))
    panels[1, 1].set_title("effective rank of the inputs")
    for panel in (panels[0, 2], panels[1, 0]):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    panels[1, 1].set_ylim(bottom=0)
    _draw_layers(figure, panels[1, 2], records)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise RunFileError(f"{path}: {error}") from error


def _draw_loss(panel: Any, records: Sequence[Record]) -> None:
    known = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
    if known:
        panel.plot(*zip(*known, strict=True), color="black", marker=".")
    panel.set_title("training loss" if known else "training loss (not recorded)")
    rates = panel.twinx()
    rates.plot([r["step"] for r in records], [r["lr"] for r in records], color="grey", ls=":")
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate (dotted)")


def _draw_decrease(panel: Any, records: Sequence[Record]) -> None:
    totals = [
        (r["step"], sum(layer["predicted_decrease"] or 0.0 for layer in r["layers"]))
        for r in records
    ]
    panel.plot(*zip(*totals, strict=True), color="black", marker=".", label="predicted, all pairs")
    actual = [(r["step"], r["decrease"]["actual"]) for r in records if r.get("decrease")]
    known = [(step, value) for step, value in actual if value is not None]
    if known:
        panel.plot(*zip(*known, strict=True), color="#d95f02", marker=".", label="actual")
        panel.legend(fontsize="small", framealpha=0.6)
    panel.axhline(0, color="grey", lw=0.8)
    panel.set_title("decrease of the loss" + ("" if known else ", predicted, all pairs"))


def _draw_bands(panel: Any, records: Sequence[Record], *fields: str, labels: Sequence[str]) -> None:
    """Median over the layers, and a band from the smallest to the largest.

    Zeros are left out: a factor that does not move has no place on a logarithmic axis.
    """
    for field, label, colour in zip(fields, labels, _COLOURS.values(), strict=False):
        rows = []
        for record in records:
            values = [layer[field] for layer in record["layers"] if layer[field]]
            if values:
                rows.append((record["step"], statistics.median(values), min(values), max(values)))
        if rows:
            steps, middle, low, high = zip(*rows, strict=True)
            panel.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            panel.plot(steps, middle, color=colour, marker=".", label=f"{label}: median, range")
    if panel.lines:
        panel.legend(fontsize="small", framealpha=0.6)


def _draw_layers(figure: Any, panel: Any, records: Sequence[Record]) -> None:
    """Every layer a row: where and when steps are long."""
    names = [layer["name"] for layer in records[-1]["layers"]]
    grid = [[math.nan] * len(records) for _ in names]
    for column, record in enumerate(records):
        lengths = {layer["name"]: _longest(layer) for layer in record["layers"]}
        for row, name in enumerate(names):
            grid[row][column] = lengths.get(name, math.nan)
    panel.set_title("relative step (the longer of both), log10")
    panel.grid(visible=False)
    if any(math.isfinite(value) for row in grid for value in row):
        image = panel.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=panel)
    every = max(1, len(names) // 24)
    labels = [_short(name) for name in without_common_prefix(names)[::every]]
    panel.set_yticks(range(0, len(names), every), labels, fontsize=7)
    shown = range(0, len(records), max(1, len(records) // 6))
    panel.set_xticks(list(shown), [str(records[i]["step"]) for i in shown])


def _longest(layer: Record) -> float:
    known = [layer[f"relative_step_{letter}"] for letter in ("A", "B")]
    largest = max((value for value in known if value), default=0.0)
    return math.log10(largest) if largest > 0 else math.nan


def without_common_prefix(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them begin with; the last part stays."""
    split = [name.split(".") for name in names]
    shared = 0
    while split and len({tuple(parts[: shared + 1]) for parts in split}) == 1:
        if any(len(parts) <= shared + 1 for parts in split):
            break
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


if __name__ == "__main__":
    sys.exit(main())
