"""The records of the ``step`` work: a table and a plot of step cost against rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .plots import FOLDER
from .styles import OURS, new_figure, save, style
from .table import MISSING, grid, number, size
from .topics import read_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StepCost:
    """One file of the step work.

    Attributes:
        label: file name without ending: preset and device.
        rows: as written: ``model``, ``rank``, ``ms`` and ``state_bytes`` by optimizer, ``layers``
            and ``layers_timed``. Any of them may be missing.
        environment: machine, versions, commit.
    """

    label: str
    rows: tuple[Row, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[str]:
        """Names of all optimizers that were timed or counted, in the order of the file."""
        names = [
            name
            for row in self.rows
            for key in ("ms", "state_bytes")
            for name in by_optimizer(row, key)
        ]
        return list(dict.fromkeys(names))


def step_costs(out: Path) -> list[StepCost]:
    """All files of the step work under ``out`` that hold rows."""
    found = []
    for path in sorted((out / "step").glob("*.json")):
        raw = read_json(path)
        rows = raw.get("rows")
        usable = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        if usable:
            environment = raw.get("environment")
            about = environment if isinstance(environment, dict) else {}
            found.append(StepCost(path.stem, tuple(usable), about))
    return found


def by_optimizer(row: Row, key: str) -> dict[str, float]:
    """The finite numbers of ``row[key]`` by optimizer; a single number counts for none."""
    values = row.get(key)
    if not isinstance(values, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def step_table(cost: StepCost) -> str:
    """Milliseconds of a step and bytes of state, one line per model and rank."""
    names = cost.optimizers
    timed = [name for name in names if any(name in by_optimizer(r, "ms") for r in cost.rows)]
    counted = [
        name for name in names if any(name in by_optimizer(r, "state_bytes") for r in cost.rows)
    ]
    header = ["model", "rank", "layers timed"]
    header += [f"ms {readable(name)}" for name in timed]
    header += [f"state {readable(name)}" for name in counted]
    rows = []
    for row in cost.rows:
        ms, state = by_optimizer(row, "ms"), by_optimizer(row, "state_bytes")
        layers = row.get("layers")
        of = "" if layers is None else f" of {layers}"
        rows.append(
            [
                str(row.get("model", MISSING)),
                str(row.get("rank", MISSING)),
                MISSING if "layers_timed" not in row else f"{row['layers_timed']}{of}",
                *(number(ms.get(name)) for name in timed),
                *(size(state.get(name)) for name in counted),
            ]
        )
    machine = cost.environment.get("machine", {})
    versions = cost.environment.get("versions", {})
    torch = versions.get("torch")
    about = [
        machine.get("gpu") or machine.get("cpu"),
        torch and f"torch {torch}",
        cost.environment.get("commit") and f"commit {cost.environment['commit']}",
    ]
    made = "; ".join(part for part in about if part)
    note = "Milliseconds are of the timed layers, bytes of all layers." + (made and f" {made}.")
    return f"{grid(header, rows)}\n\n- {note}"


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
        for name, value in by_optimizer(row, "ms").items():
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
    looks = step_styles(cost.optimizers)
    handles: dict[str, Any] = {}
    for axes, (model, found) in zip(all_axes, panels.items(), strict=True):
        for name, points in found.items():
            ranks, values = zip(*points, strict=True)
            (handles[name],) = axes.plot(ranks, values, markersize=5, **looks[name])
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
