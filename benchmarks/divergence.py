"""How far the predictions of LoRA are from those of full fine-tuning, beside the final loss.

Mean ``KL(full fine-tuned || method)`` in nats per held-out token, for the same seed and data
order, from the predictions that the worker processes left. The *floor* is the same between full
fine-tunings with different seeds: nothing can be expected to come closer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .cells import Cell, write_json
from .execute import predictions_path
from .methods import METHODS, get
from .runner import Comparison
from .sweep import Entry, Ledger

FILE = "divergence.json"
"""Name of the file in the task's folder."""


def write_divergences(comparison: Comparison, out: Path) -> Path | None:
    """Compute what can be computed for one task and write it.

    The reference is the full fine-tuning with the lower loss of all that are finished, also of
    those that this run leaves out. The file holds ``reference`` (name of
    the method), ``cells`` (seed -> its cell), ``floor`` (``None`` with one seed) and ``methods``:
    for each ``mean``, ``seeds`` (seed -> divergence) and ``cells``. Values whose predictions are
    gone are kept from the file as long as their cells are still the tuned ones.

    Returns:
        The file, ``None`` where the task has no predictions or no full fine-tuning is finished.
    """
    results = list(comparison.results.values())
    ledger = Ledger(comparison.study, results)
    asked = {entry.method for entry in comparison.study.entries}
    full = [method for name in sorted({*asked, *METHODS}) if (method := get(name)).full]
    reference = _reference(Ledger(comparison.task.study(full), results))
    if reference is None:
        return None
    method, teachers = reference
    path = out / comparison.task.folder / FILE
    before = _read(path)
    if before.get("cells") != _names(teachers):
        before = {}
    loaded = _Predictions(out)
    known = before.get("methods", {})
    # Methods that this run leaves out stay in the file.
    methods: dict[str, Any] = {name: old for name, old in known.items() if name not in asked}
    for entry in comparison.study.entries:
        if entry.method == method:
            continue
        cells = _reported(ledger, entry)
        old = known.get(entry.method, {})
        seeds: dict[str, float] = {}
        for seed, cell in cells.items():
            value = loaded.divergence(teachers.get(seed), cell)
            if value is None and old.get("cells", {}).get(str(seed)) == cell.name:
                value = old["seeds"].get(str(seed))
            if value is not None:
                seeds[str(seed)] = value
        if seeds:
            methods[entry.method] = {
                "mean": math.fsum(seeds.values()) / len(seeds),
                "seeds": seeds,
                "cells": {seed: cells[int(seed)].name for seed in seeds},
            }
    if not methods:
        return None
    between = [
        loaded.divergence(first, second)
        for first, second in itertools.permutations(teachers.values(), 2)
    ]
    found = [value for value in between if value is not None]
    floor = math.fsum(found) / len(found) if found else before.get("floor")
    write_json(
        path,
        {"reference": method, "cells": _names(teachers), "floor": floor, "methods": methods},
    )
    return path


def _reference(ledger: Ledger) -> tuple[str, dict[int, Cell]] | None:
    best: tuple[float, str, dict[int, Cell]] | None = None
    for entry in ledger.study.entries:
        cells = _reported(ledger, entry)
        loss = ledger.mean(list(cells.values()), "report") if cells else None
        if loss is not None and math.isfinite(loss) and (best is None or loss < best[0]):
            best = (loss, entry.method, cells)
    return best and best[1:]


def _reported(ledger: Ledger, entry: Entry) -> dict[int, Cell]:
    """Finished cells of the tuned setting by reporting seed."""
    choice = ledger.choice(entry)
    if choice is None:
        return {}
    cells = {
        seed: ledger.cell(entry, choice.lr, choice.knob, seed)
        for seed in ledger.study.reporting_seeds
    }
    return {seed: cell for seed, cell in cells.items() if ledger.get(cell) is not None}


def _names(cells: dict[int, Cell]) -> dict[str, str]:
    return {str(seed): cell.name for seed, cell in sorted(cells.items())}


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


class _Predictions:
    """Predictions of cells, each read once."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._read: dict[Cell, NDArray[np.floating] | None] = {}

    def of(self, cell: Cell) -> NDArray[np.floating] | None:
        if cell not in self._read:
            path = predictions_path(cell, self._out)
            self._read[cell] = None
            if path.exists():
                with np.load(path) as file:
                    self._read[cell] = file["logp"]
        return self._read[cell]

    def divergence(self, reference: Cell | None, other: Cell) -> float | None:
        first = None if reference is None else self.of(reference)
        second = self.of(other)
        if first is None or second is None or first.shape != second.shape:
            return None
        value = metrics.kl_divergence(first, second)
        return value if math.isfinite(value) else None
