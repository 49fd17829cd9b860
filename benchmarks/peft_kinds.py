"""Trains every kind of adapter PEFT has for a few steps and tabulates what becomes of it.

``python -m benchmarks.peft_kinds`` writes the table into the README, between its markers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import NoPairsWarning

from .marked_block import refresh_block
from .report.table import grid

BLOCK = "peft-kinds"
README = Path(__file__).resolve().parents[1] / "README.md"
WIDTH, STEPS, LR = 12, 40, 1e-2

HEADER = ("PEFT adapter on", "LoRA pairs, curvature by hooks", "gradient-only rule", "AdamW")


class Two(nn.Module):
    """Two layers, ``first`` and ``second``, with a nonlinearity between."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x, x, x, need_weights=False)[0]


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(20, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.first(tokens)


class Experts(nn.Module):
    """Three experts in one parameter, ``(experts, in, out)``; every row goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part @ weight for part, weight in zip(x.chunk(3), self.weight, strict=True)]
        return torch.cat(parts)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def conv1d() -> nn.Module:
    layer = Conv1D(WIDTH, WIDTH)
    nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    return layer


def quantized(bits: int) -> Callable[[], nn.Module]:
    """A model whose layers bitsandbytes holds in 8 or 4 bits, as ``from_pretrained`` makes it."""

    def make() -> nn.Module:
        import bitsandbytes as bnb

        def layer() -> nn.Module:
            if bits == 8:
                return bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
            return bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")

        model = Two(layer)
        setattr(model, f"is_loaded_in_{bits}bit", True)
        return model.to("cpu")  # the weights are quantized when they are moved

    return make


def second_adapter(model: Any) -> None:
    """Another adapter of another rank, which is the one that trains."""
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first", "second"]))
    model.set_adapter("other")


@dataclass(frozen=True)
class Kind:
    """One line of the table.

    Attributes:
        name: What the adapter is on.
        model: Makes the base model.
        settings: Of the PEFT configuration.
        inputs: Makes a batch.
        config: The class of the PEFT configuration.
        prepare: What is done to the PEFT model before training.
        needs: An optional package.
    """

    name: str
    model: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Tensor] = lambda: torch.randn(48, WIDTH)
    config: type = peft.LoraConfig
    prepare: Callable[[Any], None] = lambda model: None
    needs: str = "peft"


KINDS = (
    Kind("`nn.Linear`", lambda: Two(linear)),
    Kind("`Conv1D` of transformers", lambda: Two(conv1d), {"fan_in_fan_out": True}),
    Kind("8-bit base (bitsandbytes)", quantized(8), needs="bitsandbytes"),
    Kind("4-bit base (bitsandbytes)", quantized(4), needs="bitsandbytes"),
    Kind("rsLoRA", lambda: Two(linear), {"use_rslora": True}),
    Kind(
        "rank and alpha patterns",
        lambda: Two(linear),
        {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 1}},
    ),
    Kind("several adapters, one active", lambda: Two(linear), prepare=second_adapter),
    Kind("`lora_bias=True`", lambda: Two(linear), {"lora_bias": True}),
    Kind("DoRA", lambda: Two(linear), {"use_dora": True}),
    Kind(
        "`nn.Conv2d`",
        lambda: Two(lambda: nn.Conv2d(3, 3, 3, padding=1)),
        inputs=lambda: torch.randn(6, 3, 6, 6),
    ),
    Kind(
        "`nn.MultiheadAttention`",
        Attention,
        {"target_modules": ["first"]},
        lambda: torch.randn(8, 5, WIDTH),
    ),
    Kind(
        "`target_parameters`, one matrix",
        lambda: Two(linear),
        {"target_modules": [], "target_parameters": ["first.weight", "second.weight"]},
    ),
    Kind(
        "`target_parameters`, MoE experts",
        Mixture,
        {"target_modules": [], "target_parameters": ["first.weight"]},
    ),
    Kind(
        "`nn.Embedding`",
        Lookup,
        {"target_modules": ["first"]},
        lambda: torch.randint(20, (64,)),
    ),
    Kind("AdaLoRA", lambda: Two(linear), {"total_step": 100}, config=peft.AdaLoraConfig),
    Kind("VeRA", lambda: Two(linear), {"r": 16}, config=peft.VeraConfig),
)


@dataclass(frozen=True)
class Outcome:
    """What happened to one kind.

    Attributes:
        losses: Of every step.
        optimizer: After training.
        model: The trained model.
        still: Names of trainable parameters that did not move.
    """

    losses: list[float]
    optimizer: CGLoRAOptimizer
    model: nn.Module
    still: list[str]


def train(kind: Kind) -> Outcome:
    """A student with an adapter learns what a base model with other weights computes."""
    torch.manual_seed(0)
    teacher = kind.model().requires_grad_(False)
    settings = {"r": 4, "target_modules": ["first", "second"], **kind.settings}
    student = kind.model()
    with torch.no_grad():
        for mine, other in zip(student.parameters(), teacher.parameters(), strict=True):
            if mine.is_floating_point():
                mine.copy_(other + 0.3 * torch.randn_like(mine) * other.std())
    with warnings.catch_warnings():
        # PEFT's own remarks about unusual targets.
        warnings.filterwarnings("ignore", module="peft")
        model: Any = peft.get_peft_model(student, kind.config(**settings))
        kind.prepare(model)
    inputs = kind.inputs()
    targets = teacher(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoPairsWarning)  # the table says so
        optimizer = CGLoRAOptimizer(model, lr=LR)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(STEPS):
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    parameters = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(parameters[name], value)]
    return Outcome(losses, optimizer, model, still)


def row(kind: Kind, summary: str) -> tuple[str, ...]:
    """A line of the table, read from what ``summary()`` tells a user.

    Args:
        kind: The kind.
        summary: ``optimizer.summary()``.
    """
    table, _, rest = summary.partition("\n\n")
    pairs = table.splitlines()[2:]
    observed = sum("  hooks, " in line for line in pairs)
    reasons = Counter(line.partition("none: ")[2] for line in pairs if "none: " in line)
    left = Counter(
        line.partition(": ")[2] for line in rest.splitlines()[1:] if line.startswith("  ")
    )
    return (kind.name, str(observed or ""), _listed(reasons), _listed(left))


def _listed(reasons: Counter[str]) -> str:
    shown = (reason.removesuffix(": gradient-only rule") for reason in reasons)
    counts = zip(reasons.values(), shown, strict=True)
    return "; ".join(f"{count}: {reason}" for count, reason in counts)


def main() -> None:
    """Train all kinds and write the table."""
    rows = [row(kind, train(kind).optimizer.summary()) for kind in KINDS]
    table = grid(HEADER, rows)
    if not refresh_block(README, BLOCK, table):
        raise ValueError(f"{README.name} has no markers for the block {BLOCK!r}")
    print(table)


if __name__ == "__main__":
    main()
