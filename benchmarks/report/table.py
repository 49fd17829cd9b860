"""One row per method; what was not measured is shown as a dash."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..cells import Result
from ..metrics import mean_and_spread, median_censored, paired_difference, steps_to_target
from ..sweep import BASELINE, Entry, Ledger, shortest

MISSING = "\N{EN DASH}"
COLUMNS = (
    "method", "lr", "knob", "loss ± 2 SE", "minus AdamW", "verdict", "steps to AdamW's loss",
    "shortest budget", "KL to full", "diverged", "failed", "state bytes", "ms fwd+bwd", "ms step",
)  # fmt: skip


def table(ledger: Ledger, out: Path) -> str:
    """The Markdown table of one task."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    study = ledger.study
    path = out / study.work / study.preset / study.task / "divergences.json"
    divergences = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    baseline = study.entry(BASELINE)
    reference = reported(ledger, baseline) if baseline else {}
    for entry in study.entries:
        kl = divergences.get("methods", {}).get(entry.method, {}).get("mean")
        lines.append("| " + " | ".join(_row(ledger, entry, reference, kl)) + " |")
    return "\n".join(lines)


def reported(ledger: Ledger, entry: Entry) -> dict[int, Result]:
    """Finished reporting runs of the tuned setting, by seed; empty while tuning goes on."""
    choice = ledger.choice(entry)
    if choice is None:
        return {}
    seeds = ledger.study.reporting_seeds
    found = {s: ledger.get(ledger.cell(entry, choice.lr, choice.knob, s)) for s in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def _row(ledger: Ledger, entry: Entry, reference: dict[int, Result], kl: float | None) -> list[str]:
    study, runs = ledger.study, reported(ledger, entry)
    choice = ledger.choice(entry)
    cells = ledger.of(entry.method)
    complete = len(runs) == len(study.reporting_seeds)
    losses = {seed: run.loss("report") for seed, run in runs.items()}
    theirs = {seed: run.loss("report") for seed, run in reference.items()}
    paired = paired_difference(losses, theirs) if entry.method != BASELINE else None
    if paired is not None and not math.isfinite(paired.mean):
        paired = None
    shown = choice or ledger.leading(entry)
    mean = MISSING
    if losses:
        mean = _plus_minus(*mean_and_spread(list(losses.values())))
    steps = MISSING
    if losses and len(theirs) == len(study.reporting_seeds):
        target = sum(theirs.values()) / len(theirs)
        reached = [
            steps_to_target(run.curve["step"], run.curve["report"], target)
            if run.status == "ok"
            else None
            for run in runs.values()
        ]
        median = median_censored(reached)
        steps = f">{study.steps}" if median is None else f"{median:g}"
    passed, _ = shortest(ledger, entry)
    budget = min((fraction for fraction, good in passed.items() if good), default=None)
    return [
        entry.method + ("" if complete else " (unfinished)"),
        _number(shown and shown.lr),
        _number(shown and shown.knob),
        mean,
        MISSING if paired is None else _plus_minus(paired.mean, paired.spread),
        MISSING if paired is None or paired.count < 2 else paired.verdict,
        steps,
        _number(budget),
        _number(kl),
        str(sum(cell.status == "diverged" for cell in cells)),
        str(sum(cell.status == "failed" for cell in cells)),
        _cost(runs, "state_bytes", ".0f"),
        _cost(runs, "ms_forward_backward"),
        _cost(runs, "ms_step"),
    ]


def _plus_minus(mean: float, spread: float) -> str:
    if not math.isfinite(mean):
        return "diverged or failed"
    return f"{mean:.4g} ± " + (f"{spread:.2g}" if math.isfinite(spread) else MISSING)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def _cost(runs: dict[int, Result], name: str, form: str = ".3g") -> str:
    values = [run.costs[name] for run in runs.values() if run.costs.get(name) is not None]
    median = median_censored(values)
    return MISSING if median is None else format(median, form)
