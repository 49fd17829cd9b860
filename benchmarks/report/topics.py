"""The comparisons that a folder of records holds: one topic per task and recipe.

The records come first. What they were planned by is taken from the registered task, or from its
nearest relative (tasks of the user's own data are not registered), and corrected by what was run.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cells import Result, load_all
from ..divergence import FILE as DIVERGENCES
from ..methods import METHODS, Method, get
from ..sweep import Entry, Ledger, Study
from ..timing import FILE as TIMINGS
from ..usage import UsageError
from ..works import TRAINED, Task, work


@dataclass(frozen=True)
class Topic:
    """The finished cells of one comparison, and what is kept beside them.

    Attributes:
        ledger: the cells, with the study they belong to.
        titles: name of each method in tables and plots.
        log_scale: whether losses span orders of magnitude.
        full: methods that train all weights.
        outdated: methods whose cells were made by an earlier version of them.
        timings, divergences: contents of the files beside the cells, by method.
        floor: divergence between two full fine-tunings, and the method they were made by.
        label: name of the topic, unique in the report.
    """

    ledger: Ledger
    titles: dict[str, str]
    label: str = ""
    log_scale: bool = False
    full: frozenset[str] = frozenset()
    outdated: frozenset[str] = frozenset()
    timings: dict[str, dict[str, Any]] = field(default_factory=dict)
    divergences: dict[str, dict[str, Any]] = field(default_factory=dict)
    floor: tuple[float, str] | None = None

    @property
    def study(self) -> Study:
        """The study of the ledger."""
        return self.ledger.study


def topics(out: Path) -> list[Topic]:
    """Every comparison with finished cells under ``out``, in the order of the works."""
    groups: dict[tuple[str, str, str, str], list[Result]] = defaultdict(list)
    for result in load_all(out):
        cell = result.cell
        if cell.work in TRAINED:
            groups[(cell.work, cell.preset, cell.task, cell.recipe)].append(result)
    recipes = Counter(key[:3] for key in groups)
    found = []
    for key in sorted(groups, key=_order):
        label = " / ".join(key[:3])
        if recipes[key[:3]] > 1:
            label += f" / {key[3]}"
        topic = make_topic(groups[key], label)
        found.append(_with_files(topic, out / key[0] / key[1] / key[2]))
    return found


def _order(key: tuple[str, str, str, str]) -> tuple[Any, ...]:
    name, preset, task, recipe = key
    registered = [one.name for one in _registered(name, preset)]
    place = registered.index(task) if task in registered else len(registered)
    return (TRAINED.index(name), preset, place, task, recipe)


def make_topic(results: Sequence[Result], label: str = "") -> Topic:
    """The comparison that ``results``, all of one task and recipe, were made for."""
    first = results[0].cell
    task = _relative(first.work, first.preset, first.task)
    settings: dict[str, Any] = {}
    if task is not None:
        study = task.study([])
        settings = {
            name: getattr(study, name)
            for name in ("tuning_seeds", "reporting_seeds", "refine", "width", "defaults", "short")
        }
    steps = {result.cell.steps for result in results}
    settings["steps"] = task.steps if task is not None and task.steps in steps else max(steps)
    study = Study(first.work, first.preset, first.task, first.recipe, entries=(), **settings)
    used = {result.cell.method for result in results}
    entries, titles, full, outdated = [], {}, set(), set()
    for name in sorted(used, key=lambda one: (list(METHODS).index(_base(one)), one)):
        mine = [result for result in results if result.cell.method == name]
        method = _method(name)
        entry = _entry(name, method, task, mine)
        revision = _revision(entry, mine)
        if revision != entry.revision:
            outdated.add(name)
        entries.append(replace(entry, revision=revision))
        titles[name] = method.title if method else name
        if method and method.full:
            full.add(name)
    seeds = _reporting_seeds(study, results)
    study = replace(study, entries=tuple(entries), reporting_seeds=seeds)
    return Topic(
        Ledger(study, results),
        titles,
        label or " / ".join((first.work, first.preset, first.task)),
        log_scale=task is not None and task.log_scale,
        full=frozenset(full),
        outdated=frozenset(outdated),
    )


def _registered(name: str, preset: str) -> list[Task]:
    try:
        return work(name).tasks(preset, None, "cpu")
    except KeyError:  # a preset of another version
        return []


def _relative(name: str, preset: str, task: str) -> Task | None:
    """The registered task of that name, else one with the same ending, else the first."""
    known = _registered(name, preset)
    ending = task.partition("-")[2]
    same = [one for one in known if one.name == task]
    alike = [one for one in known if one.name.partition("-")[2] == ending]
    return next(iter([*same, *alike, *known]), None)


def _base(name: str) -> str:
    """Registered name of a method or of a variant of it; the last one for unknown methods."""
    base = name.partition("[")[0]
    return base if base in METHODS else list(METHODS)[-1]


def _method(name: str) -> Method | None:
    try:
        return get(name)
    except UsageError:  # a method of another version
        return None


def _entry(name: str, method: Method | None, task: Task | None, results: list[Result]) -> Entry:
    if method is not None:
        scale = 1.0 if task is None else task.lr_scale
        adapters = None if task is None else task.adapters
        return method.entry(scale, task is None or task.knobs, adapters)
    return Entry(name, statistics.median(result.cell.lr for result in results))


def _revision(entry: Entry, results: Sequence[Result]) -> str:
    """The method's revision, or the most frequent one if it has no cells of its own."""
    counts = Counter(result.cell.revision for result in results)
    return entry.revision if entry.revision in counts else counts.most_common(1)[0][0]


def _reporting_seeds(study: Study, results: Sequence[Result]) -> tuple[int, ...]:
    """The seeds reported on: as planned, or those run where the user named others."""
    found = {r.cell.seed for r in results if r.cell.steps == study.steps}
    found -= set(study.tuning_seeds)
    if found <= set(study.reporting_seeds):
        return study.reporting_seeds
    return tuple(sorted(found))


def _with_files(topic: Topic, folder: Path) -> Topic:
    timings, divergences = read_json(folder / TIMINGS), read_json(folder / DIVERGENCES)
    floor = None
    if isinstance(divergences.get("floor"), (int, float)):
        floor = (float(divergences["floor"]), str(divergences.get("reference", "")))
    return replace(
        topic,
        timings=timings.get("methods", {}),
        divergences=divergences.get("methods", {}),
        floor=floor,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
