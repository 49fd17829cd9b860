"""The records of the ``step`` work: a table and a plot of step cost against rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .plots import FOLDER
from .styles import OURS, new_figure, save, style
from .table import MISSING, grid, number, size
from .topics import read_json

Row = Mapping[str, Any]
Family = tuple[str, str, Callable[[float | None], str]]
"""A key whose values are numbers by name, the words of a column, and how a number is shown."""


@dataclass(frozen=True)
class StepCost:
    """One file of the step work.

    Attributes:
        label: file name without ending: preset and device.
        rows: as written: ``model``, ``rank``, ``layers``, ``layers_timed`` and the families of
            numbers of :data:`TIMES` and :data:`SHARES`. Any of them may be missing.
        training: whole training steps on small models.
        errors: errors of a step against float64.
        graphs: what became of CUDA graphs.
        environment: machine, versions, commit.
    """

    label: str
    rows: tuple[Row, ...]
    training: tuple[Row, ...] = ()
    errors: tuple[Row, ...] = ()
    graphs: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


def step_costs(out: Path) -> list[StepCost]:
    """All files of the step work under ``out`` that hold rows."""
    found = []
    for path in sorted((out / "step").glob("*.json")):
        raw = read_json(path)
        rows = _dicts(raw.get("rows"))
        if rows:
            graphs, about = raw.get("cuda_graph"), raw.get("environment")
            cost = StepCost(
                path.stem,
                rows,
                training=_dicts(raw.get("training_step")),
                errors=_dicts(raw.get("step_error_against_float64")),
                graphs=graphs if isinstance(graphs, dict) else {},
                environment=about if isinstance(about, dict) else {},
            )
            found.append(cost)
    return found


def _dicts(rows: Any) -> tuple[Row, ...]:
    if not isinstance(rows, list):
        return ()
    return tuple(row for row in rows if isinstance(row, dict))


def numbers(row: Row, key: str) -> dict[str, float]:
    """The finite numbers of ``row[key]`` by name; a lone number belongs to no name."""
    values = row.get(key)
    if not isinstance(values, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def percent(value: float | None) -> str:
    """A share with two significant digits."""
    return MISSING if value is None else f"{100 * value:.2g}%"


TIMES: tuple[Family, ...] = (
    ("ms", "ms {}", number),
    ("ms_cg_step", "ms cg step, {}", number),
    ("ms_hooks", "ms cg hooks, {}", number),
)
REPEATED = ("ms_cg_step", "average")
"""The same number as ``cg`` of ``ms``."""
SHARES: tuple[Family, ...] = (
    ("share_estimate", "share of {}", percent),
    ("state_bytes", "state of {}", size),
    ("buffer_bytes", "buffers of {}", size),
    ("peak_bytes", "peak of {}", size),
)


def step_text(cost: StepCost) -> str:
    """Tables of one file: time, then shares and memory, then whole training steps; and notes."""
    parts = [
        family_table(cost, TIMES),
        family_table(cost, SHARES),
        training_table(cost),
        "\n".join(f"- {line}" for line in notes(cost)),
    ]
    return "\n\n".join(part for part in parts if part)


def family_table(cost: StepCost, families: Sequence[Family]) -> str:
    """One line per model and rank, a column for each name of each family; empty without any."""
    columns = []
    for key, words, show in families:
        names = dict.fromkeys(name for row in cost.rows for name in numbers(row, key))
        columns += [
            (key, name, words.format(readable(name)), show)
            for name in names
            if (key, name) != REPEATED
        ]
    if not columns:
        return ""
    header = ["model", "rank", "layers timed", *(words for _, _, words, _ in columns)]
    rows = []
    for row in cost.rows:
        of = "" if row.get("layers") is None else f" of {row['layers']}"
        timed = row.get("layers_timed")
        first = [row.get("model", MISSING), row.get("rank", MISSING)]
        values = [show(numbers(row, key).get(name)) for key, name, _, show in columns]
        rows.append([*map(str, first), MISSING if timed is None else f"{timed}{of}", *values])
    return grid(header, rows)


def training_table(cost: StepCost) -> str:
    """Whole training steps on small models."""
    header = ["model", "batch x length", "rank", "optimizer", "ms forward + backward", "ms hooks"]
    header += ["ms step", "share of hooks and step"]
    rows = [
        [
            str(row.get("model", MISSING)),
            f"{row.get('batch', MISSING)} x {row.get('sequence', MISSING)}",
            str(row.get("rank", MISSING)),
            readable(str(row.get("name", MISSING))),
            *(number(row.get(key)) for key in ("ms_forward_backward", "ms_hooks", "ms_step")),
            percent(row.get("share")),
        ]
        for row in cost.training
    ]
    return grid(header, rows) if rows else ""


def notes(cost: StepCost) -> list[str]:
    """What the numbers mean and were made with."""
    lines = [
        "Milliseconds are of the timed layers, state and buffers of all layers; shares are of a "
        "whole training step, estimated from the shapes."
    ]
    errors = [row["error"] for row in cost.errors if isinstance(row.get("error"), (int, float))]
    if errors:
        lines.append(f"Largest relative error of a step against float64: {max(errors):.1e}.")
    for name, graph in cost.graphs.items():
        if isinstance(graph, Mapping):
            result = graph.get("error", "not supported")
            if graph.get("supported"):
                result = f"{number(graph.get('ms'))} ms"
            lines.append(f"CUDA graph, {readable(name)}: {result}.")
    machine, versions = (cost.environment.get(key, {}) for key in ("machine", "versions"))
    device = machine.get("gpu") or machine.get("cpu")
    about = [device] if device else []
    about += [f"{name} {versions[name]}" for name in ("torch", "cg_optim") if name in versions]
    if cost.environment.get("commit"):
        about.append(f"commit {cost.environment['commit']}")
    return [*lines, "; ".join(about) + "."] if about else lines


def readable(name: str) -> str:
    """``adamw_fused`` as in a sentence."""
    return name.replace("_", " ")


def lines(cost: StepCost, model: str) -> dict[str, list[tuple[float, float]]]:
    """Rank and milliseconds of every optimizer on ``model``, by rising rank."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in cost.rows:
        rank = row.get("rank")
        if row.get("model") != model or not isinstance(rank, (int, float)):
            continue
        for name, value in numbers(row, "ms").items():
            if value > 0:
                found.setdefault(name, []).append((float(rank), value))
    return {name: sorted(points) for name, points in found.items()}


