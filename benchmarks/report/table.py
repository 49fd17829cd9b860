"""Markdown tables of one topic; what was not measured is shown as a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..metrics import Paired, Width
from ..sweep import BAND
from .measures import NOWHERE, Measures, Reach
from .topics import Topic

MISSING = "\N{EN DASH}"
OURS = "cg"
MANY = 4
"""Commits up to which they are named."""
Column = tuple[str, Callable[[Measures], str]]


def tables(topic: Topic, measured: Sequence[Measures]) -> str:
    """Outcome, robustness and cost of every method, with notes."""
    steps = topic.study.steps
    parts = [
        markdown(outcome_columns(measured, steps), measured),
        markdown(robustness_columns(), measured),
        markdown(cost_columns(), measured),
        *notes(topic, measured),
    ]
    return "\n\n".join(part for part in parts if part)


def markdown(columns: Sequence[Column], measured: Sequence[Measures]) -> str:
    """A table with one row per method; columns without any value are left out.

    Empty if the first column, the method, is the only one left.
    """
    cells = [(name, [show(one) for one in measured]) for name, show in columns]
    kept = [(name, rows) for name, rows in cells if any(text != MISSING for text in rows)]
    if len(kept) < 2:
        return ""
    return grid([name for name, _ in kept], zip(*(rows for _, rows in kept), strict=True))


def grid(header: Sequence[str], rows: Sequence[Sequence[str]] | zip[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def outcome_columns(measured: Sequence[Measures], steps: int) -> list[Column]:
    """Losses, budgets and the distance to full fine-tuning."""
    metrics = list(dict.fromkeys(name for one in measured for name in one.metrics))

    def metric(name: str) -> Callable[[Measures], str]:
        return lambda one: plus_minus(one.metrics.get(name))

    return [
        ("method", named),
        ("lr", lambda one: number(getattr(one.setting, "lr", None))),
        ("knob", lambda one: number(getattr(one.setting, "knob", None))),
        ("loss ± 2 SE", final_loss),
        ("minus AdamW", lambda one: difference(one.difference)),
        ("verdict", lambda one: verdict(one.difference)),
        (f"steps to AdamW's loss (of {steps})", lambda one: reach(one.steps)),
        ("seconds to AdamW's loss", lambda one: reach(one.seconds)),
        ("shortest budget", lambda one: number(one.budget)),
        ("gap closed", lambda one: MISSING if one.gap is None else f"{one.gap:.0%}"),
        ("KL to full ± 2 SE", lambda one: plus_minus(one.kl)),
        *((name.replace("_", " "), metric(name)) for name in metrics),
    ]


def robustness_columns() -> list[Column]:
    """What happens away from the tuned setting."""
    return [
        ("method", named),
        (f"width, own best + {BAND - 1:.0%}", lambda one: width(one.width_own)),
        ("width, AdamW's loss", lambda one: width(one.width_adamw)),
        ("loss at default / tuned", lambda one: ratio(one.default)),
        ("diverged", lambda one: f"{one.diverged} of {one.count}"),
        ("failed", lambda one: f"{one.failed} of {one.count}"),
    ]


def cost_columns() -> list[Column]:
    """Time of a solo run, and memory."""
    return [
        ("method", named),
        (
            "ms forward + backward",
            lambda one: number(getattr(one.timing, "forward_backward", None)),
        ),
        ("ms hooks", lambda one: number(getattr(one.timing, "hooks", None))),
        ("ms step", lambda one: number(getattr(one.timing, "step", None))),
        ("ms in all", lambda one: number(getattr(one.timing, "whole", None))),
        ("state", lambda one: size(one.state_bytes)),
        ("peak memory", lambda one: size(one.memory)),
    ]


def notes(topic: Topic, measured: Sequence[Measures]) -> list[str]:
    """What the numbers were made with, and what has to be known to read them."""
    lines = []
    if topic.floor is not None:
        value, reference = topic.floor
        title = topic.titles.get(reference, reference)
        lines.append(
            f"KL is from {title}, in nats per held-out token; between two seeds of it: {value:.3g}."
        )
    if topic.outdated:
        names = ", ".join(topic.titles[name] for name in sorted(topic.outdated))
        lines.append(f"Made by an earlier version of the method: {names}.")
    for one in measured:
        lines += [f"{one.title} failed: `{error.replace('`', chr(39))}`" for error in one.errors]
    lines.append(made_with(topic, measured))
    return ["\n".join(f"- {line}" for line in lines if line)]


def made_with(topic: Topic, measured: Sequence[Measures]) -> str:
    """Seeds, machine, versions and commits of the reported runs."""
    runs = [run for one in measured for run in one.runs.values()]
    machines, packages, commits = set(), set(), set()
    for run in runs:
        where = run.environment
        machine = where.get("machine", {})
        parts = [machine.get("gpu"), machine.get("cpu")]
        threads = where.get("threads")
        parts.append(None if threads is None else f"{threads} thread{'s' if threads > 1 else ''}")
        machines.add(", ".join(part for part in parts if part))
        packages.add(
            ", ".join(f"{key} {value}" for key, value in where.get("versions", {}).items())
        )
        commits.add(where.get("commit", ""))
    seeds = topic.study.reporting_seeds
    lines = [
        f"Tuned on seed {listed(topic.study.tuning_seeds)}, reported on {listed(seeds)}",
        "; ".join(sorted(machines - {""})),
        "; ".join(sorted(packages - {""})),
        few(sorted(commits - {""})),
        f"recipe {topic.study.recipe}",
    ]
    return "; ".join(line for line in lines if line) + "."


def few(commits: Sequence[str]) -> str:
    """The commits, or how many they are."""
    if len(commits) > MANY:
        return f"{len(commits)} commits, in the records"
    return f"commit {listed(commits)}" if commits else ""


def listed(values: Sequence[object]) -> str:
    """Values separated by commas."""
    return ", ".join(map(str, values))


def named(one: Measures) -> str:
    """Title of a method, ours in bold, and what is missing."""
    bold = one.method.partition("[")[0] == OURS
    title = f"**{one.title}**" if bold else one.title
    return title + (f" ({one.state})" if one.state else "")


def number(value: float | None) -> str:
    """Three significant digits; whole numbers from 100 on."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plus_minus(value: tuple[float, float] | None) -> str:
    """Mean and spread, the mean to one digit beyond the spread's first two."""
    if value is None:
        return MISSING
    mean, spread = value
    if not math.isfinite(mean):
        return "diverged or failed"
    if not math.isfinite(spread):
        return f"{mean:.4g} ± {MISSING}"
    if spread == 0:
        return f"{mean:.4g} ± 0"
    digits = 1 - math.floor(math.log10(spread))
    if digits > 6:
        return f"{mean:.3g} ± {spread:.1g}"
    digits = max(0, digits)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def final_loss(one: Measures) -> str:
    """Mean and spread of the reported losses, or how many runs have none."""
    bad = sum(not math.isfinite(loss) for loss in one.losses.values())
    return f"{bad} of {len(one.runs)} diverged or failed" if bad else plus_minus(one.loss)


def difference(paired: Paired | None) -> str:
    """A paired difference with its sign; none where a run of either side has no loss."""
    if paired is None or not math.isfinite(paired.mean):
        return MISSING
    text = plus_minus((paired.mean, paired.spread))
    return text if text.startswith("-") else f"+{text}"


def verdict(paired: Paired | None) -> str:
    """``lower``, ``higher`` or ``level``; nothing to say of a single seed or of a failed run."""
    if paired is None or paired.count < 2 or not math.isfinite(paired.mean):
        return MISSING
    return paired.verdict


def reach(value: Reach | None) -> str:
    """Steps or seconds; ``>`` where the target was not reached."""
    if value is None:
        return MISSING
    return (">" if value.censored else "") + number(value.value)


def width(value: Width | None) -> str:
    """Ratio of the ends; a lower bound where the sweep ended inside."""
    if value is None:
        return MISSING
    if value is NOWHERE:
        return "none"
    return ("\N{GREATER-THAN OR EQUAL TO}" if value.is_open else "") + f"{value.ratio:.3g}"


def ratio(value: float | None) -> str:
    """A ratio of losses."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def size(value: float | None) -> str:
    """Bytes in a readable unit."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} GiB"
