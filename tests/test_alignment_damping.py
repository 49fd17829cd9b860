"""Damped, at B = 0, in stacks and in trouble: the closed-form step."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cg_optim.alignment import Factors, aligned_step, weight_change
from tests.layer_problems import DTYPE, at_start, make, quick, root, shapes
from tests.strategies import (
    conditions,
    relative_error,
    scales,
    seeds,
)

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
