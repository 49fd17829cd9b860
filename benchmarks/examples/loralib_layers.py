"""loralib: its layers hold A and B as parameters of their own."""

from __future__ import annotations

import loralib
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer

from .small import train_next_byte


class NextByte(nn.Module):
    """Predicts a byte from the four before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = loralib.Embedding(256, 16, r=2)
        self.mix = loralib.Linear(64, 48, r=4, lora_alpha=8)
        self.qkv = loralib.MergedLinear(48, 96, r=4, enable_lora=[True, False, True])
        self.head = nn.Linear(96, 256)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.mix(self.embed(context).flatten(1)))
        return self.head(torch.relu(self.qkv(hidden)))


def train(steps: int = 40) -> tuple[list[float], CGLoRAOptimizer]:
    """The losses, and the optimizer for its summary."""
    torch.manual_seed(0)
    model = NextByte()
    loralib.mark_only_lora_as_trainable(model)
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    return train_next_byte(model, optimizer, steps), optimizer


if __name__ == "__main__":
    losses, optimizer = train()
    print(optimizer.summary())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
