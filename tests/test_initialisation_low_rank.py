"""The best low-rank Newton step against what a dense computation gives, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.initialisation.low_rank import (
    best_low_rank_step,
    newton_step,
    row_space,
    with_norm_of,
)
from cg_optim.linalg import damped_cholesky
from cg_optim.whitening import CholeskyWhitening
from tests.strategies import gaussian, generator, relative_error, seeds, semidefinite, sizes

#: Conditions with which float64 keeps seven digits behind both sides.
mild = st.floats(0, 4).map(lambda power: 10.0**power)


def problem(seed: int, m: int, n: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """``G``, ``X`` and ``S``."""
    source = generator(seed)
    x, s = (semidefinite(source, size, condition=condition) for size in (n, m))
    return gaussian(source, m, n), x, s


def distance(step: Tensor, target: Tensor, x: Tensor, s: Tensor) -> float:
    """``|S^(1/2) (step - target) X^(1/2)|_F^2``."""
    difference = step - target
    return float(torch.trace(difference.mT @ s @ difference @ x))


def root_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT


@given(seed=seeds, m=sizes, n=sizes, condition=mild)
def test_the_newton_step_solves_the_normal_equations(
    seed: int, m: int, n: int, condition: float
) -> None:
    g, x, s = problem(seed, m, n, condition)
    # Rounding of the product of both sides: each has its condition.
    assert relative_error(s @ newton_step(g, x, s) @ x, -g) < 1e-12 + 1e-15 * condition**2


@given(seed=seeds, m=sizes, n=sizes, rank=sizes, condition=mild)
def test_the_best_step_is_the_truncated_svd_between_symmetric_roots(
    seed: int, m: int, n: int, rank: int, condition: float
) -> None:
    rank = min(rank, m, n)
    g, x, s = problem(seed, m, n, condition)
    (_, x_inverse), (_, s_inverse) = root_and_inverse(x), root_and_inverse(s)
    left, values, right = torch.linalg.svd(s_inverse @ g @ x_inverse, full_matrices=False)
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]
    down, up = best_low_rank_step(g, x, s, rank)
    assert relative_error(up @ down, -s_inverse @ kept @ x_inverse) < 1e-8


@given(seed=seeds, m=sizes, n=sizes, rank=sizes, condition=mild, reach=st.floats(-6, 1))
def test_no_competitor_of_that_rank_is_nearer(
    seed: int, m: int, n: int, rank: int, condition: float, reach: float
) -> None:
    rank = min(rank, m, n)
    g, x, s = problem(seed, m, n, condition)
    target = newton_step(g, x, s)
    down, up = best_low_rank_step(g, x, s, rank)
    best = distance(up @ down, target, x, s)
    source = generator(seed + 1)
    scale = 10.0**reach
    near = (up + scale * gaussian(source, m, rank)) @ (down + scale * gaussian(source, rank, n))
    far = gaussian(source, m, rank) @ gaussian(source, rank, n)
    fitted = far * float((far * target).sum() / far.square().sum())
    size = distance(torch.zeros_like(target), target, x, s)
    for competitor in (near, far, fitted, torch.zeros_like(target)):
        assert best <= distance(competitor, target, x, s) + 1e-9 * size


@given(seed=seeds, m=sizes, n=sizes, condition=mild)
def test_full_rank_gives_the_newton_step(seed: int, m: int, n: int, condition: float) -> None:
    g, x, s = problem(seed, m, n, condition)
    down, up = best_low_rank_step(g, x, s, min(m, n))
    assert relative_error(up @ down, newton_step(g, x, s)) < 1e-8


@given(seed=seeds, m=sizes, n=sizes, rank=sizes)
def test_the_factors_are_balanced_in_the_metric_of_the_curvature(
    seed: int, m: int, n: int, rank: int
) -> None:
    rank = min(rank, m, n)
    g, x, s = problem(seed, m, n, 100.0)
    down, up = best_low_rank_step(g, x, s, rank)
    below, above = down @ x @ down.mT, up.mT @ s @ up
    assert relative_error(below, above) < 1e-8
    off_diagonal = below - torch.diag(below.diagonal())
    assert float(off_diagonal.abs().max()) < 1e-8 * float(below.abs().max())


def test_the_rows_are_orthonormal_in_the_metric_of_the_inputs() -> None:
    _, x, _ = problem(0, 5, 9, 100.0)
    right = torch.linalg.qr(gaussian(generator(1), 9, 9)).Q
    down = row_space(right, 4, CholeskyWhitening(damped_cholesky(x, 0.0).factor))
    torch.testing.assert_close(down @ x @ down.mT, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_length_of_the_old_factor_is_kept(scale: float) -> None:
    source = generator(0)
    old, new = gaussian(source, 3, 7), scale * gaussian(source, 3, 7)
    rescaled = with_norm_of(old, new)
    torch.testing.assert_close(rescaled.norm(), old.norm())
    torch.testing.assert_close(rescaled / rescaled.norm(), new / new.norm())
