"""``python -m tests.fuzz.soak``: one small training for very long, measured on the way."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer
from tests.models import LoRALinear

WIDTHS = (12, 10, 6)
DIRECTIONS = 4
#: The run is cut into this many windows of equal length.
WINDOWS = 20


@dataclass(frozen=True)
class Window:
    """Measurements over one part of the run.

    Attributes:
        loss: Mean loss; the data carry noise, so it settles on a floor.
        curvature_error: Relative distance of the estimated input curvature to the true
            one, mean over its updates.
        skewness: Largest entry of ``|U^T U - I|`` of the kept directions.
        size: Largest entry of the parameters.
        seconds: Processor time per step.
        memory: Resident memory of the process in MiB, 0 where it cannot be read.
        tensors: Number of live tensors.
    """

    loss: float
    curvature_error: float
    skewness: float
    size: float
    seconds: float
    memory: float
    tensors: int


class Soak:
    """A two-layer model that follows a teacher through noise."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(1)
        self.spread = torch.logspace(0, -1, WIDTHS[0])
        self.first = LoRALinear(WIDTHS[0], WIDTHS[1], r=3)
        self.second = LoRALinear(WIDTHS[1], WIDTHS[2])
        self.model = nn.ModuleList([self.first, self.second, nn.Linear(WIDTHS[2], WIDTHS[2])])
        self.teacher = torch.randn(WIDTHS[0], WIDTHS[2]) / WIDTHS[0] ** 0.5
        self.optimizer = CGLoRAOptimizer(self.model, lr=1e-3, curvature=DIRECTIONS)

    def step(self) -> float:
        x = torch.randn(16, WIDTHS[0], generator=self.generator) * self.spread
        y = x @ self.teacher + 0.3 * torch.randn(16, WIDTHS[2], generator=self.generator)
        out = self.model[2](self.second(torch.tanh(self.first(x))))
        loss = (out - y).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def window(self, steps: int) -> Window:
        losses, errors = [], []
        started = time.process_time()
        for step in range(steps):
            losses.append(self.step())
            if step % 6 == 0:
                errors.append(self.curvature_error())
        seconds = (time.process_time() - started) / steps
        gc.collect()
        basis = self.state()["input_basis"]
        return Window(
            statistics.fmean(losses),
            statistics.fmean(errors),
            float((basis.mT @ basis - torch.eye(DIRECTIONS)).abs().max()),
            max(float(p.detach().abs().max()) for p in self.model.parameters()),
            seconds,
            resident_memory(),
            sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
        )

    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state[self.first.lora_A.weight]

    def curvature_error(self) -> float:
        """Only the first layer's inputs have a distribution that stays."""
        state, true = self.state(), self.spread.square()
        basis, factor = state["input_basis"], state["input_factor"]
        tail = (state["input_trace"] - factor.square().sum()) / (WIDTHS[0] - DIRECTIONS)
        root = basis @ factor
        estimate = root @ root.mT + tail * (torch.eye(WIDTHS[0]) - basis @ basis.mT)
        return float((estimate - true.diag()).norm() / true.norm())


def resident_memory() -> float:
    """In MiB; 0 where there is no ``/proc``."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 / 2**20 if path.exists() else 0.0


def complaints(windows: Sequence[Window], timed: bool) -> list[str]:
    """What grew, drifted or slowed down between the second fifth of a run and its last.

    Args:
        windows: All of them, in order; at least ten.
        timed: Whether processor time counts; it means nothing in a short run.
    """
    fifth = len(windows) // 5
    early, late = windows[fifth : 2 * fifth], windows[-fifth:]

    def mean(which: Sequence[Window], name: str) -> float:
        return statistics.fmean(getattr(window, name) for window in which)

    limits = {"loss": 1.05, "curvature_error": 1.2, "size": 1.5}
    if timed:
        limits["seconds"] = 1.25
    found = [
        f"{name}: {mean(early, name):.4g} -> {mean(late, name):.4g}"
        for name, limit in limits.items()
        if mean(late, name) > limit * mean(early, name)
    ]
    if mean(late, "memory") > mean(early, "memory") + 4:
        found.append(f"memory: {mean(early, 'memory'):.1f} -> {mean(late, 'memory'):.1f} MiB")
    if late[-1].tensors > early[0].tensors:
        found.append(f"tensors: {early[0].tensors} -> {late[-1].tensors}")
    if max(window.skewness for window in windows) > 1e-4:
        found.append(f"directions not orthonormal: {[w.skewness for w in windows]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    soak, windows = Soak(), []
    print("  steps     loss  X error  skewness   size  ms/step  MiB  tensors")
    for number in range(1, WINDOWS + 1):
        windows.append(w := soak.window(arguments.steps // WINDOWS))
        print(
            f"{number * arguments.steps // WINDOWS:7,}  {w.loss:7.5f}  {w.curvature_error:7.4f}"
            f"  {w.skewness:8.1e}  {w.size:5.2f}  {w.seconds * 1e3:7.2f}  {w.memory:3.0f}"
            f"  {w.tensors:7}",
            flush=True,
        )
    found = complaints(windows, timed=True)
    if any(soak.optimizer.diagnostics().values()):
        found.append(f"events: {soak.optimizer.diagnostics()}")
    print("\n".join(found) or "no drift, no growth, no slow-down")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
