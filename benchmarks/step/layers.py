"""The adapters of a decoder layer at the shapes of large models, without their base weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cg_optim import LoRAPair


@dataclass(frozen=True)
class LinearShape:
    """A linear layer: its name, sizes, and which of the decoder layer's inputs it receives."""

    name: str
    out_features: int
    in_features: int
    input_index: int


@dataclass(frozen=True)
class Model:
    """Sizes of a model of Llama's kind; ``kv`` is the width of keys and values."""

    layers: int
    hidden: int
    inner: int
    kv: int

    def linears(self) -> list[LinearShape]:
        """The linear layers of one decoder layer; q, k and v share an input, gate and up too."""
        h, i, kv = self.hidden, self.inner, self.kv
        return [
            LinearShape("q", h, h, 0),
            LinearShape("k", kv, h, 0),
            LinearShape("v", kv, h, 0),
            LinearShape("o", h, h, 1),
            LinearShape("gate", i, h, 2),
            LinearShape("up", i, h, 2),
            LinearShape("down", h, i, 3),
        ]

    def inputs(self) -> list[int]:
        """Sizes of the distinct inputs of one decoder layer."""
        sizes = {linear.input_index: linear.in_features for linear in self.linears()}
        return [sizes[index] for index in sorted(sizes)]


MODELS = {
    "llama-7b": Model(32, 4096, 11008, 4096),
    "llama-13b": Model(40, 5120, 13824, 5120),
    "llama-70b": Model(80, 8192, 28672, 1024),
    "toy": Model(2, 32, 96, 16),
}


class Adapter(nn.Module):
    """``B A x`` of one linear layer."""

    def __init__(self, shape: LinearShape, rank: int) -> None:
        super().__init__()
        self.name = shape.name
        self.input_index = shape.input_index
        self.down = nn.Linear(shape.in_features, rank, bias=False)
        self.up = nn.Linear(rank, shape.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(self.down(x))
        return hidden

    def pair(self, prefix: str) -> LoRAPair:
        """This adapter as the optimizer wants it declared."""
        down, up = self.parameters()
        return LoRAPair(
            A=down,
            B=up,
            name=f"{prefix}.{self.name}",
            input_module=self,
            output_module=self.up,
        )


DISTINCT_ROWS = 512


@dataclass(frozen=True)
class Traffic:
    """What enters and leaves a decoder layer: its distinct inputs, the gradient of each output."""

    inputs: list[Tensor]
    output_gradients: list[Tensor]


def make_traffic(
    model: Model, tokens: int, device: str, dtype: torch.dtype, seed: int = 0
) -> Traffic:
    """Gaussian activations whose features differ in scale by a factor of 10, and gradients.

    The numbers are drawn on the CPU, the same on every device, and repeated where there are more
    rows than :data:`DISTINCT_ROWS`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, scale: Tensor | float) -> Tensor:
        rows = torch.randn(min(tokens, DISTINCT_ROWS), size, generator=generator) * scale
        rows = rows.to(device, dtype)
        return rows.repeat(-(-tokens // len(rows)), 1)[:tokens].contiguous()

    return Traffic(
        [draw(n, torch.logspace(-1, 0, n)) for n in model.inputs()],
        [draw(linear.out_features, 1 / tokens) for linear in model.linears()],
    )


class AdapterStack(nn.Module):
    """The adapters of some decoder layers.

    Args:
        model: Sizes.
        rank: Adapter rank.
        layers: How many decoder layers.
        seed: Decides the weights; B is not zero, as in the middle of a training.
    """

    def __init__(self, model: Model, rank: int, layers: int, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(Adapter(shape, rank) for shape in model.linears()) for _ in range(layers)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for adapter in self.adapters():
                for factor, size in ((adapter.down.weight, 1.0), (adapter.up.weight, 0.1)):
                    factor.normal_(std=size * factor.shape[1] ** -0.5, generator=generator)

    def adapters(self) -> list[Adapter]:
        """All adapters, layer by layer."""
        return [m for m in self.modules() if isinstance(m, Adapter)]

    def pairs(self) -> list[LoRAPair]:
        """All adapters as pairs."""
        return [
            adapter.pair(f"layer{index}")
            for index, layer in enumerate(self.layers)
            for adapter in layer.modules()
            if isinstance(adapter, Adapter)
        ]

    def forward_backward(self, traffic: Traffic) -> None:
        """Accumulate the gradients of all factors; the inputs' gradients are computed as well.

        Layer by layer, so that only one layer's activations are held.
        """
        mixed = traffic.inputs[0].dtype != self.adapters()[0].up.weight.dtype
        for layer in self.layers:
            # Tensors of their own in every layer: what is the same tensor counts as one input.
            inputs = [x.detach().requires_grad_() for x in traffic.inputs]
            with torch.autocast(inputs[0].device.type, inputs[0].dtype, enabled=mixed):
                outputs = _outputs(layer, inputs)
            torch.autograd.backward(outputs, traffic.output_gradients)


def _outputs(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        adapter(inputs[adapter.input_index])
        for adapter in layer.modules()
        if isinstance(adapter, Adapter)
    ]
