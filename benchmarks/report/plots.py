"""Pictures of one topic: loss against steps, seconds and learning rate."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sweep import BASELINE, rate
from .measures import Measures
from .styles import OURS, new_figure, save, style
from .topics import Topic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "plots"
ROOM = 0.25
"""Share of the way from the best loss to the initial one that a linear axis shows above it."""
ABOVE = 0.15
"""How far beyond the upper end of the axis the lines to diverged runs go, in axis lengths."""
MANY = 5.0
"""Ratio of the longest to the shortest training time from which seconds are on a log axis."""


@dataclass(frozen=True)
class Curve:
    """Held-out losses of one method over its seeds: median, lowest and highest."""

    x: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]


def draw(topic: Topic, measured: Sequence[Measures], out: Path) -> list[tuple[str, Path]]:
    """Draw the pictures of a topic.

    Returns:
        Description and path relative to ``out`` of every picture; none without anything to show.
    """
    name = re.sub(r"[^\w.-]+", "-", topic.label)
    made = []
    pictures: tuple[tuple[str, str, Callable[[Topic, Sequence[Measures], Path], bool]], ...] = (
        ("steps", "loss against steps", draw_steps),
        ("seconds", "loss against seconds", draw_seconds),
        ("rates", "tuning loss against learning rate", draw_rates),
    )
    for ending, words, picture in pictures:
        path = Path(FOLDER) / f"{name}-{ending}.png"
        if picture(topic, measured, out / path):
            made.append((f"{topic.label}: {words}", path))
    return made


def curve(one: Measures, milliseconds: float | None = None) -> Curve | None:
    """Losses of a method at the steps that all its runs have evaluated.

    Runs that ended above their initial loss are shown too; those that broke off are not.

    Args:
        one: the method.
        milliseconds: time of a step, for a curve over seconds.
    """
    curves = [
        dict(zip(run.curve["step"], run.curve["report"], strict=True))
        for run in one.runs.values()
        if run.curve and run.curve["step"][-1] == run.cell.steps
        if all(map(math.isfinite, run.curve["report"]))
    ]
    if not curves:
        return None
    steps = sorted(set.intersection(*(set(found) for found in curves)))
    values = [[found[step] for found in curves] for step in steps]
    factor = 1.0 if milliseconds is None else 1e-3 * milliseconds
    return Curve(
        x=[factor * step for step in steps],
        middle=[statistics.median(found) for found in values],
        low=[min(found) for found in values],
        high=[max(found) for found in values],
    )


def label_of(one: Measures) -> str:
    """Title of a method, and how many of its reported runs diverged."""
    bad = sum(run.status != "ok" for run in one.runs.values())
    return f"{one.title} ({bad} of {len(one.runs)} diverged)" if bad else one.title


def window(
    best: float, ends: Mapping[str, float], start: float, log_scale: bool
) -> tuple[float, float]:
    """Limits of the loss axis: differences at the end must be seen, bad methods may be cut off.

    Args:
        best: lowest loss of all.
        ends: loss of each method that has to be told from the others'.
        start: loss before training.
        log_scale: whether the axis is logarithmic; little is cut off then.

    Returns:
        Limits that hold the end of ours, of AdamW and of the better half of the methods, unless
        they are far above the start.
    """
    if log_scale and best > 0:
        return best / 1.3, max(start, best) * 1.3
    shown = [statistics.median_low(ends.values())]
    shown += [ends[name] for name in (BASELINE, OURS) if name in ends]
    level = min(max(shown), max(start, best) + max(start - best, 0.05 * abs(start)))
    room = max(1.5 * (level - best), ROOM * (start - best), 1e-3 * abs(best), 1e-12)
    high = min(level + room, max(start + 0.03 * (start - best), level + 0.1 * room))
    return best - 0.04 * (high - best), high


def draw_steps(topic: Topic, measured: Sequence[Measures], path: Path) -> bool:
    """Losses of the tuned settings over the steps."""
    curves = {one.method: found for one in measured if (found := curve(one))}
    return _draw_curves(topic, measured, curves, "step", path)


def draw_seconds(topic: Topic, measured: Sequence[Measures], path: Path) -> bool:
    """The same over seconds: steps times the time of a step in the solo run."""
    curves = {
        one.method: found
        for one in measured
        if one.timing is not None and (found := curve(one, one.timing.whole))
    }
    return _draw_curves(topic, measured, curves, "seconds (steps times solo time of a step)", path)


def _draw_curves(
    topic: Topic, measured: Sequence[Measures], curves: dict[str, Curve], label: str, path: Path
) -> bool:
    if not curves:
        return False
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    times = [found.x[-1] for found in curves.values()]
    logarithmic = max(times) > MANY * min(times) > 0
    figure = new_figure(8.6, 4.6)
    axes = figure.subplots()
    for one in measured:
        found = curves.get(one.method)
        if found is None:
            continue
        look = {**style(one.method), "marker": ""}
        first = 1 if logarithmic and found.x[0] == 0 else 0
        x = found.x[first:]
        axes.plot(x, found.middle[first:], label=label_of(one), **look)
        axes.fill_between(
            x, found.low[first:], found.high[first:], color=look["color"], alpha=0.12, linewidth=0
        )
    baseline = curves.get(BASELINE)
    if baseline:
        axes.axhline(baseline.middle[-1], color="#111111", linestyle=":", linewidth=1)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=label == "step"))
        axes.set_xlim(0, max(times))
    best = min(min(found.middle) for found in curves.values())
    ends = {name: found.middle[-1] for name, found in curves.items()}
    start = statistics.median(found.middle[0] for found in curves.values())
    _finish(axes, topic, label, window(best, ends, start, topic.log_scale))
    axes.set_ylabel("held-out loss (median, lowest and highest seed)")
    save(figure, path)
    return True


def draw_rates(topic: Topic, measured: Sequence[Measures], path: Path) -> bool:
    """Final tuning loss over the learning rate, one line a method; a cross is a diverged run."""
    lines = {
        one.method: found
        for one in measured
        if one.state != "failed" and (found := rate_line(topic, one))
    }
    ends = {name: end for name, line in lines.items() if math.isfinite(end := _lowest(line))}
    if not ends:
        return False
    low, high = window(min(ends.values()), ends, _initial(topic), topic.log_scale)
    outside = high + ABOVE * (high - low)
    if topic.log_scale and low > 0:
        outside = high * (high / low) ** ABOVE
    figure = new_figure(8.6, 4.6)
    axes = figure.subplots()
    crossed: dict[float, int] = {}
    for one in measured:
        line = lines.get(one.method)
        if line is None:
            continue
        look = style(one.method)
        rates = sorted(line)
        # Lines to diverged runs leave the picture upwards.
        heights = [line[x] if math.isfinite(line[x]) else outside for x in rates]
        size = 7 if look["zorder"] > 5 else 4.5
        axes.plot(rates, heights, label=one.title, markersize=size, **look)
        for x in (x for x in rates if not math.isfinite(line[x])):
            # Crosses at one learning rate stand below each other.
            count = crossed[x] = crossed.get(x, 0) + 1
            axes.plot(
                x, 1.02 - 0.03 * count, "x", transform=axes.get_xaxis_transform(),
                color=look["color"], markersize=6, markeredgewidth=1.6, zorder=11,
            )  # fmt: skip
    baseline = lines.get(BASELINE)
    if baseline and math.isfinite(_lowest(baseline)):
        axes.axhline(_lowest(baseline), color="#111111", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    _finish(axes, topic, "learning rate (x at the top: diverged)", (low, high))
    axes.set_ylabel("final held-out loss when tuned")
    save(figure, path)
    return True


def _lowest(line: dict[float, float]) -> float:
    return min(line.values(), default=math.inf)


def rate_line(topic: Topic, one: Measures) -> dict[float, float]:
    """Learning rate to tuning loss of the reported knob value, infinite where a run is bad."""
    entry = topic.study.entry(one.method)
    if entry is None:
        return {}
    knob = one.setting.knob if one.setting else entry.knobs[0]
    return {rate(place): y for place, y in topic.ledger.losses(entry, knob).items()}


def _initial(topic: Topic) -> float:
    """Median loss before training."""
    cells = [cell for entry in topic.study.entries for cell in topic.ledger.of(entry.method)]
    found = [cell.curve["choose"][0] for cell in cells if cell.curve.get("choose")]
    finite = [loss for loss in found if math.isfinite(loss)]
    return statistics.median(finite) if finite else 0.0


def _finish(axes: Axes, topic: Topic, label: str, limits: tuple[float, float]) -> None:
    if topic.log_scale and limits[0] > 0:
        axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.set_xlabel(label)
    axes.set_title(topic.label, fontsize=11)
    axes.grid(alpha=0.25)
    options: dict[str, Any] = {
        "loc": "center left",
        "bbox_to_anchor": (1.0, 0.5),
        "handlelength": 3,
    }
    axes.legend(fontsize=9, frameon=False, **options)
