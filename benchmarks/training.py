"""The training loop that all methods share, and what is measured in it."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from . import metrics
from .cells import Cell, Result
from .methods import Method
from .optimizer_state import state_bytes
from .optimizers import give_own_rate, trainable
from .problem import Batch, Problem

WARM_UP = 3
"""Steps left out of the step times: lazy state and first allocations."""


def build(problem: Problem, method: Method, seed: int) -> nn.Module:
    """The model ``method`` trains, with its adapters unless it trains all weights."""
    from .initialisations import adapt

    if method.full:
        return problem.base_model(seed).to(problem.device)
    return adapt(problem, seed, method.init)


@dataclass
class Trainer:
    """One model with its optimizer on its batches, advanced one step at a time."""

    problem: Problem
    model: nn.Module
    optimizer: Optimizer
    batches: Iterator[Batch]
    steps: int
    done: int = 0

    @classmethod
    def start(cls, problem: Problem, method: Method, cell: Cell) -> Trainer:
        """Build the model and the optimizer of ``cell``."""
        model = build(problem, method, cell.seed)
        optimizer = method.optimizer(model, cell.lr, cell.knob)
        if problem.head_rate != 1.0:
            head = problem.trainable_besides_lora(model)
            give_own_rate(optimizer, head, problem.head_rate * cell.lr)
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group["lr"])
        # Initialisations draw different amounts of random numbers; the dropout of the base model
        # must not depend on that.
        torch.manual_seed(20_000 + cell.seed)
        model.train()
        return cls(problem, model, optimizer, problem.batches(cell.seed), cell.steps)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Loss and gradients of ``batch``, clipped."""
        self.model.zero_grad(set_to_none=True)
        with self.problem.autocast():
            loss = self.problem.loss(self.model, batch)
        loss.backward()
        if self.problem.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(self.model), self.problem.clip)
        return loss.detach()

    def set_rate(self) -> None:
        """Linear decay to zero, the schedule of every method."""
        factor = max(0.0, 1.0 - self.done / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self, clock: Callable[[], float] = time.perf_counter) -> tuple[Tensor, float, float]:
        """One training step; its loss, seconds of forward+backward and of the optimizer."""
        batch = next(self.batches)
        self.set_rate()
        start = clock()
        loss = self.forward_backward(batch)
        middle = clock()
        self.optimizer.step()
        self.done += 1
        return loss, middle - start, clock() - middle

    def evaluate(self) -> dict[str, float]:
        """Held-out losses and metrics; leaves no trace in the optimizer."""
        self.model.eval()
        with torch.no_grad(), self.problem.autocast():
            values = self.problem.evaluate(self.model)
        self.model.train()
        return values


def synchronised(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _peak_resident() -> int:
    """Most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss starts at the peak of the parent process
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process, and of the device if there is one, in bytes."""
    peak = {"peak_memory": float(_peak_resident())}
    if device.type == "cuda":
        peak["peak_device_memory"] = float(torch.cuda.max_memory_allocated(device))
    return peak


def _moves(method: Method) -> bool:
    from .initialisations import MOVING

    return method.init in MOVING


def _loss_before(problem: Problem, seed: int) -> float:
    """Held-out loss of the model with plain adapters, before any step; random state unchanged."""
    from .initialisations import adapt

    with torch.random.fork_rng(devices=[]):
        model = adapt(problem, seed)
        model.eval()
        with torch.no_grad(), problem.autocast():
            return problem.evaluate(model)["report"]


def run(
    problem: Problem, method: Method, cell: Cell, *, predictions: bool = False
) -> tuple[Result, NDArray[np.floating] | None]:
    """Train ``cell`` and measure it.

    Args:
        problem: the task.
        method: the method of the cell.
        cell: learning rate, seed, budget.
        predictions: whether to return the held-out predictions of the trained model.

    Returns:
        The record (status ``ok`` or ``diverged``), and the predictions if asked for.

    Raises:
        Exception: Whatever the method raises; the caller records it as a failure.
    """
    clock = synchronised(problem.device)
    started = time.perf_counter()
    trainer = Trainer.start(problem, method, cell)
    set_up = time.perf_counter() - started
    first = trainer.evaluate()
    # Every start is held against the model that it was given, not against a better one.
    untouched = first["report"] if not _moves(method) else _loss_before(problem, cell.seed)
    curve: dict[str, list[float]] = {"step": [0.0], "seconds": [0.0]}
    for half in ("choose", "report"):
        curve[half] = [first[half]]
    train: list[float] = []
    backward_times, step_times = [], []
    trained_for, final = 0.0, first
    for step in range(1, cell.steps + 1):
        loss, backward, stepping = trainer.step(clock)
        trained_for += backward + stepping
        train.append(round(float(loss), 5))
        if step > WARM_UP:
            backward_times.append(backward)
            step_times.append(stepping)
        if not math.isfinite(train[-1]):
            break
        if step % problem.evaluate_every == 0 or step == cell.steps:
            final = trainer.evaluate()
            curve["step"].append(float(step))
            curve["seconds"].append(round(trained_for, 4))
            for half in ("choose", "report"):
                curve[half].append(final[half])
    broken = not math.isfinite(train[-1]) or metrics.is_diverged([untouched, *curve["report"][1:]])
    costs = {
        "set_up_seconds": round(set_up, 4),
        "train_seconds": round(trained_for, 4),
        "state_bytes": float(state_bytes(trainer.optimizer)),
        "trained_parameters": float(sum(p.numel() for p in trainable(trainer.model))),
        **peak_memory(problem.device),
    }
    if step_times:
        costs["ms_forward_backward"] = round(1e3 * statistics.median(backward_times), 4)
        costs["ms_step"] = round(1e3 * statistics.median(step_times), 4)
    result = Result(
        cell=cell,
        status="diverged" if broken else "ok",
        error=None if not broken else "non-finite, or final above initial loss",
        curve=curve,
        train=train,
        final=final,
        costs=costs,
    )
    kept = None
    if predictions and not broken:
        trainer.model.eval()
        with torch.no_grad(), problem.autocast():
            kept = problem.predictions(trainer.model)
    return result, kept