def draw_step_cost(cost: StepCost, out: Path) -> Path | None:
    """Plot of step cost against rank, one panel per model; its path relative to ``out``."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    models = list(dict.fromkeys(str(row.get("model")) for row in cost.rows))
    panels = {model: found for model in models if (found := lines(cost, model))}
    if not panels:
        return None
    figure = new_figure(2.4 + 3.1 * len(panels), 4.0)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    looks = step_styles(list(dict.fromkeys(name for found in panels.values() for name in found)))
    handles: dict[str, Any] = {}
    for axes, (model, found) in zip(all_axes, panels.items(), strict=True):
        for name, points in found.items():
            x, y = zip(*points, strict=True)
            (handles[name],) = axes.plot(x, y, markersize=5, **looks[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ranks = sorted({rank for points in found.values() for rank, _ in points})
        axes.xaxis.set_major_locator(FixedLocator(ranks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_title(model, fontsize=11)
        axes.set_xlabel("rank")
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel("milliseconds per step (timed layers)")
    figure.legend(
        list(handles.values()),
        [readable(name) for name in handles],
        loc="outside right center",
        fontsize=9,
        frameon=False,
        handlelength=3,
    )
    path = Path(FOLDER) / f"step-{cost.label}.png"
    save(figure, out / path)
    return path


def step_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colours of the methods' families; further members of a family are dashed."""
    dashes = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
    markers = "osD^v"
    seen: dict[str, int] = {}
    looks = {}
    for name in names:
        family = next((one for one in (OURS, "adamw") if name.startswith(one)), name)
        place = seen[family] = seen.get(family, -1) + 1
        looks[name] = {
            **style(family),
            "linestyle": dashes[place % len(dashes)],
            "marker": markers[place % len(markers)],
            "linewidth": 2.2 if family == OURS else 1.6,
        }
    return looks
