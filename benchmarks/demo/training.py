"""One fine-tuning run of the demo."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cg_optim import CGLoRAOptimizer

from ..optimizer_state import state_bytes
from .parts import Evaluation, Part

GRADIENT_NORM = 1.0
"""Gradients are clipped to this norm, for every optimizer."""

BUDGETS = (0.25, 0.5, 1.0)
"""Shares of the steps that the tables show."""


def _adamw(model: nn.Module, lr: float) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def _cg_lora(model: nn.Module, lr: float) -> Optimizer:
    return CGLoRAOptimizer(model, lr=lr)


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "AdamW": _adamw,
    "CGLoRAOptimizer": _cg_lora,
}
"""Each as a user would build it, the baseline first."""


@dataclass
class Run:
    """What one run showed.

    Attributes:
        optimizer, learning_rate, seed: What was run.
        steps: Steps after which the model was evaluated, from 0.
        losses: Held-out losses after these steps.
        accuracies: Held-out accuracies, empty where there are no labels.
        train: Training loss of every step.
        seconds_per_step: Median over the steps: batch, forward, backward and optimizer.
        state_bytes: Size of the optimizer's state.
        last: The last evaluation.
    """

    optimizer: str
    learning_rate: float
    seed: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    seconds_per_step: float = 0.0
    state_bytes: int = 0
    last: Evaluation | None = None

    def add(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation."""
        self.steps.append(step)
        self.losses.append(evaluation.loss)
        if evaluation.accuracy is not None:
            self.accuracies.append(evaluation.accuracy)
        self.last = evaluation


def run(part: Part, optimizer_name: str, seed: int, progress: Callable[[int, float], None]) -> Run:
    """Fine-tune once.

    Args:
        part: The task.
        optimizer_name: One of :data:`OPTIMIZERS`.
        seed: Initial adapters and order of the data.
        progress: Called after every step with the steps done and the last held-out loss.
    """
    settings = part.settings
    learning_rate = settings.learning_rates[optimizer_name]
    record = Run(optimizer_name, learning_rate, seed)
    model = part.model(seed)
    # Dropout draws the same masks in all runs of a seed.
    torch.manual_seed(seed)
    optimizer = OPTIMIZERS[optimizer_name](model, learning_rate)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    evaluate_at = evaluation_steps(settings.steps, settings.evaluations)
    record.add(0, part.evaluate(model))
    model.train()
    times = []
    batches = part.batches(seed)
    for step in range(1, settings.steps + 1):
        start = time.perf_counter()
        loss = part.loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(time.perf_counter() - start)
        record.train.append(float(loss.detach()))
        if step in evaluate_at:
            record.add(step, part.evaluate(model))
        progress(step, record.losses[-1])
    record.seconds_per_step = statistics.median(times)
    record.state_bytes = state_bytes(optimizer)
    return record


def step_at(share: float, steps: int) -> int:
    """The step at which a share of the budget is used up."""
    return 0 if share == 0 else max(1, round(share * steps))


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Evenly spaced steps, and those of :data:`BUDGETS`."""
    shares = [part / evaluations for part in range(1, evaluations + 1)]
    return {step_at(share, steps) for share in (*shares, *BUDGETS)}
