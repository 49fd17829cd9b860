"""A LoRA layer of your own: found by its names, or declared where the names say nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer, LoRAPair

from .small import train_next_byte


class LoRALinear(nn.Module):
    """Customary names: the pair is found."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class Bottleneck(nn.Module):
    """Names that say nothing: the pair is declared below."""

    def __init__(self, size: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.squeeze = nn.Linear(size, rank, bias=False)
        self.restore = nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.restore.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.restore(self.squeeze(x))


def train(steps: int = 40) -> tuple[list[float], CGLoRAOptimizer]:
    """The losses, and the optimizer for its summary."""
    torch.manual_seed(0)
    bottleneck = Bottleneck(48)
    model = nn.Sequential(
        nn.Embedding(256, 16).requires_grad_(False),
        nn.Flatten(1),
        LoRALinear(nn.Linear(64, 48)),
        nn.ReLU(),
        bottleneck,
        nn.ReLU(),
        nn.Linear(48, 256).requires_grad_(False),
    )
    declared = LoRAPair(
        A=bottleneck.squeeze.weight,
        B=bottleneck.restore.weight,
        name="bottleneck",
        input_module=bottleneck.squeeze,
        output_module=bottleneck.restore,
    )
    optimizer = CGLoRAOptimizer(model, lr=1e-2, pairs=[declared])
    return train_next_byte(model, optimizer, steps), optimizer


if __name__ == "__main__":
    losses, optimizer = train()
    print(optimizer.summary())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
