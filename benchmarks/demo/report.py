"""What the demo shows: tables and a verdict, a picture, and a JSON file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..cells import environment
from ..metrics import steps_to_target
from .parts import Part
from .training import BUDGETS, OPTIMIZERS, Run, step_at

BASELINE, OURS = OPTIMIZERS
COLOURS = dict(zip(OPTIMIZERS, ("#888888", "#d62728"), strict=True))


def show(console: Console, part: Part, runs: Sequence[Run]) -> None:
    """Print the table of a part and what it says."""
    table = Table(title=f"{part.title}\n{part.facts}", title_justify="left")
    table.add_column("")
    for name in OPTIMIZERS:
        table.add_column(name, justify="right")
    per_optimizer = [[run for run in runs if run.optimizer == name] for name in OPTIMIZERS]

    def row(label: str, value: Callable[[list[Run]], str], *, last: bool = False) -> None:
        table.add_row(label, *(value(mine) for mine in per_optimizer), end_section=last)

    row("learning rate (linear decay)", lambda mine: f"{mine[0].learning_rate:g}", last=True)
    for share in (0.0, *BUDGETS):
        label = f"held-out loss, {_when(share, part)}"
        row(label, lambda mine, at=share: f"{_mean_at(mine, at, 'losses'):.4f}", last=share == 1)
    if runs[0].accuracies:
        for share in (0.0, *BUDGETS):
            label = f"held-out accuracy, {_when(share, part)}"
            row(
                label,
                lambda mine, at=share: f"{_mean_at(mine, at, 'accuracies'):.1%}",
                last=share == 1,
            )
    row("seconds per step (median)", lambda mine: f"{_seconds_per_step(mine):.3f}")
    row("optimizer state, MiB", lambda mine: f"{mine[0].state_bytes / 2**20:.2f}")
    console.print(table)
    console.print(verdict(part, runs))
    console.print()


def _when(share: float, part: Part) -> str:
    if share == 0:
        return "before"
    return f"{share:.0%} ({step_at(share, part.settings.steps)} steps)"


def _seconds_per_step(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds_per_step for run in runs)


def _mean_at(runs: Sequence[Run], share: float, measure: str) -> float:
    """Mean over seeds of a measure after a share of the steps."""
    index = runs[0].steps.index(step_at(share, runs[0].steps[-1]))
    return statistics.fmean(getattr(run, measure)[index] for run in runs)


def difference(runs: Sequence[Run]) -> tuple[float, float]:
    """Final loss of ours minus the baseline's, and two standard errors of it.

    With several seeds the error is that of the difference paired over seeds; with one it
    is that of the difference paired over held-out texts, which knows nothing of how much
    another seed would change.
    """
    ours = {run.seed: run for run in runs if run.optimizer == OURS}
    base = {run.seed: run for run in runs if run.optimizer == BASELINE}
    if len(ours) > 1:
        differences = torch.tensor(
            [ours[seed].losses[-1] - base[seed].losses[-1] for seed in sorted(ours)]
        )
    else:
        (only,) = ours
        differences = _final_losses(ours[only]) - _final_losses(base[only])
    error = float(differences.double().std()) / math.sqrt(len(differences))
    return float(differences.double().mean()), 2 * error


def _final_losses(run: Run) -> torch.Tensor:
    assert run.last is not None, "a run ends with an evaluation"
    return run.last.losses


def verdict(part: Part, runs: Sequence[Run]) -> str:
    """One honest paragraph about the final losses."""
    mean, error = difference(runs)
    seeds = sorted({run.seed for run in runs})
    if not math.isfinite(mean):
        return f"A run of this part diverged: the final loss of {OURS} or {BASELINE} is not finite."
    if len(seeds) > 1:
        over = f"over {len(seeds)} seeds"
        caveat = ""
    else:
        over = f"over the held-out {part.unit if part.unit == 'text' else 'window'}s"
        caveat = " One run each: the spread between seeds comes on top (--seeds 3)."
    if abs(mean) <= error:
        claim = "level within noise"
    else:
        claim = f"{OURS} is {'lower' if mean < 0 else 'higher'}"
    lines = [
        f"Final held-out loss, {OURS} minus {BASELINE}: {mean:+.4f} ± {error:.4f} nats per "
        f"{part.unit} (2 standard errors, paired {over}): {claim}.{caveat}"
    ]
    if mean < -error:
        reached = [steps_to_baseline(runs, seed) for seed in seeds]
        lines.append(_reached_text([step for step in reached if step is not None], runs[0].steps))
    return "\n".join(line for line in lines if line)


def steps_to_baseline(runs: Sequence[Run], seed: int) -> float | None:
    """First evaluated step at which ours is at or below the baseline's final loss."""
    ours, base = (
        next(run for run in runs if run.seed == seed and run.optimizer == name)
        for name in (OURS, BASELINE)
    )
    return steps_to_target(ours.steps, ours.losses, base.losses[-1])


def _reached_text(reached: Sequence[float], steps: Sequence[int]) -> str:
    if not reached:
        return ""
    steps_text = ", ".join(f"{step:g}" for step in reached)
    return f"It reached {BASELINE}'s final loss after {steps_text} of {steps[-1]} steps."


def draw(path: Path, results: Sequence[tuple[Part, Sequence[Run]]]) -> None:
    """The held-out curves of all parts, one panel each, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(results), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (part, runs) in zip(panels, results, strict=True):
        for name in OPTIMIZERS:
            mine = [run for run in runs if run.optimizer == name]
            for index, run in enumerate(mine):
                label = f"{name}, lr {run.learning_rate:g}" if index == 0 else None
                panel.plot(run.steps, run.losses, "o-", ms=3, color=COLOURS[name], label=label)
        target = statistics.fmean(run.losses[-1] for run in runs if run.optimizer == BASELINE)
        panel.axhline(target, color=COLOURS[BASELINE], ls=":", lw=1)
        panel.set(title=part.title, xlabel="step", ylabel=f"held-out loss (nats per {part.unit})")
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=130)


def save(path: Path, results: Sequence[tuple[Part, Sequence[Run]]]) -> None:
    """Everything that was measured, and with what, as a JSON file."""
    record = {
        "environment": environment("cpu", torch.get_num_threads()),
        "parts": [
            {
                "part": part.key,
                "title": part.title,
                "facts": part.facts,
                "settings": asdict(part.settings),
                "difference": dict(
                    zip(("mean", "two_standard_errors"), difference(runs), strict=True)
                ),
                "runs": [_as_json(run) for run in runs],
            }
            for part, runs in results
        ],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _as_json(run: Run) -> dict[str, Any]:
    fields = asdict(run)
    del fields["last"]
    return fields
