"""Sketches against exact singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.initialisation.sketch import (
    GradientSketch,
    TestMatrices,
    right_vectors,
    sketch_sizes,
    svd_of_sketches,
    total_energy,
)
from cg_optim.whitening import MatrixWhitening
from tests.strategies import gaussian, generator, orthogonal, relative_error, seeds, sizes

LIKE = torch.zeros((), dtype=torch.float64)


def with_spectrum(seed: int, values: Tensor, m: int, n: int) -> Tensor:
    source = generator(seed)
    left, right = orthogonal(source, m), orthogonal(source, n)
    return (left[:, : len(values)] * values) @ right[: len(values)]


def sketched(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``M Omega``, ``Psi^T M`` and ``Psi``."""
    m, n = matrix.shape
    k, size = sketch_sizes(rank, m, n)
    tests = TestMatrices(seed)
    omega, psi = tests.get(n, k, LIKE), tests.get(m, size, LIKE, stream=1)
    return matrix @ omega, psi.mT @ matrix, psi


@given(seed=seeds, m=sizes, n=sizes, rank=sizes, data=st.data())
def test_a_matrix_no_larger_than_the_sketch_is_decomposed_exactly(
    seed: int, m: int, n: int, rank: int, data: st.DataObject
) -> None:
    true_rank = data.draw(st.integers(1, min(m, n)))
    rank = min(rank, m, n)
    matrix = gaussian(generator(seed), m, true_rank) @ gaussian(generator(seed + 1), true_rank, n)
    if sketch_sizes(rank, m, n)[0] < true_rank:
        return
    left, values, right = svd_of_sketches(*sketched(matrix, rank, seed))
    assert relative_error((left * values) @ right.mT, matrix) < 1e-6
    exact = torch.linalg.svdvals(matrix)[: len(values)]
    torch.testing.assert_close(values[:true_rank], exact[:true_rank], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_little_is_lost_against_the_exact_decomposition(rank: int, decay: float) -> None:
    """Spectra ``i^-decay``: the slower the decay, the larger the best error is already."""
    values = torch.arange(1.0, 101.0, dtype=torch.float64) ** -decay
    matrix = with_spectrum(0, values, 100, 160)
    best = float(values[rank:].square().sum().sqrt())
    for seed in range(5):
        left, kept, right = svd_of_sketches(*sketched(matrix, rank, seed))
        approximation = (left[:, :rank] * kept[:rank]) @ right[:, :rank].mT
        # Tropp et al. 2017, Thm. 4.3 and truncation, with their factors for k = 2 r.
        assert float((matrix - approximation).norm()) < 3.5 * best
        # The subspace alone, which is what A takes, is much nearer to the best one.
        rows = right[:, :rank]
        outside = float((matrix - matrix @ rows @ rows.mT).norm())
        assert outside < 1.35 * best


def test_one_side_is_enough_for_the_row_space() -> None:
    values = torch.arange(1.0, 61.0, dtype=torch.float64) ** -1
    matrix = with_spectrum(3, values, 60, 80)
    _, corange, _ = sketched(matrix, 8)
    rows = right_vectors(corange)[:, :8]
    best = float(values[8:].square().sum().sqrt())
    assert float((matrix - matrix @ rows @ rows.mT).norm()) < 1.35 * best


def test_the_energy_is_estimated_without_bias() -> None:
    matrix = with_spectrum(0, torch.logspace(0, -2, 40, dtype=torch.float64), 40, 50)
    estimates = [float(total_energy(sketched(matrix, 4, seed)[1])) for seed in range(200)]
    mean = sum(estimates) / len(estimates)
    spread = torch.tensor(estimates).std() / len(estimates) ** 0.5
    assert abs(mean - float(matrix.square().sum())) < 4 * float(spread)
    small = with_spectrum(0, torch.ones(5, dtype=torch.float64), 5, 7)
    torch.testing.assert_close(total_energy(sketched(small, 4)[1]), small.square().sum())


def test_sums_over_batches_are_sketches_of_the_whole_gradient() -> None:
    source = generator(0)
    x, d = gaussian(source, 30, 7), gaussian(source, 30, 5)
    input_test, psi, k_s = gaussian(source, 7, 3), gaussian(source, 5, 4), gaussian(source, 5, 5)
    sketch = GradientSketch(input_test, MatrixWhitening(k_s), psi)
    for part in (slice(0, 1), slice(1, 20), slice(20, 30)):
        sketch.add(x[part], d[part])
    torch.testing.assert_close(sketch.range, d.mT @ x @ input_test)
    torch.testing.assert_close(sketch.corange, (k_s @ psi).mT @ d.mT @ x)


def test_test_matrices_are_scaled_orthogonal_and_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = TestMatrices(5).get(20, 6, LIKE)
    torch.testing.assert_close(first.mT @ first, 20 * torch.eye(6, dtype=torch.float64))
    torch.rand(3)
    assert torch.equal(first, TestMatrices(5).get(20, 6, LIKE))
    assert not torch.allclose(first, TestMatrices(6).get(20, 6, LIKE))
    assert not torch.allclose(first, TestMatrices(5).get(20, 6, LIKE, stream=1))
    torch.set_rng_state(state)
    TestMatrices(5).get(20, 6, LIKE)
    assert torch.equal(state, torch.get_rng_state())
