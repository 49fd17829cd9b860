"""Jacobi's method against LAPACK."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.initialisation.jacobi import jacobi_eigenpairs
from tests.strategies import gaussian, generator, orthogonal, relative_error, seeds


def check(matrix: Tensor, tolerance: float = 1e-7) -> None:
    values, vectors = jacobi_eigenpairs(matrix)
    expected = torch.linalg.eigvalsh(matrix).flip(-1)
    largest = expected.abs().amax(-1, keepdim=True)
    assert bool(((values - expected).abs() <= tolerance * largest + 1e-300).all())
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64)
    assert float((vectors.mT @ vectors - eye).abs().max()) < 1e-12
    error = (vectors * values.unsqueeze(-2)) @ vectors.mT - matrix
    assert bool((error.abs().amax((-2, -1)) <= tolerance * largest.squeeze(-1) + 1e-300).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), seeds, st.sampled_from([1e-30, 1.0, 1e30]))
def test_random_matrices_of_any_rank(size: int, rank: int, seed: int, scale: float) -> None:
    root = gaussian(generator(seed), 2, size, rank)
    check(scale * root @ root.mT)


@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("decay", [0.0, 1e-2, 1e-8])
def test_sizes_of_sketches_with_graded_spectra(size: int, decay: float) -> None:
    vectors = orthogonal(generator(0), size)
    values = torch.linspace(0, 1, size, dtype=torch.float64)
    check((vectors * (decay**values if decay else 1.0 - values)) @ vectors.mT)


def test_multiplicities() -> None:
    basis = orthogonal(generator(0), 20)[:, :5]
    check(basis @ basis.mT)
    check(torch.eye(7, dtype=torch.float64))
    check(torch.zeros(3, 3, dtype=torch.float64))


def test_matrices_of_a_stack_do_not_touch_each_other() -> None:
    root = gaussian(generator(0), 3, 6, 6)
    stack = root @ root.mT
    expected = jacobi_eigenpairs(stack)
    stack[1, 2, 2] = torch.nan
    values, vectors = jacobi_eigenpairs(stack)
    assert relative_error(values[::2], expected[0][::2]) == 0
    assert relative_error(vectors[::2], expected[1][::2]) == 0
