"""What a work gives to the common training loop: a model, batches, a loss and an evaluation."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = Any
"""A tensor, or a tuple or dictionary of tensors; only the problem looks inside."""


@dataclass(frozen=True)
class LoraSettings:
    """Adapter settings, equal for all methods of a task."""

    rank: int
    alpha: int
    targets: tuple[str, ...]


class Problem(ABC):
    """A task as every method sees it: same weights, data order, loss and held-out data.

    Attributes:
        lora: adapter settings.
        clip: largest gradient norm, ``None`` for no clipping.
        evaluate_every: steps between evaluations, at most 10.
        device: where the model lives.
        bf16: whether forward and loss run under bfloat16 autocast.
        head_rate: learning rate of :meth:`trainable_besides_lora` over the cell's.
    """

    lora: LoraSettings
    clip: float | None = 1.0
    evaluate_every: int = 10
    device: torch.device = torch.device("cpu")
    bf16: bool = False
    head_rate: float = 1.0

    @abstractmethod
    def base_model(self, seed: int) -> nn.Module:
        """A fresh model with the pretrained weights, on the CPU.

        Layers that are new (a classification head) are drawn from ``seed``.
        """

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches on the device, in the order of ``seed``."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean training loss of ``batch``."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out losses ``choose`` and ``report`` and the task's further metrics."""

    def predictions(self, model: nn.Module) -> NDArray[np.floating] | None:
        """Log-probabilities of held-out tokens, ``None`` where the task has no such thing."""
        return None

    def singles(self, batch: Batch) -> Sequence[Batch]:
        """``batch`` as batches of one example, for calibration passes that ask for it."""
        return [batch]

    def calibrate(self, model: nn.Module, batch: Batch) -> None:
        """Forward pass of a calibration batch."""
        self.loss(model, batch)

    def trainable_besides_lora(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters that LoRA methods train besides the adapters (a new head)."""
        return []

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of this task."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class ConfiguredProblem(Problem):
    """A problem whose clipping, precision and evaluations are settings of its task."""

    def __init__(self, settings: Mapping[str, Any], device: str) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.clip = settings["clip"]
        self.bf16 = settings["bf16"]
        self.evaluate_every = settings["evaluate_every"]
        self.head_rate = settings.get("head_rate", 1.0)
