"""Linear layers with ill-conditioned inputs, where the exact solution is known.

Each layer holds frozen weights ``W0`` and must learn ``W0 + D``. Inputs have a covariance ``X``
whose eigenvalues fall geometrically over the given condition number. ``D`` has rank ``r`` plus a
small full-rank rest, so the best rank-r predictor, from a truncated SVD of ``D X^(1/2)``, has a
known loss above zero, and full fine-tuning's is zero. Losses are relative to the one at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..problem import LoraSettings, Problem
from . import Report, Task

PRESETS = ("tiny", "quick", "full")

REST = 0.1
"""Frobenius norm of the full-rank rest of the target relative to its rank-r part."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"tasks": ("c1e2",), "shape": (12, 16), "rank": 2, "steps": 20},
    "quick": {"tasks": ("c1e0", "c1e4", "three-c1e4"), "shape": (48, 64), "rank": 4, "steps": 100},
    "full": {
        "tasks": ("c1e0", "c1e2", "c1e4", "c1e6", "noisy-c1e4", "three-c1e4"),
        "shape": (48, 64),
        "rank": 4,
        "steps": 300,
    },
}


def tasks(preset: str, data: Path | None, device: str) -> list[Task]:
    """Tasks named ``[noisy-|three-]c<condition number>``."""
    size = SIZES[preset]
    found = []
    for order, name in enumerate(size["tasks"]):
        settings = {
            "shape": list(size["shape"]),
            "rank": size["rank"],
            "layers": 3 if name.startswith("three") else 1,
            "batch": 64 if name.startswith("noisy") else None,
            "condition": float(name.rpartition("c")[2]),
            "rest": REST,
        }
        found.append(
            Task(
                work="linear",
                preset=preset,
                name=name,
                steps=size["steps"],
                settings=settings,
                device=device,
                width=size["shape"][1],
                lr_scale=3.0,
                knobs=preset != "quick",
                refine=preset != "tiny",
                defaults=preset == "full",
                extras=preset == "full",
                methods=("adamw", "full-adamw", "soap") if preset == "tiny" else (),
                log_scale=True,
                order=order,
            )
        )
    return found


def prepare(task: Task, report: Report | None = None) -> None:
    """Nothing to prepare."""


def problem(task: Task) -> LinearProblem:
    """The problem of ``task``; its matrices are drawn from the seed of the run."""
    return LinearProblem(task.settings, torch.device(task.device))


class Layers(nn.Module):
    """Independent linear layers side by side."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            self.add_module(f"layer{number}", layer)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Apply each layer to its own input."""
        return [layer(x) for layer, x in zip(self.children(), inputs, strict=True)]


@dataclass
class Instance:
    """One drawn layer: inputs with exactly the wanted covariance, and what is to be learned."""

    weight: Tensor
    inputs: Tensor
    target: Tensor
    best: Tensor
    scale: float

    @property
    def best_loss(self) -> float:
        """Loss of the best rank-r predictor."""
        return 0.5 * (self.best - self.target).square().sum(-1).mean().item() / self.scale


def draw(settings: dict[str, Any], seed: int, number: int) -> Instance:
    """Draw layer ``number`` of the problem with ``seed``."""
    out_size, in_size = settings["shape"]
    rank = settings["rank"]
    generator = torch.Generator().manual_seed(1_000 * seed + number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = torch.linspace(0.0, 1.0, in_size, dtype=torch.float64)
    values = settings["condition"] ** -decay
    values = values * in_size / values.sum()
    basis = torch.linalg.qr(normal(in_size, in_size))[0]
    root = (basis * values.sqrt()) @ basis.T
    count = 4 * in_size
    # Orthonormal columns make the empirical covariance exactly ``root @ root``.
    inputs = torch.linalg.qr(normal(count, in_size))[0] * count**0.5 @ root
    change = normal(out_size, rank) @ normal(rank, in_size)
    rest = normal(out_size, in_size)
    change = change + rest * (REST * change.norm() / rest.norm())
    change = change / change.norm()
    left, singular, right = torch.linalg.svd(change @ root, full_matrices=False)
    kept = (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    target, best = inputs @ change.T, inputs @ kept.T
    scale = 0.5 * target.square().sum(-1).mean().item()
    weight = normal(out_size, in_size) / in_size**0.5
    outputs = inputs @ weight.T
    return Instance(
        weight.float(),
        inputs.float(),
        (outputs + target).float(),
        (outputs + best).float(),
        scale,
    )


class LinearProblem(Problem):
    """See the module's documentation."""

    clip = None
    evaluate_every = 5

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.lora = LoraSettings(
            rank=settings["rank"],
            alpha=settings["rank"],
            targets=tuple(f"layer{number}" for number in range(settings["layers"])),
        )
        self._instances: list[Instance] = []

    def base_model(self, seed: int) -> nn.Module:
        self._instances = [
            draw(self.settings, seed, number) for number in range(self.settings["layers"])
        ]
        for instance in self._instances:
            for name in ("inputs", "target", "best"):
                setattr(instance, name, getattr(instance, name).to(self.device))
        return Layers([instance.weight for instance in self._instances])

    def batches(self, seed: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        size = self.settings["batch"]
        whole = [(instance.inputs, instance.target) for instance in self._instances]
        if size is None:
            yield from itertools.repeat(whole)
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(whole[0][0]), (size,), generator=generator).to(self.device)
            yield [(x[rows], y[rows]) for x, y in whole]

    def loss(self, model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        outputs = model([x for x, _ in batch])
        return self._loss(outputs, [y for _, y in batch])

    def _loss(self, outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
        terms = [
            0.5 * (output - target).square().sum(-1).mean() / instance.scale
            for output, target, instance in zip(outputs, targets, self._instances, strict=True)
        ]
        return torch.stack(terms).mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        outputs = model([instance.inputs for instance in self._instances])
        loss = self._loss(outputs, [instance.target for instance in self._instances]).item()
        count = len(self._instances)
        best_loss = sum(instance.best_loss for instance in self._instances) / count
        distance = self._loss(outputs, [instance.best for instance in self._instances])
        return {
            "choose": loss,
            "report": loss,
            "excess": loss - best_loss,
            "best_rank_r": best_loss,
            "distance": distance.sqrt().item(),
        }
