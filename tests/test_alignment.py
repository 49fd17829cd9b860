"""The closed-form step against dense least squares, and its invariances, in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.alignment import Factors, aligned_step, weight_change
from tests.strategies import (
    conditions,
    gaussian,
    generator,
    orthogonal,
    relative_error,
    scales,
    seeds,
    semidefinite,
)

quick = settings(max_examples=30, deadline=None)
DTYPE = torch.float64


@dataclass(frozen=True)
class Problem:
    """A layer in the middle of training.

    ``metric_out`` is ``S``; ``full_grad`` is ``G``, which the module under test never sees.
    """

    metric_in: Tensor
    metric_out: Tensor
    full_grad: Tensor
    factors: Factors
    scaling: float

    @property
    def gradients(self) -> Factors:
        down, up = self.factors
        return Factors(
            self.scaling * up.mT @ self.full_grad, self.scaling * self.full_grad @ down.mT
        )

    @property
    def output_curvature(self) -> Tensor:
        return self.scaling**2 * self.metric_out

    @property
    def newton(self) -> Tensor:
        """``dW*`` by dense solves."""
        return -torch.linalg.solve(
            self.metric_out, torch.linalg.solve(self.metric_in, self.full_grad.mT).mT
        )

    def step(self, **options: object) -> Factors:
        return aligned_step(
            self.metric_in,
            self.output_curvature,
            self.factors,
            self.gradients,
            **options,  # type: ignore[arg-type]
        )

    def change(self, **options: object) -> Tensor:
        return weight_change(self.step(**options), self.factors, self.scaling)

    def distance(self, change: Tensor) -> float:
        """``|| S^(1/2) (change - dW*) X^(1/2) ||_F``."""
        error = root(self.metric_out) @ (change - self.newton) @ root(self.metric_in)
        return float(torch.linalg.matrix_norm(error))

    def with_(self, **fields: object) -> Problem:
        return Problem(**{**self.__dict__, **fields})  # type: ignore[arg-type]


def make(
    seed: int, n: int, m: int, r: int, *, scaling: float = 1.7, condition: float = 100.0
) -> Problem:
    source = generator(seed)
    return Problem(
        semidefinite(source, n, condition=condition),
        semidefinite(source, m, condition=condition),
        gaussian(source, m, n),
        Factors(gaussian(source, r, n), gaussian(source, m, r)),
        scaling,
    )


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root, from eigenvalues and not from the code under test."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def least_squares(problem: Problem) -> Factors:
    """Solve for all entries of ``(dA, dB)`` at once, by one big matrix and numpy.

    With row-major ``vec``, ``vec(L Y R) = (L kron R^T) vec(Y)``.
    """
    (down, up), s = problem.factors, problem.scaling
    (r, n), m = down.shape, up.shape[0]
    left, right = root(problem.metric_out), root(problem.metric_in)
    for_down = np.kron((s * left @ up).numpy(), right.numpy())
    for_up = np.kron((s * left).numpy(), (down @ right).mT.numpy())
    system = np.concatenate([for_down, for_up], 1)
    wanted = (left @ problem.newton @ right).flatten().numpy()
    solution = torch.from_numpy(np.linalg.lstsq(system, wanted, rcond=1e-13)[0])
    return Factors(solution[: r * n].reshape(r, n), solution[r * n :].reshape(m, r))


def projections(problem: Problem) -> tuple[Tensor, Tensor]:
    """``P_A`` acting from the right and ``P_B`` from the left, by plain inverses."""
    (down, up), x, s = problem.factors, problem.metric_in, problem.metric_out
    on_the_right = x @ down.mT @ torch.linalg.inv(down @ x @ down.mT) @ down
    on_the_left = up @ torch.linalg.inv(up.mT @ s @ up) @ up.mT @ s
    return on_the_right, on_the_left


# Sizes (n, m, r): wide, tall, square, rank one, rank as large as it can be.
SHAPES = [(7, 5, 2), (4, 8, 3), (6, 6, 2), (5, 5, 1), (3, 6, 3), (1, 1, 1)]
shapes = st.sampled_from(SHAPES)


# ------------------------------------------------------------- what problem is solved


@quick
@given(seeds, shapes, st.sampled_from([0.25, 1.0, 16.0]))
def test_joint_step_is_the_least_squares_solution(
    seed: int, shape: tuple[int, int, int], scaling: float
) -> None:
    problem = make(seed, *shape, scaling=scaling)
    expected = weight_change(least_squares(problem), problem.factors, scaling)
    assert relative_error(problem.change(), expected) < 1e-9


@quick
@given(seeds, shapes)
def test_no_other_step_comes_closer_to_the_newton_step(
    seed: int, shape: tuple[int, int, int]
) -> None:
    problem, source = make(seed, *shape), generator(seed + 1)
    step = problem.step()
    best = problem.distance(problem.change())
    for size in (1e-3, 1.0):
        other = Factors(
            step.down + size * gaussian(source, *step.down.shape),
            step.up + size * gaussian(source, *step.up.shape),
        )
        change = weight_change(other, problem.factors, problem.scaling)
        assert problem.distance(change) >= best * (1 - 1e-9)
    assert best <= problem.distance(problem.change(joint=False)) * (1 + 1e-9)


@quick
@given(seeds, shapes)
def test_joint_step_projects_the_newton_step_on_the_tangent_space(
    seed: int, shape: tuple[int, int, int]
) -> None:
    problem = make(seed, *shape)
    p_a, p_b = projections(problem)
    newton = problem.newton
    expected = newton @ p_a + p_b @ newton - p_b @ newton @ p_a
    assert relative_error(problem.change(), expected) < 1e-9


@quick
@given(seeds, shapes)
def test_block_step_is_the_joint_step_without_the_halves(
    seed: int, shape: tuple[int, int, int]
) -> None:
    problem = make(seed, *shape)
    block, joint = problem.step(joint=False), problem.step()
    p_a, p_b = projections(problem)
    assert relative_error(block.down @ (torch.eye(shape[0]) - 0.5 * p_a), joint.down) < 1e-9
    assert relative_error((torch.eye(shape[1]) - 0.5 * p_b) @ block.up, joint.up) < 1e-9
    # Each block alone is the full answer to the problem in which the other stands still.
    newton = problem.newton
    none = torch.zeros(())
    only_down = weight_change(block._replace(up=none * block.up), problem.factors, problem.scaling)
    only_up = weight_change(
        block._replace(down=none * block.down), problem.factors, problem.scaling
    )
    assert relative_error(only_down, p_b @ newton) < 1e-9
    assert relative_error(only_up, newton @ p_a) < 1e-9


@quick
@given(seeds, shapes, scales(3))
def test_product_is_unique_and_the_factors_are_the_symmetric_choice(
    seed: int, shape: tuple[int, int, int], size: float
) -> None:
    problem = make(seed, *shape)
    (down, up), step = problem.factors, problem.step()
    mixing = size * gaussian(generator(seed + 1), down.shape[0], down.shape[0])
    other = Factors(step.down + mixing @ down, step.up - up @ mixing)
    change = weight_change(other, problem.factors, problem.scaling)
    assert relative_error(change, problem.change()) < 1e-8

    q = up.mT @ problem.output_curvature @ up
    p = down @ problem.metric_in @ down.mT

    def cost(candidate: Factors) -> float:
        """``<dA, Q dA X> + <dB, T dB P>``: what the symmetric choice makes smallest."""
        in_down = (candidate.down * (q @ candidate.down @ problem.metric_in)).sum()
        in_up = (candidate.up * (problem.output_curvature @ candidate.up @ p)).sum()
        return float(in_down + in_up)

    assert cost(step) <= cost(other) * (1 + 1e-9)


def test_white_curvature_projects_the_gradient_itself() -> None:
    n, m, r = 7, 5, 2
    problem = make(0, n, m, r).with_(
        metric_in=torch.eye(n, dtype=DTYPE), metric_out=torch.eye(m, dtype=DTYPE)
    )
    rows = torch.linalg.qr(problem.factors.down.mT).Q
    columns = torch.linalg.qr(problem.factors.up).Q
    g, p_a, p_b = problem.full_grad, rows @ rows.mT, columns @ columns.mT
    assert relative_error(problem.change(), -(g @ p_a + p_b @ g - p_b @ g @ p_a)) < 1e-10


def test_full_rank_factors_take_the_whole_newton_step() -> None:
    problem = make(0, 4, 6, 4)
    assert relative_error(problem.change(), problem.newton) < 1e-9


# ------------------------------------------------------------------------ invariances


@quick
@given(seeds, shapes)
def test_any_change_of_basis_between_the_factors_leaves_the_product(
    seed: int, shape: tuple[int, int, int]
) -> None:
    problem = make(seed, *shape)
    basis = gaussian(generator(seed + 1), shape[2], shape[2]) + 3 * torch.eye(shape[2])
    down, up = problem.factors
    other = problem.with_(factors=Factors(basis @ down, torch.linalg.solve(basis.mT, up.mT).mT))
    for joint in (True, False):
        assert relative_error(other.change(joint=joint), problem.change(joint=joint)) < 1e-7


@quick
@given(seeds, shapes, st.floats(1e-6, 10.0), st.booleans())
def test_rotations_between_the_factors_leave_the_product_with_any_damping(
    seed: int, shape: tuple[int, int, int], damping: float, joint: bool
) -> None:
    problem = make(seed, *shape)
    rotation = orthogonal(generator(seed + 1), shape[2])
    down, up = problem.factors
    other = problem.with_(factors=Factors(rotation @ down, up @ rotation.mT))
    expected = problem.change(joint=joint, damping=damping)
    assert relative_error(other.change(joint=joint, damping=damping), expected) < 1e-8


@quick
@given(seeds, shapes, scales(12), st.floats(0, 1.0), st.booleans())
def test_rescaling_the_loss_rescales_the_step_by_its_inverse(
    seed: int, shape: tuple[int, int, int], scale: float, damping: float, joint: bool
) -> None:
    problem = make(seed, *shape)
    # Gradients grow with the loss, output curvature with its square.
    other = problem.with_(
        full_grad=scale * problem.full_grad, metric_out=scale**2 * problem.metric_out
    )
    options = {"joint": joint, "damping": damping}
    assert relative_error(scale * other.change(**options), problem.change(**options)) < 1e-9


@quick
@given(seeds, shapes, scales(6), st.floats(0, 1.0), st.booleans())
def test_rescaling_the_inputs_is_undone_by_the_step(
    seed: int, shape: tuple[int, int, int], scale: float, damping: float, joint: bool
) -> None:
    problem = make(seed, *shape)
    # With inputs c x the weight W / c computes the same, so its steps shrink alike.
    other = problem.with_(
        full_grad=scale * problem.full_grad, metric_in=scale**2 * problem.metric_in
    )
    options = {"joint": joint, "damping": damping}
    assert relative_error(scale * other.change(**options), problem.change(**options)) < 1e-9


# ---------------------------------------------------------------------------- damping


@quick
@given(seeds, shapes, st.floats(0, 1e3))
def test_damping_the_small_matrices_never_overshoots(
    seed: int, shape: tuple[int, int, int], damping: float
) -> None:
    problem = make(seed, *shape)
    nothing = torch.zeros_like(problem.full_grad)
    change = problem.change(damping=damping)
    assert problem.distance(change) <= problem.distance(nothing) * (1 + 1e-9)
    # A descent step, not longer than the Newton step in the metric.
    assert float((change * problem.full_grad).sum()) <= 0
    metric = root(problem.metric_out), root(problem.metric_in)
    longest = torch.linalg.matrix_norm(metric[0] @ problem.newton @ metric[1])
    assert torch.linalg.matrix_norm(metric[0] @ change @ metric[1]) <= longest * (1 + 1e-9)


@quick
@given(seeds, shapes, st.tuples(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3)).map(sorted))
def test_more_damping_stays_farther_from_the_newton_step(
    seed: int, shape: tuple[int, int, int], two: list[float]
) -> None:
    problem = make(seed, *shape)
    less, more = (problem.distance(problem.change(damping=damping)) for damping in two)
    assert less <= more * (1 + 1e-9)


@quick
@given(seeds, shapes, st.floats(0.01, 10.0))
def test_damped_joint_step_is_two_contractions_of_the_newton_step(
    seed: int, shape: tuple[int, int, int], damping: float
) -> None:
    problem = make(seed, *shape)
    (n, m, r), (down, up) = shape, problem.factors
    p = down @ problem.metric_in @ down.mT
    q = up.mT @ problem.output_curvature @ up
    eye = torch.eye(r, dtype=DTYPE)
    p = p + damping * p.trace() / r * eye
    q = q + damping * q.trace() / r * eye
    left_over_in = torch.eye(n) - problem.metric_in @ down.mT @ torch.linalg.solve(p, down)
    left_over_out = torch.eye(m) - up @ torch.linalg.solve(q, up.mT) @ problem.output_curvature
    expected = problem.newton - left_over_out @ problem.newton @ left_over_in
    assert relative_error(problem.change(damping=damping, first_step=1e-9), expected) < 1e-9


def test_too_small_a_backward_curvature_does_overshoot() -> None:
    """Why Q is built from the current B: with the Q of half that B the step is too long."""
    problem = make(0, 7, 5, 2)
    lagging = problem.factors._replace(up=0.5 * problem.factors.up)
    step = aligned_step(problem.metric_in, problem.output_curvature, lagging, problem.gradients)
    change = weight_change(step, problem.factors, problem.scaling)
    assert problem.distance(change) > problem.distance(torch.zeros_like(change))


# ------------------------------------------------------------------------------ B = 0


def at_start(seed: int = 0) -> Problem:
    problem = make(seed, 7, 5, 2)
    return problem.with_(factors=problem.factors._replace(up=torch.zeros(5, 2, dtype=DTYPE)))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_first_step_moves_only_b(joint: bool, damping: float) -> None:
    problem = at_start()
    step = problem.step(joint=joint, damping=damping)
    assert torch.equal(step.down, torch.zeros_like(step.down))
    if damping == 0:
        # The full step that B alone can take.
        p_a = problem.metric_in @ problem.factors.down.mT
        p_a = p_a @ torch.linalg.inv(problem.factors.down @ p_a) @ problem.factors.down
        assert relative_error(problem.change(joint=joint), problem.newton @ p_a) < 1e-9


@pytest.mark.parametrize("joint", [True, False])
def test_tiny_b_does_not_blow_up_the_step_of_a(joint: bool) -> None:
    """Without a floor ``Q^-1 G_A`` grows like ``1 / |B|``; with it, it vanishes with ``B``."""
    problem = make(0, 7, 5, 2)
    sizes = [1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-30, 1e-200]
    norms, without = [], []
    for size in sizes:
        small = problem.with_(factors=problem.factors._replace(up=size * problem.factors.up))
        norms.append(float(small.step(joint=joint, damping=1e-3, first_step=1e-3).down.norm()))
        without.append(float(small.step(joint=joint, damping=1e-3, first_step=1e-300).down.norm()))
    assert all(later <= earlier for earlier, later in itertools.pairwise(norms[2:]))
    assert norms[-1] < 1e-100
    assert without[3] > 1e4 * norms[3]
    # B itself has grown past the floor: no difference.
    assert norms[0] == pytest.approx(without[0], rel=1e-2)


@quick
@given(seeds, scales(8), st.booleans())
def test_the_floor_follows_the_scale_of_the_loss(seed: int, scale: float, joint: bool) -> None:
    problem = make(seed, 6, 5, 2)
    problem = problem.with_(factors=problem.factors._replace(up=1e-5 * problem.factors.up))
    other = problem.with_(
        full_grad=scale * problem.full_grad, metric_out=scale**2 * problem.metric_out
    )
    options = {"joint": joint, "damping": 1e-3}
    assert relative_error(scale * other.change(**options), problem.change(**options)) < 1e-9


# ----------------------------------------------------------------------- stacks, traps


@pytest.mark.parametrize("joint", [True, False])
def test_stacks_are_stepped_pair_by_pair(joint: bool) -> None:
    problems = [make(seed, 7, 5, 2) for seed in range(2)] + [at_start(7)]
    stacked = [
        torch.stack(tensors)
        for tensors in zip(
            *((p.metric_in, p.output_curvature, *p.factors, *p.gradients) for p in problems),
            strict=True,
        )
    ]
    x, t, down, up, down_grad, up_grad = (tensor[None] for tensor in stacked)
    step = aligned_step(
        x, t, Factors(down, up), Factors(down_grad, up_grad), joint=joint, damping=1e-3
    )
    assert step.down.shape == (1, 3, 2, 7)
    assert step.up.shape == (1, 3, 5, 2)
    for index, problem in enumerate(problems):
        alone = problem.step(joint=joint, damping=1e-3)
        torch.testing.assert_close(step.down[0, index], alone.down, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(step.up[0, index], alone.up, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_pair_that_is_not_finite_stands_still(which: int, bad: float) -> None:
    problem = make(0, 7, 5, 2)
    pair = (problem.metric_in, problem.output_curvature, *problem.factors, *problem.gradients)
    tensors = [torch.stack([tensor, tensor]) for tensor in pair]
    tensors[which][0, 0, 0] = bad
    x, t, down, up, down_grad, up_grad = tensors
    step = aligned_step(x, t, Factors(down, up), Factors(down_grad, up_grad))
    assert not bool(step.down[0].any())
    assert not bool(step.up[0].any())
    torch.testing.assert_close(step.down[1], problem.step().down, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.up[1], problem.step().up, rtol=1e-9, atol=1e-12)


@quick
@given(seeds, conditions)
def test_ill_conditioned_curvature_up_to_1e12(seed: int, condition: float) -> None:
    """Stationarity, relative to the terms it is made of: no gradient is left in either factor."""
    problem = make(seed, 6, 5, 2, condition=condition)
    (down, up), gradients = problem.factors, problem.gradients
    change = problem.change()
    moved = problem.metric_out @ change @ problem.metric_in
    scale = float(
        torch.linalg.matrix_norm(problem.metric_out)
        * torch.linalg.matrix_norm(change)
        * torch.linalg.matrix_norm(problem.metric_in)
    )
    for left_over in (
        problem.scaling * up.mT @ moved + gradients.down,
        problem.scaling * moved @ down.mT + gradients.up,
    ):
        assert torch.linalg.matrix_norm(left_over) < 1e-9 * scale


def test_single_precision_follows_double() -> None:
    problem = make(0, 7, 5, 2)
    x, t = problem.metric_in.float(), problem.output_curvature.float()
    single = aligned_step(
        x,
        t,
        Factors(*(tensor.float() for tensor in problem.factors)),
        Factors(*(tensor.float() for tensor in problem.gradients)),
    )
    assert single.down.dtype == single.up.dtype == torch.float32
    assert relative_error(single.down, problem.step().down) < 1e-3
    assert relative_error(single.up, problem.step().up) < 1e-3
