"""Damped Cholesky: what it solves, and every rung of its failure ladder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim import host
from cg_optim.linalg import (
    Rung,
    add_to_diagonal,
    damped_cholesky,
    mean_eigenvalue,
    recorded_rungs,
)
from tests.strategies import (
    conditions,
    dampings,
    gaussian,
    generator,
    relative_error,
    scales,
    seeds,
    semidefinite,
    sizes,
)

quick = settings(max_examples=40, deadline=None)
F32, F64 = torch.float32, torch.float64


def damped(matrix: Tensor, damping: float, floor: float = 0.0) -> Tensor:
    """What the factor must reproduce, in float64."""
    matrix = matrix.double()
    return add_to_diagonal(matrix, damping * mean_eigenvalue(matrix).clamp_min(floor))


def square(factor: Tensor) -> Tensor:
    return factor.double() @ factor.double().mT


# --------------------------------------------------------------------- healthy input


@quick
@given(seeds, sizes, conditions, st.one_of(st.just(0.0), dampings), scales(30))
def test_factor_times_its_transpose_is_the_damped_matrix(
    seed: int, size: int, condition: float, damping: float, scale: float
) -> None:
    matrix = scale * semidefinite(generator(seed), size, condition=condition, batch=(3,))
    result = damped_cholesky(matrix, damping)
    assert relative_error(square(result.factor), damped(matrix, damping)) < 1e-13
    assert torch.equal(result.factor, result.factor.tril())
    assert bool((result.factor.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert result.rung.tolist() == [Rung.CLEAN] * 3


@quick
@given(seeds, sizes, conditions, scales(12))
def test_solutions_have_small_residuals(
    seed: int, size: int, condition: float, scale: float
) -> None:
    source = generator(seed)
    matrix = scale * semidefinite(source, size, condition=condition)
    right = gaussian(source, size, 4)
    factor = damped_cholesky(matrix, 0.0).factor
    solution = torch.cholesky_solve(right, factor)
    # The residual against what the solver could know: |M| |x|, not |right|.
    size_of_terms = torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(solution)
    residual = torch.linalg.matrix_norm(matrix @ solution - right)
    assert residual < 1e-13 * size_of_terms


@quick
@given(seeds, sizes, st.data(), st.floats(1e-3, 10), scales(12))
def test_rank_deficient_matrices_in_single_precision(
    seed: int, size: int, data: st.DataObject, damping: float, scale: float
) -> None:
    rank = data.draw(st.integers(1, size))
    matrix = scale * semidefinite(generator(seed), size, rank=rank)
    result = damped_cholesky(matrix.to(F32), damping)
    assert relative_error(square(result.factor), damped(matrix, damping)) < 1e-5
    assert int(result.rung) == Rung.CLEAN


@quick
@given(seeds, sizes, conditions, scales(12), dampings)
def test_the_scale_of_the_matrix_only_scales_the_factor(
    seed: int, size: int, condition: float, scale: float, damping: float
) -> None:
    matrix = semidefinite(generator(seed), size, condition=condition)
    factor = damped_cholesky(matrix, damping).factor
    scaled = damped_cholesky(scale * matrix, damping).factor
    assert relative_error(scaled / scale**0.5, factor) < 1e-9


@quick
@given(seeds, sizes, conditions, st.tuples(dampings, dampings).map(sorted))
def test_more_damping_makes_every_solution_smaller(
    seed: int, size: int, condition: float, two: list[float]
) -> None:
    source = generator(seed)
    matrix = semidefinite(source, size, condition=condition)
    right = gaussian(source, size, 1)
    less, more = (
        torch.cholesky_solve(right, damped_cholesky(matrix, damping).factor) for damping in two
    )
    assert more.norm() <= less.norm() * (1 + 1e-9)
    # In the order of matrices too: M + more I - (M + less I) is semi-definite.
    difference = square(damped_cholesky(matrix, two[1]).factor) - square(
        damped_cholesky(matrix, two[0]).factor
    )
    assert torch.linalg.eigvalsh(difference).min() >= -1e-12 * (1 + two[1])


@quick
@given(seeds, sizes, dampings)
def test_only_the_symmetric_part_counts(seed: int, size: int, damping: float) -> None:
    source = generator(seed)
    matrix = semidefinite(source, size)
    skew = 1e-3 * gaussian(source, size, size)
    skew = skew - skew.mT
    expected = damped_cholesky(matrix, damping).factor
    assert relative_error(damped_cholesky(matrix + skew, damping).factor, expected) < 1e-12


@pytest.mark.parametrize("dtype", [F32, F64])
def test_one_by_one(dtype: torch.dtype) -> None:
    factor = damped_cholesky(torch.tensor([[4.0]], dtype=dtype), 0.5).factor
    assert factor.dtype == dtype
    torch.testing.assert_close(factor, torch.tensor([[6.0]], dtype=dtype).sqrt())


def test_the_input_is_left_alone() -> None:
    matrix = torch.eye(3)
    damped_cholesky(matrix, 0.5)
    assert torch.equal(matrix, torch.eye(3))


# --------------------------------------------------------- no scale of its own: floors


def test_zero_matrix_without_a_floor_is_the_identity() -> None:
    result = damped_cholesky(torch.zeros(2, 3, 3), 0.25)
    torch.testing.assert_close(
        square(result.factor), 1.25 * torch.eye(3, dtype=F64).expand(2, 3, 3)
    )
    assert result.rung.tolist() == [Rung.CLEAN] * 2


@quick
@given(sizes, dampings, scales(30))
def test_zero_matrix_with_a_floor_is_damped_by_it(size: int, damping: float, floor: float) -> None:
    result = damped_cholesky(torch.zeros(size, size, dtype=F64), damping, floor)
    expected = damping * floor * torch.eye(size, dtype=F64)
    assert relative_error(square(result.factor), expected) < 1e-13


@quick
@given(seeds, sizes, dampings, scales(6), scales(6))
def test_floor_is_a_lower_bound_of_the_scale(
    seed: int, size: int, damping: float, scale: float, floor: float
) -> None:
    matrix = scale * semidefinite(generator(seed), size)
    expected = damped(matrix, damping, floor)
    result = damped_cholesky(matrix, damping, floor)
    assert relative_error(square(result.factor), expected) < 1e-12
    as_tensor = damped_cholesky(matrix, damping, torch.tensor(floor, dtype=F64))
    torch.testing.assert_close(as_tensor.factor, result.factor, rtol=1e-12, atol=0)


def test_every_matrix_of_a_stack_has_its_own_floor() -> None:
    floors = torch.tensor([0.0, 1.0, 100.0], dtype=F64)
    matrix = torch.eye(2, dtype=F64).expand(3, 2, 2)
    factors = damped_cholesky(matrix, 0.1, floors).factor
    torch.testing.assert_close(factors[:, 0, 0].square(), torch.tensor([1.1, 1.1, 11.0], dtype=F64))


# ------------------------------------------------------------------ the ends of fp32


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 3e38])
def test_extreme_scales_of_single_precision(scale: float) -> None:
    # A trace of 3e38 x 4 overflows; entries of 1e-44 are a few units of the last denormal.
    matrix = torch.full((4, 4), scale / 2, dtype=F64).fill_diagonal_(scale).to(F32)
    result = damped_cholesky(matrix, 0.1)
    assert int(result.rung) == Rung.CLEAN
    unit = matrix.double() / matrix.double()[0, 0]
    expected = damped(unit, 0.1)
    actual = square(result.factor.double() / matrix.double()[0, 0].sqrt())
    assert relative_error(actual, expected) < 1e-5


# ------------------------------------------------------------- the ladder, rung by rung


def nearly_singular() -> Tensor:
    """Ones everywhere: 1 + 1e-9 is 1 in single precision, so its damping is lost there."""
    return torch.ones(6, 6)


def slightly_indefinite(dtype: torch.dtype) -> Tensor:
    """An eigenvalue below zero by more than the damping but by less than the jitter."""
    return torch.diag(torch.tensor([1.0, 1.0, -3e-6], dtype=dtype))


def indefinite(dtype: torch.dtype = F32) -> Tensor:
    return torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=dtype))


def test_double_precision_rescues_a_nearly_singular_matrix() -> None:
    result = damped_cholesky(nearly_singular(), 1e-9)
    assert int(result.rung) == Rung.FLOAT64
    assert result.factor.dtype == F32
    assert relative_error(square(result.factor), damped(nearly_singular(), 1e-9)) < 1e-6
    # Nothing was added beyond the damping that was asked for.
    last = result.factor.double().diagonal()[1:]
    assert bool((last.square() < 5e-9).all())
    assert bool((last > 0).all())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_jitter_rescues_a_slightly_indefinite_matrix(dtype: torch.dtype) -> None:
    matrix = slightly_indefinite(dtype)
    result = damped_cholesky(matrix, 1e-6)
    assert int(result.rung) == Rung.JITTER
    error = square(result.factor) - damped(matrix, 1e-6)
    # A multiple of the identity on top, at most the last rung's.
    assert error.diagonal().max() <= 1.1 * 1e-4
    assert relative_error(square(result.factor), damped(matrix, 1e-6)) < 1e-4


@pytest.mark.parametrize("damping", [1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_eigenvalues_of_an_indefinite_matrix_are_clamped(
    damping: float, dtype: torch.dtype
) -> None:
    source = generator(3)
    rotation = torch.linalg.qr(gaussian(source, 3, 3)).Q
    matrix = rotation @ indefinite(F64) @ rotation.mT
    result = damped_cholesky(matrix.to(dtype), damping)
    assert int(result.rung) == Rung.EIGENVALUES
    mean = 4.0 / 3.0
    clamped = torch.tensor([3.0, 2.0, 0.0], dtype=F64) + damping * mean
    expected = (rotation * clamped) @ rotation.mT
    assert relative_error(square(result.factor), expected) < 1e-5
    assert torch.equal(result.factor, result.factor.tril())
    assert bool((result.factor.diagonal() > 0).all())


def test_exactly_singular_without_damping_still_gives_a_finite_factor() -> None:
    result = damped_cholesky(torch.diag(torch.tensor([1.0, 0.0, 0.0])), 0.0)
    assert int(result.rung) in (Rung.JITTER, Rung.EIGENVALUES)
    assert bool((result.factor.diagonal() > 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (2, 2)])
def test_anything_not_finite_fails_with_the_identity(bad: float, place: tuple[int, int]) -> None:
    matrix = torch.eye(3)
    matrix[place] = bad
    result = damped_cholesky(matrix, 0.1)
    assert int(result.rung) == Rung.FAILED
    assert torch.equal(result.factor, torch.eye(3))


@pytest.mark.parametrize("floor", [float("nan"), float("inf")])
def test_a_floor_that_is_not_finite_fails(floor: float) -> None:
    result = damped_cholesky(torch.eye(2), 0.1, torch.tensor(floor))
    assert int(result.rung) == Rung.FAILED
    assert torch.equal(result.factor, torch.eye(2))


@pytest.mark.parametrize("matrix", [-torch.eye(3), torch.diag(torch.tensor([1.0, -1.0]))])
def test_no_positive_trace_means_no_scale(matrix: Tensor) -> None:
    result = damped_cholesky(matrix, 0.1)
    assert int(result.rung) == Rung.FAILED
    assert torch.equal(result.factor, torch.eye(matrix.shape[-1]))


def test_eigenvalue_solver_that_gives_up_is_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    stack = torch.stack([torch.eye(3), indefinite(), 2 * torch.eye(3)])
    result = damped_cholesky(stack, 1e-3)
    assert result.rung.tolist() == [Rung.CLEAN, Rung.SHIFT, Rung.CLEAN]
    assert bool((torch.linalg.eigvalsh(square(result.factor[1])) > 0).all())


# ------------------------------------------------------------------------- in a stack

CASES = {
    "healthy": (torch.diag(torch.tensor([3.0, 2.0, 1.0])), Rung.CLEAN),
    "zero": (torch.zeros(3, 3), Rung.CLEAN),
    "huge": (3e38 * torch.eye(3), Rung.CLEAN),
    "denormal": (1e-40 * torch.eye(3), Rung.CLEAN),
    "nearly singular": (torch.ones(3, 3), Rung.FLOAT64),
    "slightly indefinite": (torch.diag(torch.tensor([1.0, 1.0, -3e-6])), Rung.JITTER),
    "indefinite": (indefinite(), Rung.EIGENVALUES),
    "nan": (torch.full((3, 3), float("nan")), Rung.FAILED),
    "inf": (torch.full((3, 3), float("inf")), Rung.FAILED),
    "negative": (-torch.eye(3), Rung.FAILED),
}


@quick
@given(st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=8), st.booleans())
def test_matrices_of_a_stack_do_not_touch_each_other(names: list[str], nested: bool) -> None:
    stack = torch.stack([CASES[name][0] for name in names])
    result = damped_cholesky(stack[:, None] if nested else stack, 1e-9)
    rungs = result.rung.flatten().tolist()
    factors = result.factor.reshape(-1, 3, 3)
    assert rungs == [CASES[name][1] for name in names]
    assert bool(torch.isfinite(factors).all())
    for name, factor in zip(names, factors, strict=True):
        assert torch.equal(factor, damped_cholesky(CASES[name][0], 1e-9).factor)


def test_on_an_accelerator_the_same_matrices_hold_without_a_look_at_the_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = torch.stack([matrix for matrix, _ in CASES.values()])
    expected = damped_cholesky(stack, 1e-9)
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    found = damped_cholesky(stack, 1e-9)
    # Where the eigenvalues would be clamped, more is added instead: still a factor.
    shifted = expected.rung == Rung.EIGENVALUES
    assert int(shifted.sum()) == 1
    assert bool((found.rung[shifted] == Rung.SHIFT).all())
    # There float64 is what everything starts with.
    rungs = torch.where(expected.rung == Rung.FLOAT64, int(Rung.CLEAN), expected.rung)
    assert torch.equal(found.rung[~shifted], rungs[~shifted])
    torch.testing.assert_close(found.factor[~shifted], expected.factor[~shifted])
    added = square(found.factor[shifted]) - stack[shifted]
    norm = torch.linalg.matrix_norm(stack[shifted])[:, None, None]
    torch.testing.assert_close(added, (norm * torch.eye(3)).double(), rtol=1e-4, atol=1e-4)


def test_rungs_are_recorded_only_inside_the_block() -> None:
    damped_cholesky(torch.eye(2), 0.1)
    with recorded_rungs() as rungs:
        damped_cholesky(torch.stack([torch.eye(3), indefinite()]), 1e-9)
        with recorded_rungs() as inner:
            damped_cholesky(torch.eye(2), 0.1)
    damped_cholesky(torch.eye(2), 0.1)
    assert [rung.tolist() for rung in rungs] == [[Rung.CLEAN, Rung.EIGENVALUES]]
    assert [rung.tolist() for rung in inner] == [Rung.CLEAN]


@quick
@given(seeds, st.sampled_from([F32, F64]), st.floats(-30, 30), st.floats(0, 1))
def test_whatever_comes_in_what_goes_out_is_finite_and_invertible(
    seed: int, dtype: torch.dtype, power: float, damping: float
) -> None:
    matrix = 10.0**power * gaussian(generator(seed), 5, 4, 4)
    result = damped_cholesky(matrix.to(dtype), damping)
    assert bool(torch.isfinite(result.factor).all())
    assert bool((result.factor.diagonal(dim1=-2, dim2=-1) > 0).all())
