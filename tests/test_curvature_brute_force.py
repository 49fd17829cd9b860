"""Sides and scales of the Kronecker factors against per-sample gradients, in float64.

Every shape fits when two factors are swapped, so only numbers can tell.  Inputs and output
gradients are fully crossed (every ``x_i`` with every ``g_j``): then the Kronecker form is
exact and nothing but the sides is left to be wrong.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cg_optim.alignment import Factors, aligned_step
from cg_optim.curvature_store import CurvatureStore
from cg_optim.hooks import CurvatureObserver
from cg_optim.input_curvature import DenseCurvature
from cg_optim.pairs import LoRAPair
from tests.strategies import gaussian, generator, relative_error

SCALING = 1.5
SIZES = [(5, 3, 2), (3, 5, 2), (4, 4, 2), (4, 4, 4)]  # n, m, r


class Crossed:
    """A layer ``W x + s B A x`` and the gradients of all pairs ``<g_j, y(x_i)>``."""

    def __init__(self, n: int, m: int, r: int) -> None:
        source = generator(n * 100 + m * 10 + r)
        spread = torch.logspace(-1, 1, n, dtype=torch.float64)
        self.x = gaussian(source, 12, n) * spread
        self.g = gaussian(source, 9, m) @ gaussian(source, m, m)
        self.a = gaussian(source, r, n).requires_grad_()
        self.b = gaussian(source, m, r).requires_grad_()
        down, up = [], []
        for x in self.x:
            for g in self.g:
                loss = g @ (SCALING * self.b @ (self.a @ x))
                grad_a, grad_b = torch.autograd.grad(loss, (self.a, self.b))
                down.append(grad_a.flatten())
                up.append(grad_b.flatten())
        self.down, self.up = torch.stack(down), torch.stack(up)
        self.a, self.b = self.a.detach(), self.b.detach()
        curvature = DenseCurvature(n, self.x)
        curvature.accumulate(self.x, torch.ones(len(self.x), dtype=torch.bool))
        assert curvature.update(0.95)
        self.X = curvature.gram
        self.T = SCALING**2 * self.g.mT @ self.g / len(self.g)
        self.P = self.a @ self.X @ self.a.mT
        self.Q = self.b.mT @ self.T @ self.b


def kron(left: Tensor, right: Tensor) -> Tensor:
    return torch.kron(left.contiguous(), right.contiguous())


@pytest.mark.parametrize("sizes", SIZES)
def test_fisher_of_both_factors_is_the_kronecker_product(sizes: tuple[int, int, int]) -> None:
    case = Crossed(*sizes)
    fisher_a = case.down.mT @ case.down / len(case.down)
    fisher_b = case.up.mT @ case.up / len(case.up)
    assert relative_error(kron(case.Q, case.X), fisher_a) < 1e-12
    assert relative_error(kron(case.T, case.P), fisher_b) < 1e-12
    # What a swap would give, wherever its shapes fit: far off.
    assert relative_error(kron(case.X, case.Q), fisher_a) > 0.1
    assert relative_error(kron(case.P, case.X), fisher_a) > 0.1
    assert relative_error(kron(case.P, case.T), fisher_b) > 0.1
    assert relative_error(kron(case.T, case.Q), fisher_b) > 0.1
    if sizes[0] == sizes[1]:
        assert relative_error(kron(case.Q, case.T), fisher_a) > 0.1
        assert relative_error(kron(case.X, case.P), fisher_b) > 0.1


@pytest.mark.parametrize("sizes", SIZES)
def test_block_step_solves_with_the_brute_force_fisher(sizes: tuple[int, int, int]) -> None:
    case = Crossed(*sizes)
    # Any one full gradient will do; both factors' gradients follow from it.
    full = gaussian(generator(1), sizes[1], sizes[0])
    gradients = Factors(SCALING * case.b.mT @ full, SCALING * full @ case.a.mT)
    step = aligned_step(case.X, case.T, Factors(case.a, case.b), gradients, joint=False)
    for samples, gradient, actual in zip((case.down, case.up), gradients, step, strict=True):
        fisher = samples.mT @ samples / len(samples)
        expected = -torch.linalg.solve(fisher, gradient.flatten()).reshape(gradient.shape)
        assert relative_error(actual, expected) < 1e-7
    swapped_down = -torch.linalg.solve(case.P, gradients.down) @ torch.linalg.inv(case.X)
    assert relative_error(swapped_down, step.down) > 0.1
    if sizes[0] == sizes[1]:
        swapped = aligned_step(case.T, case.X, Factors(case.a, case.b), gradients, joint=False)
        assert relative_error(swapped.down, step.down) > 0.1
        assert relative_error(swapped.up, step.up) > 0.1


# ------------------------------------------------------------------- through real hooks


class LoRALinear(nn.Module):
    def __init__(self, n: int, m: int, r: int, seed: int) -> None:
        super().__init__()
        source = generator(seed)
        self.base = nn.Linear(n, m, dtype=torch.float64).requires_grad_(False)
        self.down = nn.Linear(n, r, bias=False, dtype=torch.float64)
        self.up = nn.Linear(r, m, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.down.weight.copy_(gaussian(source, r, n))
            self.up.weight.copy_(gaussian(source, m, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALING * self.up(self.down(x))


class Attention(nn.Module):
    """q, k and v read one tensor; o reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: LoRALinear(6, 6, 2, seed) for seed, name in enumerate("qkvo")}
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.layers["q"](x) * self.layers["k"](x).tanh() + self.layers["v"](x)
        return self.layers["o"](mixed.tanh())


