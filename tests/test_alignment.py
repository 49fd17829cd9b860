"""The closed-form step against dense least squares, and its invariances, in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.alignment import Factors, weight_change
from tests.layer_problems import DTYPE, Problem, make, quick, root, shapes
from tests.strategies import (
    gaussian,
    generator,
    orthogonal,
    relative_error,
    scales,
    seeds,
)


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
