"""Sketches against exact singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cg_optim import host
from cg_optim.initialisation.low_rank import SVD
from cg_optim.initialisation.sketch import (
    PROBES,
    Projection,
    RowSketch,
    TestMatrices,
    least_squares_together,
    right_vectors,
    right_vectors_together,
    sketch_size,
)
from cg_optim.whitening import MatrixWhitening
from tests.strategies import gaussian, generator, orthogonal, relative_error, seeds, sizes

LIKE = torch.zeros((), dtype=torch.float64)


def with_spectrum(seed: int, values: Tensor, m: int, n: int) -> Tensor:
    source = generator(seed)
    left, right = orthogonal(source, m), orthogonal(source, n)
    return (left[:, : len(values)] * values) @ right[: len(values)]


def identity(size: int) -> MatrixWhitening:
    return MatrixWhitening(torch.eye(size, dtype=torch.float64))


def decomposed(matrix: Tensor, rank: int, seed: int = 0) -> tuple[SVD, Tensor]:
    """Both passes over a matrix, a row of its factors at a time: ``D = I^T M``."""
    m, n = matrix.shape
    tests, rows = TestMatrices(seed), torch.eye(m, dtype=torch.float64)
    sketch = RowSketch(tests.get(m, sketch_size(rank, m, n), LIKE, stream=1), n)
    sketch.add(matrix, rows)
    basis = sketch.basis(identity(n))
    assert basis is not None
    projection = Projection(basis, tests.get(n, min(PROBES, n), LIKE), identity(n), m)
    projection.add(matrix, rows)
    return projection.svd(identity(m))


@given(seed=seeds, m=sizes, n=sizes, rank=sizes, data=st.data())
def test_a_matrix_no_larger_than_the_sketch_is_decomposed_exactly(
    seed: int, m: int, n: int, rank: int, data: st.DataObject
) -> None:
    true_rank = data.draw(st.integers(1, min(m, n)))
    rank = min(rank, m, n)
    matrix = gaussian(generator(seed), m, true_rank) @ gaussian(generator(seed + 1), true_rank, n)
    if sketch_size(rank, m, n) < true_rank:
        return
    (left, values, right), energy = decomposed(matrix, rank, seed)
    assert relative_error((left * values) @ right.mT, matrix) < 1e-6
    exact = torch.linalg.svdvals(matrix)[: len(values)]
    torch.testing.assert_close(values[:true_rank], exact[:true_rank], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(energy, matrix.square().sum())


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_little_is_lost_against_the_exact_decomposition(rank: int, decay: float) -> None:
    """Spectra ``i^-decay``: the slower the decay, the larger the best error is already."""
    values = torch.arange(1.0, 101.0, dtype=torch.float64) ** -decay
    matrix = with_spectrum(0, values, 100, 160)
    best = float(values[rank:].square().sum().sqrt())
    for seed in range(5):
        left, kept, right = decomposed(matrix, rank, seed)[0]
        approximation = (left[:, :rank] * kept[:rank]) @ right[:, :rank].mT
        # Halko et al. 2011, Thm. 10.5 allows sqrt(1 + r / (k - r - 1)) = 1.26 for the basis.
        assert float((matrix - approximation).norm()) < 1.2 * best
        assert bool((kept <= values[: len(kept)] * (1 + 1e-9)).all())


def test_the_batches_of_the_second_pass_decide_on_the_coefficients() -> None:
    """Whatever the basis, the projection is exact: here half of the row space is missing."""
    matrix = with_spectrum(1, torch.ones(4, dtype=torch.float64), 20, 30)
    right = torch.linalg.svd(matrix, full_matrices=False).Vh.mT
    basis = right[:, :2]
    projection = Projection(basis, TestMatrices(0).get(30, PROBES, LIKE), identity(30), 20)
    projection.add(matrix, torch.eye(20, dtype=torch.float64))
    (left, values, found), _ = projection.svd(identity(20))
    assert relative_error((left * values) @ found.mT, matrix @ basis @ basis.mT) < 1e-10


def test_one_side_is_enough_for_the_row_space() -> None:
    values = torch.arange(1.0, 61.0, dtype=torch.float64) ** -1
    matrix = with_spectrum(3, values, 60, 80)
    psi = TestMatrices(0).get(60, sketch_size(8, 60, 80), LIKE, stream=1)
    rows = right_vectors(psi.mT @ matrix)[:, :8]
    best = float(values[8:].square().sum().sqrt())
    assert float((matrix - matrix @ rows @ rows.mT).norm()) < 1.35 * best


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_right_vectors_without_looking_are_those_of_the_svd(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sketches of two sizes, one of them with fewer directions than rows, and of nothing."""
    sketches = [
        scale * with_spectrum(0, torch.logspace(0, -3, 9, dtype=torch.float64), 9, 30),
        scale * with_spectrum(1, torch.logspace(0, -3, 9, dtype=torch.float64), 9, 9),
        scale * with_spectrum(2, torch.tensor([1.0, 0.5], dtype=torch.float64), 9, 20),
        scale * with_spectrum(3, torch.tensor([1.0, 0.5], dtype=torch.float64), 4, 20).float(),
        torch.zeros(4, 20),
    ]
    expected = [right_vectors(sketch) for sketch in sketches]
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    for found, exact, count in zip(
        right_vectors_together(sketches), expected, (9, 9, 2, 2, 0), strict=True
    ):
        assert found.dtype == exact.dtype
        assert relative_error(found.mT @ found, torch.eye(found.shape[1]).to(found)) < 1e-6
        aligned = (found[:, :count] * exact[:, :count]).sum(0).abs()
        torch.testing.assert_close(aligned, torch.ones_like(aligned), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_least_squares_without_looking_are_those_of_the_pseudoinverse(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = generator(0)
    spectra = ([1.0, 0.5, 0.1], [1.0, 0.5, 1e-5], [1.0, 1e-2, 2e-3])
    systems = [
        (scale * with_spectrum(i, torch.tensor(values).double(), 8, 3), gaussian(source, 8, 2))
        for i, values in enumerate(spectra)
    ]
    systems.append((torch.zeros(8, 4), torch.ones(8, 4)))
    expected = least_squares_together(systems, 1e-3)
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    for found, exact in zip(least_squares_together(systems, 1e-3), expected, strict=True):
        assert found.dtype == exact.dtype
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7 / scale)


def test_the_energy_is_estimated_without_bias() -> None:
    matrix = with_spectrum(0, torch.logspace(0, -1, 60, dtype=torch.float64), 60, 70)
    estimates = torch.stack([decomposed(matrix, 1, seed)[1] for seed in range(200)])
    exact = float(matrix.square().sum())
    spread = float(estimates.std())
    assert abs(float(estimates.mean()) - exact) < 4 * spread / len(estimates) ** 0.5
    assert 0 < spread < 0.2 * exact


def test_sums_over_batches_are_sketches_of_the_whole_gradient() -> None:
    source = generator(0)
    x, d = gaussian(source, 30, 7), gaussian(source, 30, 5)
    psi, k_x = gaussian(source, 5, 4), gaussian(source, 7, 7)
    basis = orthogonal(source, 7)[:, :3]
    sketch = RowSketch(psi, 7)
    projection = Projection(basis, gaussian(source, 7, 2), MatrixWhitening(k_x), 5)
    for part in (slice(0, 1), slice(1, 20), slice(20, 30)):
        sketch.add(x[part], d[part])
        projection.add(x[part], d[part])
    torch.testing.assert_close(sketch.rows, psi.mT @ d.mT @ x)
    torch.testing.assert_close(projection.columns[:, :3], d.mT @ x @ k_x @ basis)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_no_basis_of_nothing(value: float) -> None:
    sketch = RowSketch(torch.ones(3, 2), 4)
    sketch.add(torch.ones(1, 4), torch.full((1, 3), value))
    assert sketch.basis(MatrixWhitening(torch.eye(4))) is None


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