def collect(batches: list[tuple[Tensor, Tensor]]) -> tuple[CurvatureStore, list[Tensor]]:
    """One update from several backward passes; row weights of 0 are padding.

    Returns the store and the inputs of o, as the model computed them.
    """
    model = Attention()
    for layer in model.layers.values():
        with torch.no_grad():
            layer.base.weight.copy_(torch.eye(6))
            layer.base.bias.zero_()
    pairs = [
        LoRAPair(
            layer.down.weight,
            layer.up.weight,
            name=name,
            scaling=SCALING,
            input_module=layer,
            output_module=layer.up,
        )
        for name, layer in model.layers.items()
    ]
    store = CurvatureStore(pairs, "dense")
    observer = CurvatureObserver(pairs, store.consume, store.discard_pair)
    inner: list[Tensor] = []
    handle = model.layers["o"].register_forward_pre_hook(
        lambda _, args: inner.append(args[0].detach())
    )
    for x, weight in batches:
        (model(x).square() * weight[..., None]).sum().backward()
    observer.flush()
    assert not any(store.update().values())
    observer.remove()
    handle.remove()
    return store, inner


def gram(store: CurvatureStore, index: int) -> Tensor:
    curvature = store.of(index)
    assert isinstance(curvature, DenseCurvature)
    return curvature.gram


def data() -> tuple[Tensor, Tensor]:
    x = gaussian(generator(5), 4, 7, 6)
    weight = torch.ones(4, 7, dtype=torch.float64)
    weight[0, 4:] = weight[2, 1:] = 0
    return x, weight


def test_hooks_collect_the_mean_of_the_rows_that_count() -> None:
    x, weight = data()
    store, (inner,) = collect([(x, weight)])
    real = weight.bool()
    for index, rows in ((0, x[real]), (3, inner[real])):
        expected = sum(torch.outer(row, row) for row in rows) / len(rows)
        assert relative_error(gram(store, index), expected) < 1e-12
        with_padding = (x if index == 0 else inner).flatten(0, 1)
        polluted = with_padding.mT @ with_padding / len(with_padding)
        assert relative_error(gram(store, index), polluted) > 1e-2


def test_layers_that_read_one_tensor_share_its_curvature() -> None:
    store, _ = collect([data()])
    assert store.of(0) is store.of(1) is store.of(2)
    assert store.of(3) is not store.of(0)


def test_splitting_the_batch_and_reordering_it_change_nothing() -> None:
    x, weight = data()
    whole, _ = collect([(x, weight)])
    split, _ = collect([(x[:1], weight[:1]), (x[1:], weight[1:])])
    order = torch.randperm(7, generator=generator(0))
    shuffled, _ = collect([(x[:, order].flip(0), weight[:, order].flip(0))])
    for index in range(4):
        assert relative_error(gram(split, index), gram(whole, index)) < 1e-12
        assert relative_error(gram(shuffled, index), gram(whole, index)) < 1e-12
