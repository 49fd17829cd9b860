"""Which pairs are found in layers written by hand, and that their hooks see the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cg_optim.discovery import Discovery, find_lora_pairs
from cg_optim.pairs import check_unique
from tests.lora_layers import (
    AroundLoRALayer,
    Conv1DFactors,
    DownUp,
    Generic,
    GenericModules,
    LoRALinearLayer,
    M,
    N,
    OnPackedBase,
    OnSubclass,
    R,
    Stack,
    Swapped,
    TorchTune,
    Wrapping,
    check_hooks,
    check_product,
    frozen_linear,
    only_pair,
    parameter,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass
class Expected:
    layer: type[nn.Module]
    scaling: float = 1.0
    transposed: bool = False
    kind: str = "custom"
    name: str = "layers.0"
    input: str = ""  # path of the input module below the layer
    output: str = ""


HANDWRITTEN = {
    "parameters on a Linear": Expected(OnSubclass, 3.0),
    "parameters beside a Linear": Expected(Wrapping, 4.0, transposed=True),
    "A and B beside a Linear": Expected(Generic),
    "A and B beside a quantized Linear": Expected(OnPackedBase),
    "modules of a generic name": Expected(GenericModules, output="matrix_B"),
    "A is the up projection": Expected(Swapped),
    "lora_down and lora_up": Expected(DownUp, 0.5, output="lora_up"),
    "torchtune": Expected(TorchTune, 3.0, output="lora_b"),
    "an adapter module": Expected(
        AroundLoRALayer, 4.0, transposed=True, name="layers.0.lora", input="lora", output="lora"
    ),
    "down and up in a LoRA class": Expected(LoRALinearLayer, output="up"),
    "factors stored as Conv1D": Expected(Conv1DFactors, 2.5, transposed=True, output="lora_B"),
}


@pytest.mark.parametrize("expected", HANDWRITTEN.values(), ids=HANDWRITTEN.keys())
def test_handwritten(expected: Expected) -> None:
    layer = expected.layer()
    pair = only_pair(find_lora_pairs(Stack(layer)))
    assert (pair.in_features, pair.out_features, pair.rank) == (N, M, R)
    assert pair.name == expected.name
    assert pair.scaling == expected.scaling
    assert pair.transposed is expected.transposed
    assert pair.kind.startswith("custom.")
    assert pair.note == ""
    assert pair.input_module is layer.get_submodule(expected.input)
    assert pair.output_module is layer.get_submodule(expected.output)
    check_product(pair, layer)
    check_hooks(pair, lambda: layer(torch.randn(3, 4, N)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    rank=st.integers(1, 4),
    transposed=st.booleans(),
)
def test_orientation_is_found_whatever_the_sizes(
    n: int, m: int, rank: int, transposed: bool
) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = frozen_linear(n, m)
            self.lora_A = parameter(n, rank) if transposed else parameter(rank, n)
            self.lora_B = parameter(rank, m) if transposed else parameter(m, rank)

        def forward(self, x: Tensor) -> Tensor:
            product = self.lora_A @ self.lora_B if transposed else (self.lora_B @ self.lora_A).T
            return self.base(x) + x @ product

    assume(not n == m == rank)  # all square: no shape tells A x from x A
    layer = Layer()
    pair = only_pair(find_lora_pairs(layer))
    assert (pair.in_features, pair.out_features, pair.rank) == (n, m, rank)
    check_product(pair, layer, n)


# ------------------------------------------------------------- several pairs in a module


class FusedModules(nn.Module):
    """One fused projection, a low-rank update for q and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = frozen_linear(N, 3 * M)
        for part in "qv":
            self.add_module(f"lora_A_{part}", nn.Linear(N, R, bias=False))
            self.add_module(f"lora_B_{part}", nn.Linear(R, M, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q + self.lora_B_q(self.lora_A_q(x))
        return torch.cat([q, k, v + self.lora_B_v(self.lora_A_v(x))], -1)


def test_pairs_of_a_fused_projection_share_its_input() -> None:
    layer = FusedModules()
    found = find_lora_pairs(Stack(layer))
    check_unique(list(found.pairs))
    assert [pair.name for pair in found.pairs] == ["layers.0 (lora_A_q)", "layers.0 (lora_A_v)"]
    for pair, part in zip(found.pairs, "qv", strict=True):
        assert pair.input_module is layer
        assert pair.output_module is layer.get_submodule(f"lora_B_{part}")
        layer.zero_grad()
        check_hooks(pair, lambda: layer(torch.randn(4, N)))


class FusedParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = frozen_linear(N, 3 * M)
        for part in "qv":
            self.register_parameter(f"{part}_lora_A", parameter(R, N))
            self.register_parameter(f"{part}_lora_B", parameter(M, R))


class Attention(nn.Module):
    """A block whose input is not the input of its output projection."""

    def __init__(self, *, modules: bool) -> None:
        super().__init__()
        self.scale = 0.25  # of the attention scores
        self.value = frozen_linear(N, N)
        self.out = frozen_linear(N, N)
        self.lora_A_out = nn.Linear(N, R, bias=False) if modules else parameter(R, N)
        self.lora_B_out = nn.Linear(R, N, bias=False) if modules else parameter(N, R)

    def forward(self, x: Tensor) -> Tensor:
        x = self.value(x).tanh()
        return self.out(x) + self.lora_B_out(self.lora_A_out(x))


@pytest.mark.parametrize("layer", [FusedParameters(), Attention(modules=False)])
def test_parameters_of_an_unclear_layer_are_not_observed(layer: nn.Module) -> None:
    found = find_lora_pairs(layer)
    assert found.pairs
    for pair in found.pairs:
        assert not pair.observed
        assert "LoRAPair" in pair.note
        assert pair.scaling == 1.0


def test_modules_of_an_unclear_layer_are_observed_at_a() -> None:
    layer = Attention(modules=True)
    pair = only_pair(find_lora_pairs(layer))
    assert pair.input_module is layer.lora_A_out
    assert pair.scaling == 1.0
    check_hooks(pair, lambda: layer(torch.randn(4, N)))


class Routed(nn.Module):
    """Several adapters in lists, each for a part of the tokens."""

    def __init__(self, *, modules: bool) -> None:
        super().__init__()
        self.base = frozen_linear()
        if modules:
            self.lora_A = nn.ModuleList(nn.Linear(N, R, bias=False) for _ in range(2))
            self.lora_B = nn.ModuleList(nn.Linear(R, M, bias=False) for _ in range(2))
        else:
            self.lora_A = nn.ParameterList(parameter(R, N) for _ in range(2))
            self.lora_B = nn.ParameterList(parameter(M, R) for _ in range(2))


def test_lists_pair_by_key() -> None:
    layer = Routed(modules=True)
    found = find_lora_pairs(layer)
    assert [pair.name for pair in found.pairs] == ["Routed (lora_A.0)", "Routed (lora_A.1)"]
    for index, pair in enumerate(found.pairs):
        assert pair.B is layer.lora_B[index].weight
        assert pair.input_module is layer.lora_A[index]
    for index, pair in enumerate(find_lora_pairs(layer := Routed(modules=False)).pairs):
        assert pair.B is layer.lora_B[index]
        assert not pair.observed


# --------------------------------------------------------------------- parametrizations


class LowRankUpdate(nn.Module):
    def __init__(self, n: int, m: int, *, swapped: bool = False) -> None:
        super().__init__()
        self.lora_A = parameter(m, R) if swapped else parameter(R, n)
        self.lora_B = parameter(R, n) if swapped else parameter(m, R)
        self.lora_alpha, self.rank, self.swapped = 3.0, R, swapped

    def forward(self, weight: Tensor) -> Tensor:
        product = self.lora_A @ self.lora_B if self.swapped else self.lora_B @ self.lora_A
        return weight + product.view(weight.shape) * (self.lora_alpha / self.rank)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("m", [M, N])
def test_parametrized_linear(swapped: bool, m: int) -> None:
    linear = frozen_linear(N, m)
    parametrize.register_parametrization(linear, "weight", LowRankUpdate(N, m, swapped=swapped))
    pair = only_pair(find_lora_pairs(Stack(linear)))
    assert (pair.name, pair.kind, pair.scaling) == ("layers.0", "parametrize.Linear", 1.5)
    assert pair.input_module is linear
    assert pair.output_module is linear
    check_product(pair, linear)
    check_hooks(pair, lambda: linear(torch.randn(4, N)))


def test_parametrized_convolution_and_embedding() -> None:
    convolution, embedding = nn.Conv2d(N, M, 3), nn.Embedding(M, N)
    for layer, n in ((convolution, 9 * N), (embedding, N)):
        layer.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(n, M))
    pair = only_pair(find_lora_pairs(convolution))
    assert not pair.observed
    assert pair.note.startswith("convolution")
    found = find_lora_pairs(embedding)
    assert found.pairs == ()
    assert all(reason.startswith("embedding") for reason in found.left_out.values())
    assert len(found.left_out) == 2


# -------------------------------------------------------------------------- no pairs here


class Mlp(nn.Module):
    """Low-rank by its shapes, with a nonlinearity inside."""

    def __init__(self, down: str, up: str) -> None:
        super().__init__()
        self.base = frozen_linear()
        self.add_module(down, nn.Linear(N, R))
        self.add_module(up, nn.Linear(R, M))


class LatentAttention(nn.Module):
    """Names with a and b that are two layers of their own (with a norm between them)."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = frozen_linear(N, M)
        self.q_a_proj = nn.Linear(N, R, bias=False)
        self.q_b_proj = nn.Linear(R, M, bias=False)


class StateSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = parameter(N, N)
        self.B = parameter(N, R)


NO_LORA = {
    "a plain model": nn.Sequential(nn.Linear(N, M), nn.LayerNorm(M), nn.Embedding(N, M)),
    "bottleneck adapter": Mlp("adapter_down", "adapter_up"),
    "down and up": Mlp("down", "up"),
    "gated MLP": Mlp("down_proj", "up_proj"),
    "latent attention": LatentAttention(),
    "state space": StateSpace(),
    "nothing": nn.Identity(),
}


@pytest.mark.parametrize("model", NO_LORA.values(), ids=NO_LORA.keys())
def test_models_without_lora(model: nn.Module) -> None:
    assert find_lora_pairs(model) == Discovery((), {})


def with_attributes(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


LEFT_OUT = {
    "A alone": (lambda: with_attributes(lora_A=parameter(R, N)), {"lora_A": "unpaired A"}),
    "B alone": (
        lambda: with_attributes(lora_B=nn.Linear(R, M)),  # its bias needs no explanation
        {"lora_B.weight": "unpaired B"},
    ),
    "one A for two B": (
        lambda: with_attributes(
            lora_A=parameter(R, N), lora_B_q=parameter(M, R), lora_B_v=parameter(M, R)
        ),
        {"lora_A": "unpaired A", "lora_B_q": "unpaired B", "lora_B_v": "unpaired B"},
    ),
    "vectors": (
        lambda: with_attributes(lora_A=parameter(N), lora_B=parameter(M)),
        {"lora_A": "a vector", "lora_B": "a vector"},
    ),
    "stacked experts": (
        lambda: with_attributes(lora_A=parameter(4, R, N), lora_B=parameter(4, M, R)),
        {"lora_A": "more than two dimensions", "lora_B": "more than two dimensions"},
    ),
    "embedding": (
        lambda: with_attributes(lora_A=nn.Embedding(M, R), lora_B=nn.Linear(R, N, bias=False)),
        {"lora_A.weight": "embedding", "lora_B.weight": "embedding"},
    ),
    "grouped convolution": (
        lambda: with_attributes(lora_A=nn.Conv1d(4, 4, 3), lora_B=nn.Conv1d(4, 4, 1, groups=2)),
        {"lora_A.weight": "convolution whose B", "lora_B.weight": "convolution whose B"},
    ),
    "nothing says that A and B are LoRA": (
        lambda: with_attributes(A=parameter(R, N), B=parameter(M, R)),
        {"A": "A and its B could be LoRA", "B": "A and its B could be LoRA"},
    ),
}


@pytest.mark.parametrize(("build", "reasons"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_left_out(build: Callable[[], nn.Module], reasons: dict[str, str]) -> None:
    found = find_lora_pairs(build())
    assert found.pairs == ()
    assert found.left_out.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert found.left_out[name].startswith(reason)


def test_a_convolution_is_paired_but_not_observed() -> None:
    layer = with_attributes(
        lora_down=nn.Conv2d(4, R, 3, bias=False), lora_up=nn.Conv2d(R, 5, 1, bias=False)
    )
    pair = only_pair(find_lora_pairs(layer))
    assert (pair.in_features, pair.out_features, pair.rank) == (36, 5, R)
    assert pair.note == "convolution: gradient-only rule"
