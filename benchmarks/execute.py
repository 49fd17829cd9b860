"""What happens inside a worker process: one cell, or one solo timing run."""

from __future__ import annotations

import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from .cells import Cell, Result, environment, save
from .works import Task

PREDICTIONS = "predictions"
"""Folder of held-out predictions below the output folder; large, and not for committing."""


@dataclass(frozen=True)
class Job:
    """A cell for a worker process, with all it needs to know."""

    cell: Cell
    task: Task
    out: Path
    threads: int
    predictions: bool


def predictions_path(cell: Cell, out: Path) -> Path:
    """Where the predictions of ``cell`` are kept until the divergences are computed."""
    return (out / PREDICTIONS / cell.path).with_suffix(".npz")


def failure(job: Job, error: str) -> Result:
    """The record of a cell that could not be finished."""
    return Result(
        cell=job.cell,
        status="failed",
        error=error,
        settings=job.task.settings,
        environment=environment(job.task.device, job.threads),
    )


def run_job(job: Job) -> None:
    """Run one cell and write its record; a method that raises is recorded as failed."""
    import numpy as np
    import torch

    from . import methods, training, works

    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    started = time.perf_counter()
    try:
        problem = works.work(job.task.work).problem(job.task)
        method = methods.get(job.cell.method)
        result, predictions = training.run(problem, method, job.cell, predictions=job.predictions)
    except Exception as error:
        result, predictions = failure(job, _one_line(error)), None
    result.settings = job.task.settings
    result.environment = environment(job.task.device, job.threads)
    result.environment["wall_seconds"] = round(time.perf_counter() - started, 2)
    if predictions is not None:
        path = predictions_path(job.cell, job.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        (job.out / PREDICTIONS / ".gitignore").write_text("*\n", encoding="utf-8")
        np.savez_compressed(path, logp=predictions)
    save(result, job.out)


def _one_line(error: Exception) -> str:
    """Type, message and place of an error, without paths of this machine."""
    place = ""
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    message = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {message}{place}"
