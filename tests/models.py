"""Small models, data and comparisons that several test files share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cg_optim import CGLoRAOptimizer

WIDTH, VOCABULARY, CLASSES = 8, 11, 3


class LoRALinear(nn.Module):
    """A frozen linear layer with LoRA in PEFT's layout, dropout on the LoRA path."""

    def __init__(self, n: int, m: int, r: int = 2, scaling: float = 2.0, p: float = 0.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(n, m).requires_grad_(False)
        self.lora_A = nn.Linear(n, r, bias=False)
        self.lora_B = nn.Linear(r, m, bias=False)
        self.lora_dropout = nn.Dropout(p)
        self.scaling = scaling
        nn.init.normal_(self.lora_B.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(self.lora_dropout(x).to(self.lora_A.weight.dtype))
        return self.base_layer(x) + self.lora_B(low) * self.scaling


class Block(nn.Module):
    """Single-head attention and a small MLP; q, k and v share their input."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (LoRALinear(WIDTH, WIDTH, p=p) for _ in range(3))
        self.up, self.down = LoRALinear(WIDTH, 12, p=p), LoRALinear(12, WIDTH, p=p)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = self.norm(x)
        scores = self.q(seen) @ self.k(seen).mT / WIDTH**0.5
        scores = scores.masked_fill(~mask[:, None, :], -1e4)
        x = x + scores.softmax(-1) @ self.v(seen)
        return x + self.down(functional.gelu(self.up(x)))


class Tagger(nn.Module):
    """Two blocks and a head that labels every token; no positions, so padding can move.

    Args:
        checkpointing: None, ``"reentrant"`` or ``"non-reentrant"``.
        p: Dropout on the LoRA path.
    """

    def __init__(self, checkpointing: str | None = None, p: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(p) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.checkpointing == "reentrant" and torch.is_grad_enabled():
            x.requires_grad_()
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x, mask)
            else:
                reentrant = self.checkpointing == "reentrant"
                x = checkpoint(block, x, mask, use_reentrant=reentrant)
        return self.head(x)


Batch = tuple[Tensor, Tensor, Tensor]


def tagger(seed: int = 0, **arguments: Any) -> Tagger:
    torch.manual_seed(seed)
    return Tagger(**arguments)


def batch(seed: int = 0, rows: int = 4, length: int = 5, padded: bool = False) -> Batch:
    """Tokens, mask and labels, each ``(rows, length)``; -100 labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(CLASSES, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        mask[1::2, length - 2 :] = False
        labels = labels.masked_fill(~mask, -100)
    return tokens, mask, labels


def loss_of(model: nn.Module, data: Batch, reduction: str = "mean") -> Tensor:
    tokens, mask, labels = data
    logits = model(tokens, mask).flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten(), reduction=reduction)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
    **data: Any,
) -> None:
    """One optimizer step per number, which is the seed of its batch."""
    for step in steps:
        loss(model, batch(step, **data)).backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def curvature_state(model: nn.Module, optimizer: CGLoRAOptimizer) -> dict[str, Tensor]:
    """Copies of the saved input curvature, by parameter and tensor name."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key.startswith("input_")
    }


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a training step may change, copied."""
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def assert_equal(left: Any, right: Any) -> None:
    """Bitwise equality of nested dicts, lists and tensors."""
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def assert_close(left: Any, right: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
