"""Milliseconds per step from a solo, interleaved run: cells beside each other spoil their clocks.

One process holds a model and an optimizer per method at its tuned setting and lets them take turns,
step by step, so that a disturbance meets all of them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

from .cells import Cell, environment, write_json
from .runner import Comparison, fork_server
from .sweep import Ledger
from .works import Task

FILE = "timing.json"
"""Name of the file in the task's folder."""
ROUNDS = {"tiny": 3, "quick": 12}
MORE_ROUNDS = 24
WARM_UP = {"tiny": 3}
MORE_WARM_UP = 12
"""Rounds before the clock counts: methods with a denser schedule at the start are past it."""
BASELINE = "adamw"


def write_timing(comparison: Comparison, out: Path, threads: int) -> Path | None:
    """Time the tuned setting of every method of one task, unless that was done before.

    The file holds ``environment``, ``rounds`` and ``methods``: for each the ``cell`` it is of, and
    means in milliseconds: ``ms_forward_backward`` (hooks included), ``ms_step`` and ``ms_hooks``
    (what forward and backward take longer than AdamW's on the same adapters; 0 for methods
    without hooks).  Means, because a median would not see work done in every n-th step only.

    Returns:
        The file, ``None`` while no method is tuned.
    """
    ledger = Ledger(comparison.study, list(comparison.results.values()))
    cells = []
    for entry in comparison.study.entries:
        choice = ledger.choice(entry)
        if choice is not None:
            seed = comparison.study.reporting_seeds[0]
            cells.append(ledger.cell(entry, choice.lr, choice.knob, seed))
    path = out / comparison.task.folder / FILE
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, json.JSONDecodeError):
        known = json.loads(path.read_text(encoding="utf-8")).get("methods", {})
    # Methods that this run leaves out keep their place in the same interleaved timing.
    asked = {entry.method for entry in comparison.study.entries}
    others = {timed["cell"] for name, timed in known.items() if name not in asked}
    cells += [cell for cell in comparison.results if cell.name in others]
    if not cells:
        return None
    if {name: timed["cell"] for name, timed in known.items()} == {c.method: c.name for c in cells}:
        return path
    rounds = ROUNDS.get(comparison.task.preset, MORE_ROUNDS)
    process = fork_server(threads).Process(
        target=measure, args=(comparison.task, cells, rounds, path, threads)
    )
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    return path if path.exists() else None


def measure(task: Task, cells: list[Cell], rounds: int, path: Path, threads: int) -> None:
    """The timing itself, in a process of its own."""
    import torch

    from . import methods, training, works

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    trainers = {}
    for cell in cells:
        problem = works.work(task.work).problem(task)  # of its own: it may remember its last model
        trainers[cell.method] = training.Trainer.start(problem, methods.get(cell.method), cell)
    clock = training.synchronised(torch.device(task.device))
    backward: dict[str, list[float]] = {name: [] for name in trainers}
    stepping: dict[str, list[float]] = {name: [] for name in trainers}
    warm_up = WARM_UP.get(task.preset, MORE_WARM_UP)
    for turn in range(warm_up + rounds):
        for name, trainer in trainers.items():
            _, first, second = trainer.step(clock)
            if turn >= warm_up:
                backward[name].append(first)
                stepping[name].append(second)
    usual = backward.get(BASELINE)
    timed: dict[str, dict[str, Any]] = {}
    for cell in cells:
        name = cell.method
        hooked = hasattr(trainers[name].optimizer, "remove_hooks")
        if not hooked:
            hooks: float | None = 0.0
        elif usual:
            hooks = statistics.mean(
                mine - theirs for mine, theirs in zip(backward[name], usual, strict=True)
            )
        else:
            hooks = None
        timed[name] = {
            "cell": cell.name,
            "ms_forward_backward": round(1e3 * statistics.mean(backward[name]), 4),
            "ms_step": round(1e3 * statistics.mean(stepping[name]), 4),
            "ms_hooks": None if hooks is None else round(1e3 * max(hooks, 0.0), 4),
        }
    write_json(
        path,
        {
            "environment": environment(task.device, threads),
            "rounds": rounds,
            "methods": timed,
        },
    )
