"""Both ways to the inverse square root, against eigenpairs in float64 and against each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim import host, inverse_root
from cg_optim.inverse_root import halley_weights, inverse_square_root, orthogonal_polar_factor
from cg_optim.linalg import Rung, recorded_rungs
from tests.strategies import gaussian, generator, orthogonal, relative_error, seeds, semidefinite

quick = settings(max_examples=60, deadline=None)
EPS = torch.finfo(torch.float64).eps
sizes = st.integers(1, 64)
#: Powers of ten.
conditions = st.floats(0.0, 12.0).map(lambda power: 10.0**power)
scales = st.sampled_from([1e-30, 1e-12, 1e-3, 1.0, 1e7, 1e12, 1e30])


def without_reading(matrix: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "at_hand", lambda tensor: False)
        return inverse_square_root(matrix)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "eigenpairs": inverse_square_root,
    "polar factor": without_reading,
}
ways = pytest.mark.parametrize("way", WAYS)


def exact(size: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix of mean eigenvalue of the order of one, and its inverse square root."""
    vectors = orthogonal(generator(seed), size)
    values = condition ** -torch.linspace(0, 1, size, dtype=torch.float64)
    matrix = (vectors * values) @ vectors.mT
    return 0.5 * (matrix + matrix.mT), (vectors * values.rsqrt()) @ vectors.mT


@ways
@quick
@given(sizes, conditions, scales, seeds)
def test_it_is_the_inverse_square_root(
    way: str, size: int, condition: float, scale: float, seed: int
) -> None:
    matrix, expected = exact(size, condition, seed)
    with recorded_rungs() as rungs:
        root = WAYS[way](scale * matrix)
    # Rounding the matrix changes its smallest eigenvalue by eps times the condition number.
    assert relative_error(root, expected / scale**0.5) < 50 * EPS * condition + 1e-13
    white = root.mT @ (scale * matrix) @ root
    eye = torch.eye(size, dtype=torch.float64)
    assert relative_error(white, eye) < 100 * EPS * condition + 1e-13
    assert relative_error(root.mT, root) < 50 * EPS * condition + 1e-13
    assert all(int(rung.max()) == Rung.CLEAN for rung in rungs)


@quick
@given(sizes, st.integers(0, 64), st.sampled_from([1e-12, 1e-9, 1e-6, 0.3]), scales, seeds)
def test_both_ways_agree_on_what_is_singular_but_for_the_damping(
    size: int, rank: int, damping: float, scale: float, seed: int
) -> None:
    matrix = semidefinite(generator(seed), size, rank=min(rank, size))
    matrix = scale * (matrix + damping * torch.eye(size, dtype=torch.float64))
    one, other = (way(matrix) for way in WAYS.values())
    assert bool(torch.isfinite(one).all())
    assert relative_error(other, one) < 100 * size * EPS / damping


@ways
def test_clusters_leave_it_well_determined(way: str) -> None:
    vectors = orthogonal(generator(0), 6)
    values = torch.tensor([3.0, 3.0, 3.0 + 1e-14, 1.0, 1.0, 1.0 - 1e-15], dtype=torch.float64)
    root = WAYS[way]((vectors * values) @ vectors.mT)
    assert relative_error(root, (vectors * values.rsqrt()) @ vectors.mT) < 1e-14


@ways
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_the_identity_counted_and_alone(way: str, bad: float) -> None:
    matrix = semidefinite(generator(0), 5, batch=(3,), condition=100.0)
    expected = WAYS[way](matrix)
    matrix[1, 2, 2] = bad
    with recorded_rungs() as rungs:
        roots = WAYS[way](matrix)
    assert torch.equal(roots[1], torch.eye(5, dtype=torch.float64))
    assert torch.equal(roots[::2], expected[::2])
    assert [rung.tolist() for rung in rungs] == [[Rung.CLEAN, Rung.FAILED, Rung.CLEAN]]


@ways
@pytest.mark.parametrize("least", [0.0, -1e-20, -1e-3, -1.0])
def test_what_is_singular_or_indefinite_is_repaired_and_counted(way: str, least: float) -> None:
    vectors = orthogonal(generator(0), 4)
    values = torch.tensor([1.0, 0.5, 0.1, least], dtype=torch.float64)
    with recorded_rungs() as rungs:
        root = WAYS[way]((vectors * values) @ vectors.mT)
    assert bool(torch.isfinite(root).all())
    assert float(torch.linalg.eigvalsh(0.5 * (root + root.mT))[0]) > 0
    if least < -EPS:
        assert any(Rung.JITTER <= int(rung) < Rung.FAILED for rung in rungs)


@ways
def test_a_zero_matrix_stays_finite(way: str) -> None:
    assert bool(torch.isfinite(WAYS[way](torch.zeros(2, 3, 3))).all())


def test_eigenpairs_that_do_not_come_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    matrix, expected = exact(6, 1e3, 0)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert relative_error(inverse_square_root(matrix), expected) < 1e-11


@given(sizes, seeds)
@quick
def test_the_polar_factor_is_orthogonal_and_leaves_a_symmetric_matrix(size: int, seed: int) -> None:
    matrix = gaussian(generator(seed), size, size)
    u = orthogonal_polar_factor(matrix)
    assert relative_error(u.mT @ u, torch.eye(size, dtype=torch.float64)) < 1e-13
    _, values, right = torch.linalg.svd(matrix)
    tolerance = 1e-13 * float(values[0] / values[-1]) + 1e-13
    assert relative_error(u.mT @ matrix, (right.mT * values) @ right) < tolerance


def test_the_weights_bring_every_singular_value_to_one() -> None:
    values = torch.logspace(0, -10, 1000, dtype=torch.float64)
    for a, b, c in inverse_root.WEIGHTS:
        values = values * (a + b * values.square()) / (1 + c * values.square())
    torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-12, atol=0)
    assert len(inverse_root.WEIGHTS) == 5
    assert len(halley_weights(0.5)) == 3
    # In the limit it is Halley's iteration.
    assert halley_weights(1.0 - 1e-12)[-1] == pytest.approx((3.0, 1.0, 3.0))
