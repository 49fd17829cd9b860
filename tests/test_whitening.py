"""Both whitenings are multiplications by one matrix ``K`` and by its transpose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from cg_optim.linalg import damped_cholesky
from cg_optim.whitening import CholeskyWhitening, LowRankWhitening, Whitening
from tests.strategies import (
    conditions,
    gaussian,
    generator,
    relative_error,
    seeds,
    semidefinite,
    sizes,
)

quick = settings(max_examples=30, deadline=None)


def low_rank(seed: int, size: int, count: int) -> LowRankWhitening:
    source = generator(seed)
    return LowRankWhitening(
        torch.linalg.qr(gaussian(source, 2, size, count)).Q,
        gaussian(source, 2, count, count),
        gaussian(source, 2).abs() + 0.1,
    )


def cholesky(seed: int, size: int) -> CholeskyWhitening:
    matrix = semidefinite(generator(seed), size, batch=(2,))
    return CholeskyWhitening(damped_cholesky(matrix, 0.1).factor)


@quick
@given(seeds, sizes)
def test_the_two_methods_are_transposes(seed: int, size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64).expand(2, size, size)
    rows = gaussian(generator(seed + 1), 2, 3, size)
    cases: list[Whitening] = [cholesky(seed, size), low_rank(seed, size, max(1, size // 2))]
    for whitening in cases:
        k = whitening.apply(eye)
        assert relative_error(whitening.apply(rows), rows @ k) < 1e-12
        assert relative_error(whitening.apply_transposed(rows), rows @ k.mT) < 1e-12


@quick
@given(seeds, sizes, conditions)
def test_cholesky_whitening_makes_the_matrix_white(seed: int, size: int, condition: float) -> None:
    matrix = semidefinite(generator(seed), size, condition=condition)
    factor = damped_cholesky(matrix, 0.0).factor
    whitening = CholeskyWhitening(factor)
    # K^T M K = I, with M = L L^T exactly as factorised.
    white = whitening.apply((whitening.apply(factor @ factor.mT)).mT)
    eye = torch.eye(size, dtype=torch.float64)
    assert relative_error(white, eye) < 1e-12 * condition + 1e-12


@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 1), (5, 3)])
def test_low_rank_whitening_is_its_root_inside_and_one_number_outside(
    size: int, count: int
) -> None:
    whitening = low_rank(0, size, count)
    inside = whitening.basis.mT
    assert relative_error(whitening.apply(inside), whitening.root @ inside) < 1e-12
    outside = gaussian(generator(1), 2, 3, size)
    outside = outside - outside @ whitening.basis @ whitening.basis.mT
    error = whitening.apply(outside) - whitening.outside[:, None, None] * outside
    assert float(error.abs().max()) < 1e-12
