"""LoRA layers as people write them by hand, and what must hold of a pair found in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cg_optim.discovery import Discovery
from cg_optim.pairs import LoRAPair, check_unique

N, M, R = 6, 10, 2  # input size, output size, rank of the layers below


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def frozen_linear(n: int = N, m: int = M) -> nn.Linear:
    return nn.Linear(n, m).requires_grad_(False)


def check_product(pair: LoRAPair, layer: Callable[[Tensor], Tensor], n: int = N) -> None:
    """The pair is what the layer computes: without B, ``scaling * B A x`` is missing."""
    x = torch.randn(5, n)
    with torch.no_grad():
        a_matrix, b_matrix = pair.as_matrices(pair.A, pair.B)
        expected = pair.scaling * x @ a_matrix.T @ b_matrix.T
        output = layer(x)
        saved = pair.B.clone()
        pair.B.zero_()
        without = layer(x)
        pair.B.copy_(saved)
    assert expected.abs().max() > 0
    torch.testing.assert_close(output - without, expected)


def check_hooks(pair: LoRAPair, run: Callable[[], Tensor]) -> None:
    """Gradients follow from x and the output's gradient as the pair's modules see them."""
    assert pair.input_module is not None
    assert pair.output_module is not None
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def see_output(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(gradients.append)

    handles = [
        pair.input_module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        pair.output_module.register_forward_hook(see_output),
    ]
    run().square().sum().backward()
    for handle in handles:
        handle.remove()
    assert pair.A.grad is not None
    assert pair.B.grad is not None
    (x,) = inputs
    (g,) = gradients
    assert x.shape[-1] == pair.in_features
    assert g.shape[-1] == pair.out_features
    x, g = x.reshape(-1, pair.in_features), g.reshape(-1, pair.out_features)
    # The gradient of B's own output already contains the scaling.
    on_layer = getattr(pair.output_module, "weight", None) is not pair.B
    factor = pair.scaling if on_layer else 1.0
    a_matrix, b_matrix = pair.as_matrices(pair.A.detach(), pair.B.detach())
    a_gradient, b_gradient = pair.as_matrices(pair.A.grad, pair.B.grad)
    tolerance: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(b_gradient, factor * g.T @ (x @ a_matrix.T), **tolerance)
    torch.testing.assert_close(a_gradient, factor * (g @ b_matrix).T @ x, **tolerance)


def only_pair(found: Discovery) -> LoRAPair:
    assert found.left_out == {}
    (pair,) = found.pairs
    check_unique(list(found.pairs))
    return pair


class Stack(nn.Module):
    """A model of one or more layers, so that their names are not empty."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# ----------------------------------------------------------------- hand-written layers


class OnSubclass(nn.Linear):
    """As in loralib: the layer is the base, its adapter are bare parameters."""

    def __init__(self) -> None:
        super().__init__(N, M)
        self.weight.requires_grad_(False)
        self.lora_A = parameter(R, N)
        self.lora_B = parameter(M, R)
        self.scaling = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


class Wrapping(nn.Module):
    """A wrapper around a base, transposed parameters, alpha over rank, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen_linear()
        self.dropout = nn.Dropout(0.0)
        self.lora_a = parameter(N, R)
        self.lora_b = parameter(R, M)
        self.alpha, self.rank = 8, R

    def forward(self, x: Tensor) -> Tensor:
        update = self.dropout(x) @ self.lora_a @ self.lora_b
        return self.linear(x) + update * (self.alpha / self.rank)


class Generic(nn.Module):
    """The names A and B and nothing but the base to say that it is LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = frozen_linear()
        self.A = parameter(R, N)
        self.B = parameter(M, R)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class GenericModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = frozen_linear()
        self.matrix_A = nn.Linear(N, R, bias=False)
        self.matrix_B = nn.Linear(R, M, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.matrix_B(self.matrix_A(x))


class Swapped(nn.Module):
    """``W + A B``: the parameter called A is the up projection."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen_linear()
        self.lora_A = parameter(M, R)
        self.lora_B = parameter(R, N)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight + self.lora_A @ self.lora_B
        return functional.linear(x, weight, self.linear.bias)


class DownUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen_linear()
        self.lora_down = nn.Linear(N, R, bias=False)
        self.lora_up = nn.Linear(R, M, bias=False)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora_up(self.lora_down(x)) * self.scale


class TorchTune(nn.Module):
    """Own weight, in_dim and out_dim, factors as modules, lora_alpha by the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.in_dim, self.out_dim, self.rank, self.alpha = N, M, R, 6.0
        self.weight = nn.Parameter(torch.randn(M, N), requires_grad=False)
        self.dropout = nn.Identity()
        self.lora_a = nn.Linear(N, R, bias=False)
        self.lora_b = nn.Linear(R, M, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_b(self.lora_a(self.dropout(x)))
        return functional.linear(x, self.weight) + self.alpha / self.rank * update


class LoRALayer(nn.Module):
    """The adapter alone, without a trace of the sizes of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.A = parameter(N, R)
        self.B = parameter(R, M)
        self.alpha = 4.0

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)


class AroundLoRALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen_linear()
        self.lora = LoRALayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class LoRALinearLayer(nn.Module):
    """As in diffusers: ``down`` and ``up`` in a class that says what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = N, M
        self.down = nn.Linear(N, R, bias=False)
        self.up = nn.Linear(R, M, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class PackedBase(nn.Module):
    """As a quantized linear: sizes are attributes, the weight is packed integers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = N, M
        packed = torch.zeros(N * M // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], M)


class OnPackedBase(Generic):
    def __init__(self) -> None:
        super().__init__()
        self.base = PackedBase()


class Conv1D(nn.Module):
    """As in transformers: the weight is stored the other way round."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.nx, self.nf = n, m
        self.weight = parameter(n, m)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Conv1DFactors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = frozen_linear()
        self.lora_A = Conv1D(N, R)
        self.lora_B = Conv1D(R, M)
        self.register_buffer("lora_scale", torch.tensor(2.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.lora_scale
