"""What the examples train: a tiny language model over bytes, and a text."""

from __future__ import annotations

import argparse
import inspect

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..language_model import LanguageModelRecipe, build_model

LENGTH = 32
#: Norms of gradients are clipped at this, low enough to act on a model so small.
CLIP = 0.1
RECIPE = LanguageModelRecipe("none", hidden_size=32, layers=2, heads=2, intermediate_size=48)


def language_model() -> nn.Module:
    """A Llama of 33,000 parameters with random weights."""
    return build_model(RECIPE)


def lora_config() -> peft.LoraConfig:
    """LoRA on every linear layer but the head."""
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def language_model_with_lora() -> nn.Module:
    """The same model with adapters."""
    torch.manual_seed(0)
    return peft.get_peft_model(language_model(), lora_config())


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of bytes of a module of the standard library, as causal language modelling."""

    def __init__(self, count: int = 64) -> None:
        text = inspect.getsource(argparse).encode()[: count * LENGTH]
        self.bytes = torch.tensor(list(text)).view(count, LENGTH)

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.bytes[index], "labels": self.bytes[index]}


def train_next_byte(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    """The losses of a model ``(N, 4)`` bytes -> ``(N, 256)`` that learns what comes next."""
    fives = Windows().bytes.flatten()[:1000].view(-1, 5)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(fives[:, :4]), fives[:, 4])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
