"""Which pairs are found outside PEFT, and that hooks on their modules see the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from cg_optim.discovery import Discovery, find_lora_pairs
from cg_optim.errors import AdapterError, PairError
from cg_optim.pairs import LoRAPair, check_unique

N, M, R = 6, 10, 2  # input size, output size, rank of the layers below


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def frozen_linear(n: int = N, m: int = M) -> nn.Linear:
    return nn.Linear(n, m).requires_grad_(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --------------------------------------------------------------------- what is checked


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


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
def test_wrapped_models_keep_their_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Stack(OnSubclass(), nn.ReLU(), Generic()))
    names = {module: name for name, module in model.named_modules()}
    for pair in find_lora_pairs(model).pairs:
        assert pair.input_module is not None
        assert pair.name == names[pair.input_module]


def test_a_compiled_layer_is_found_once() -> None:
    assert only_pair(find_lora_pairs(Stack(torch.compile(OnSubclass())))).name  # type: ignore[arg-type]


def test_the_model_itself_may_be_the_layer() -> None:
    assert only_pair(find_lora_pairs(OnSubclass())).name == "OnSubclass"


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


# ------------------------------------------------------------------- training or not, ties


def test_half_frozen_pairs_are_left_out() -> None:
    layer = OnSubclass()
    layer.lora_A.requires_grad_(False)
    assert find_lora_pairs(Stack(layer)) == Discovery(
        (), {"layers.0.lora_B": "its partner layers.0.lora_A is frozen"}
    )


def test_refuses_a_model_whose_adapters_are_all_frozen() -> None:
    model = Stack(OnSubclass(), Generic())
    model.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"layers\.0\.lora_A.*frozen.*is_trainable=True"):
        find_lora_pairs(model)
    model.layers[1].requires_grad_(True)
    assert only_pair(find_lora_pairs(model)).name == "layers.1"


def test_a_layer_used_twice_is_found_once() -> None:
    layer = OnSubclass()
    pair = only_pair(find_lora_pairs(Stack(layer, nn.ReLU(), layer)))
    assert (pair.name, pair.observed) == ("layers.0", True)


def test_tied_pairs_are_found_once_and_not_observed() -> None:
    first, second = OnSubclass(), OnSubclass()
    second.lora_A, second.lora_B = first.lora_A, first.lora_B
    pair = only_pair(find_lora_pairs(Stack(first, second)))
    assert pair.name == "layers.0"
    assert not pair.observed
    assert "tied" in pair.note


@pytest.mark.parametrize("by_view", [False, True])
def test_factors_of_several_pairs_are_left_out(by_view: bool) -> None:
    first, second, third = OnSubclass(), OnSubclass(), OnSubclass()
    second.lora_A = nn.Parameter(first.lora_A.detach()) if by_view else first.lora_A
    found = find_lora_pairs(Stack(first, second, third))
    assert [pair.name for pair in found.pairs] == ["layers.2"]
    assert {"layers.0.lora_A", "layers.0.lora_B", "layers.1.lora_B"} <= found.left_out.keys()
    assert set(found.left_out.values()) == {"shared between several adapters"}


# ----------------------------------------------------------------------------- refusals


def test_refuses_ranks_that_disagree() -> None:
    layer = OnSubclass()
    layer.lora_B = parameter(M, R + 1)
    with pytest.raises(PairError, match=r"layers\.0: A \(2, 6\) has rank 2 but B \(10, 3\)"):
        find_lora_pairs(Stack(layer))


def test_refuses_a_partitioned_factor() -> None:
    layer = OnSubclass()
    layer.lora_A = nn.Parameter(torch.empty(0))
    with pytest.raises(AdapterError, match=r"layers\.0\.lora_A.*ZeRO-3"):
        find_lora_pairs(Stack(layer))


def test_refuses_a_flat_parameter_with_lora_inside() -> None:
    model = nn.Module()
    model._flat_param = parameter(40)
    model._flat_param._fqns = ("weight", "layers.0.lora_A")  # as FSDP1 records its content
    with pytest.raises(AdapterError, match=r"layers\.0\.lora_A.*FSDP1"):
        find_lora_pairs(model)


# ------------------------------------------------------------------------------- loralib


def test_loralib_linear() -> None:
    loralib = pytest.importorskip("loralib")
    layer = loralib.Linear(N, M, r=R, lora_alpha=5, fan_in_fan_out=True)
    nn.init.normal_(layer.lora_B)
    pair = only_pair(find_lora_pairs(Stack(layer)))
    assert (pair.name, pair.kind, pair.scaling) == ("layers.0", "loralib.Linear", 2.5)
    assert pair.input_module is layer
    assert pair.output_module is layer
    check_product(pair, layer)
    check_hooks(pair, lambda: layer(torch.randn(3, 4, N)))


def test_loralib_merges_in_eval_mode() -> None:
    loralib = pytest.importorskip("loralib")
    model = Stack(loralib.Linear(N, M, r=R)).eval()
    with pytest.raises(AdapterError, match=r"layers\.0: .*merged.*model\.train\(\)"):
        find_lora_pairs(model)
    assert find_lora_pairs(model.train()).pairs


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("MergedLinear", {"enable_lora": [True, False, True]}, "fused projections"),
        ("MergedLinear", {"enable_lora": [True, True, True]}, "fused projections"),
        ("Embedding", {}, "embedding adapter"),
    ],
)
def test_loralib_left_out(name: str, arguments: dict[str, Any], reason: str) -> None:
    loralib = pytest.importorskip("loralib")
    found = find_lora_pairs(getattr(loralib, name)(N, 3 * M, r=R, **arguments))
    assert found.pairs == ()
    assert found.left_out.keys() == {"lora_A", "lora_B"}
    assert all(text.startswith(reason) for text in found.left_out.values())


@pytest.mark.parametrize(
    ("name", "arguments", "note"),
    [
        ("MergedLinear", {"enable_lora": [False, True, False]}, "in a layer not known"),
        ("Conv2d", {"kernel_size": 3}, "convolution"),
    ],
)
def test_loralib_not_observed(name: str, arguments: dict[str, Any], note: str) -> None:
    loralib = pytest.importorskip("loralib")
    layer = getattr(loralib, name)(N, 3 * M, r=R, lora_alpha=3, **arguments)
    pair = only_pair(find_lora_pairs(layer))
    assert not pair.observed
    assert pair.note.startswith(note)
    assert pair.scaling == 1.5
