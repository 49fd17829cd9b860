"""Time and memory of each initialisation itself, on one model in one run.

Every initialisation runs in a process of its own, on the same weights and batches.  Time is
processor time, which other work on the machine spoils a little only; memory is how far the peak
of the process rises above what the model and one training step of the plain adapters need.  All
of that is repeated, in turns, and the medians are kept.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import language_model
from ..adapters import linear_layers
from ..cells import environment
from ..initialisations import CALIBRATION_BATCHES, CURVATURE_BATCHES
from ..problem import LoraSettings, Problem
from ..report.table import MISSING, grid, size
from ..stdlib_texts import english_text
from ..training import peak_memory

STARTS = (
    None, "lora-ga", "curvature-newton", "curvature-shift", "curvature-keep", "first step",
    "pissa", "corda", "eva",
)  # fmt: skip
"""``first step`` is ``CGLoRAOptimizer(init="curvature")``, beside the same step without it."""
FIRST_STEP = "first step"
LIMIT = 60
"""Processor seconds after which a start is given up (EVA goes on until its components converge)."""
ROUNDS = 3
SLOW = 10
"""A start that takes more processor seconds than that is not measured again."""


@dataclass(frozen=True)
class Shape:
    """A model and its calibration batches."""

    hidden: int = 1024
    intermediate: int = 2752
    layers: int = 4
    batch: int = 2
    length: int = 128
    rank: int = 16


class CostProblem(Problem):
    """English text on a randomly initialised Llama: cost does not depend on what it knows."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._text = english_text().train
        recipe = language_model.LanguageModelRecipe(
            "cost", hidden_size=shape.hidden, layers=shape.layers, heads=8,
            intermediate_size=shape.intermediate,
        )  # fmt: skip
        self._base = language_model.build_model(recipe)
        self.lora = LoraSettings(shape.rank, 2 * shape.rank, tuple(linear_layers(self._base)))

    def base_model(self, seed: int) -> nn.Module:
        return self._base

    def batches(self, seed: int) -> Iterator[Tensor]:
        source = torch.Generator().manual_seed(seed)
        size, length = self.shape.batch, self.shape.length
        while True:
            yield language_model.sample_batch(self._text, size, length, source)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return language_model.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def singles(self, batch: Tensor) -> Sequence[Tensor]:
        return list(batch.split(1))


def measure_all(
    shape: Shape,
    threads: int,
    starts: Sequence[str | None] = STARTS,
    limit: int = LIMIT,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Costs of all starts; one that raises or takes too long is recorded with its error."""
    runs: dict[str, list[dict[str, Any]]] = {start or "plain": [] for start in starts}
    for number in range(rounds):
        for start in starts:
            mine = runs[start or "plain"]
            if number == 0 or ("error" not in mine[0] and mine[0]["seconds"] <= SLOW):
                mine.append(_in_own_process(start, shape, threads, limit))
    return {
        "shape": asdict(shape),
        "batches": {"peft": CALIBRATION_BATCHES, "curvature": CURVATURE_BATCHES},
        "rounds": rounds,
        "starts": {name: _typical(mine) for name, mine in runs.items()},
        "environment": environment("cpu", threads),
    }


def _typical(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the runs, or the first error."""
    failed = next((run for run in runs if "error" in run), None)
    return failed or {key: median(run[key] for run in runs) for key in runs[0]}


def _in_own_process(start: str | None, shape: Shape, threads: int, limit: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, start, shape, threads, limit))
    process.start()
    theirs.close()  # so that the end of the process ends the wait
    try:
        found: dict[str, Any] = mine.recv()
    except EOFError:
        found = {"error": f"not done after {limit} s"}
    process.join()
    return found


def _measure(pipe: Any, start: str | None, shape: Shape, threads: int, limit: int) -> None:
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        pipe.send(measure(start, shape))
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})


def measure(start: str | None, shape: Shape) -> dict[str, float]:
    """Seconds and bytes of one start, in this process."""
    from ..initialisations import adapt

    problem = CostProblem(shape)
    if start == FIRST_STEP:
        return _first_step(problem)
    before = _peak()
    started = time.process_time()
    model = adapt(problem, 0, start)
    seconds = time.process_time() - started
    if start is None:  # what training needs in any case
        problem.loss(model, next(problem.batches(0))).backward()
    return {"seconds": seconds, "bytes": _peak() - before}


def _first_step(problem: CostProblem) -> dict[str, float]:
    """What ``init`` adds to the first training step; the median of three pairs of steps."""
    from cg_optim import CGLoRAOptimizer

    from ..initialisations import adapt

    model = adapt(problem, 0, None)
    batch = next(problem.batches(0))
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def step(init: str | None) -> float:
        for name, parameter in model.named_parameters():
            if name in factors:
                parameter.data.copy_(factors[name])
        with CGLoRAOptimizer(model, lr=1e-3, init=init) as optimizer:
            started = time.process_time()
            problem.loss(model, batch).backward()
            optimizer.step()
            seconds = time.process_time() - started
        optimizer.zero_grad()
        return seconds

    step(None)
    before = _peak()
    plain_again = step(None)
    held = _peak()
    started = step("curvature")
    pairs = [started - plain_again] + [step("curvature") - step(None) for _ in range(2)]
    return {"seconds": sorted(pairs)[1], "bytes": _peak() - max(held, before)}


def _peak() -> float:
    return peak_memory(torch.device("cpu"))["peak_memory"]


def table(record: dict[str, Any]) -> str:
    """Costs beyond those of plain adapters, and beside LoRA-GA's."""
    starts = record["starts"]
    plain, reference = starts["plain"], starts["lora-ga"]
    rows = []
    for name, cost in starts.items():
        if name == "plain":
            continue
        if "error" in cost:
            rows.append((name, cost["error"], MISSING, MISSING, MISSING))
            continue
        own = {
            key: max(0.0, cost[key] - (0 if name == FIRST_STEP else plain[key])) for key in plain
        }
        base = {key: reference[key] - plain[key] for key in plain}
        rows.append(
            (
                'CGLoRAOptimizer(init="curvature")' if name == FIRST_STEP else name,
                f"{own['seconds']:.2f}",
                size(own["bytes"]),
                f"{own['seconds'] / base['seconds']:.0%}",
                f"{own['bytes'] / base['bytes']:.0%}",
            )
        )
    shape = record["shape"]
    # Records without the entry are from a time when all looked at as many batches.
    batches = record.get("batches", {"peft": 4, "curvature": 4})
    rounds = record.get("rounds", 1)
    repeated = f"; medians of {rounds} runs, of one where it takes over {SLOW} s"
    repeated = repeated if rounds > 1 else ""
    header = ("initialisation", "CPU seconds", "memory", "of LoRA-GA's time", "of its memory")
    note = (
        f"Llama of {shape['layers']} layers, d = {shape['hidden']}, float32, rank {shape['rank']}, "
        f"{batches['peft']} batches of {shape['batch']} x {shape['length']} tokens for PEFT's but "
        f"PiSSA (none), {batches['curvature']} for curvature_init_, and for the optimizer's own "
        "its first training batch (the difference between two training steps); memory is how far "
        f"the process's peak rises above that of a training step{repeated}."
    )
    return f"{grid(header, rows)}\n\n{note}"
