"""The rule against Adam, against explicit float64 matrices, and on hopeless input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

from cg_optim.damped import DampedGram
from cg_optim.rule import (
    AdamSettings,
    Moments,
    bias_correction,
    hidden_whitening,
    spectral_shortening,
    whitened_adam,
)

SETTINGS = AdamSettings(0.9, 0.999, 1e-8)
NO_MOMENTUM = AdamSettings(0.0, 0.999, 1e-8)


def fresh(*shape: int, dtype: torch.dtype = torch.float64) -> Moments:
    """Moments before the first step of a stack of matrices."""
    zeros = torch.zeros(shape, dtype=dtype)
    return Moments(torch.zeros(shape[:-2]), zeros, zeros.clone())


def gradients(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def gram(n: int, seed: int = 0, power: float = 2.0) -> Tensor:
    """An input curvature ``(n, n)`` whose eigenvalues fall polynomially."""
    generator = torch.Generator().manual_seed(100 + seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return basis * torch.arange(1, n + 1, dtype=torch.float64) ** -power @ basis.T


def damped(x: Tensor, damping: float) -> DampedGram:
    return DampedGram.from_gram(x, x.diagonal().mean(), damping)


def test_without_whitening_and_momentum_it_is_bounded_adam() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    adam = AdamW([parameter], lr=1.0, weight_decay=0.0, betas=(0.0, 0.999))
    moments = fresh(3, 5)
    for grad in gradients(7, 3, 5):
        before = parameter.detach().clone()
        parameter.grad = grad.clone()
        adam.step()
        direction = whitened_adam(grad, moments, None, NO_MOMENTUM)
        moments, step = direction.moments, before - parameter.detach()
        torch.testing.assert_close(direction.value, step * spectral_shortening(step))


def test_the_look_ahead_is_a_weighted_mean_of_all_gradients() -> None:
    """Nesterov: the newest gradient counts as if it came twice; the weights sum to one."""
    momentum, grads = 0.7, gradients(5, 2, 3)
    moments = fresh(2, 3)
    for count, grad in enumerate(grads, start=1):
        direction = whitened_adam(grad, moments, None, AdamSettings(momentum, 0.999, 1e-8))
        moments = direction.moments
        weights = [momentum ** (count - i) for i in range(count)]  # the oldest first
        weights[-1] += 1.0
        total = sum(weights)
        mean = sum((w / total * g for w, g in zip(weights, grads, strict=False)), torch.zeros(2, 3))
        square = sum(0.999 ** (count - 1 - i) * 0.001 * grads[i].square() for i in range(count))
        unit = mean / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        torch.testing.assert_close(direction.value, unit * spectral_shortening(unit))


@given(
    st.integers(0, 10_000),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 4),
    st.floats(1e-30, 1e30),
)
@settings(deadline=None, max_examples=80)
def test_the_spectral_norm_of_a_step_is_bounded(
    seed: int, rows: int, columns: int, rank: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    matrix = (left @ right) / (left @ right).abs().max().clamp_min(1e-6) * scale
    tau = float(spectral_shortening(matrix))
    bound = math.sqrt(max(rows, columns))
    norm = float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    loosest = min(rows, columns) ** (1 / 32)
    assert tau * norm <= bound * (1 + 1e-5)
    if norm * loosest <= bound * (1 - 1e-5):
        assert tau == 1.0
    else:
        assert tau * norm * loosest >= bound * (1 - 1e-4) or tau == 1.0


def test_a_step_of_zero_is_not_shortened() -> None:
    assert spectral_shortening(torch.zeros(2, 3, 4)).tolist() == [[[1.0]], [[1.0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 1.0))
@settings(max_examples=40)
def test_steps_of_any_size_are_bounded_in_any_precision(
    dtype: torch.dtype, seed: int, rows: int, columns: int, part: float
) -> None:
    """From the smallest denormal to the largest number, where the norm itself overflows."""
    numbers = torch.finfo(dtype)
    smallest, largest = (
        math.log2(x) for x in (numbers.smallest_normal * numbers.eps, numbers.max / 2)
    )
    exponent = smallest + part * (largest - smallest)
    matrix = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    matrix = (matrix * 2.0**exponent).to(dtype)
    tau = spectral_shortening(matrix).double()
    assert 0.0 < float(tau) <= 1.0
    norm, bound = torch.linalg.matrix_norm(matrix.double(), ord=2), math.sqrt(max(rows, columns))
    # A factor below the smallest normal number is not exact.
    rounding = 16 * numbers.eps * bound + norm * numbers.smallest_normal * numbers.eps
    assert float(tau * norm) <= bound + float(rounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_shortening_does_not_hide_what_is_not_finite(bad: float) -> None:
    matrix = torch.full((3, 4, 5), 7.0)
    expected = spectral_shortening(matrix)
    matrix[1, 2, 3] = bad
    tau = spectral_shortening(matrix)
    assert torch.equal(tau[::2], expected[::2])
    assert not bool(torch.isfinite(matrix[1] * tau[1]).all())


KINDS = {
    "gaussian": lambda x: x,
    "a row of zeros": lambda x: x * (torch.arange(x.shape[-2]) > 0)[:, None],
    "one entry": lambda x: x * (torch.arange(x.numel()) == 0).view_as(x),
    "constant": torch.ones_like,
    "rank one": lambda x: x[:, :1] * x[:1],
    "wide range": lambda x: x * torch.logspace(0, -40, x.numel(), dtype=x.dtype).view_as(x),
    "zero": torch.zeros_like,
}


@given(
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(sorted(KINDS)),
    st.floats(-1.0, 0.48),
    st.sampled_from([0.0, 0.5, 0.8, 0.999, 1 - 1e-9]),
    st.sampled_from([0.0, 0.9, 0.999, 1 - 1e-9]),
    st.sampled_from([0.0, 1e-30, 1e-8, 1.0]),
    st.sampled_from([0.0, 1.0, 1e3, 2.0**24, 1e12]),
)
@settings(max_examples=250)
def test_no_finite_gradient_makes_a_step_that_is_not_finite_or_not_bounded(
    seed: int,
    dtype: torch.dtype,
    kind: str,
    size: float,
    momentum: float,
    beta2: float,
    eps: float,
    taken: float,
) -> None:
    """Gradients up to the root of the largest number, of which the squares are finite.

    ``size`` is their logarithm relative to that of the largest number; -1 is denormal.
    """
    adam = AdamSettings(momentum, beta2, eps)
    scale = torch.finfo(dtype).max ** size
    moments = fresh(3, 4, dtype=dtype)._replace(step=torch.tensor(taken))
    for number in range(3):
        (grad,) = gradients(1, 3, 4, seed=seed + number)
        grad = (KINDS[kind](grad.clamp(-3, 3)) * scale).to(dtype)
        direction = whitened_adam(grad, moments, None, adam)
        moments = direction.moments
        assert bool(direction.usable)
        for tensor in (direction.value, *moments):
            assert bool(torch.isfinite(tensor).all())
        norm = torch.linalg.matrix_norm(direction.value.double(), ord=2)
        assert float(norm) <= 2.0 * (1 + 1e-5)
        assert float(moments.step) == float(
            torch.tensor(min(taken + number + 1, max(taken, 2.0**24)))
        )


@pytest.mark.parametrize("momentum", [0.0, 0.8, 0.999])
def test_after_very_many_steps_bias_corrections_are_gone(momentum: float) -> None:
    """The count, in float32 as torch.optim's, stops at ``2^24``; nothing depends on it there."""
    adam, (grad, *_) = AdamSettings(momentum, 0.999, 1e-8), gradients(1, 3, 4)
    start = fresh(3, 4)._replace(exp_avg=grad, exp_avg_sq=grad.square())
    for taken in (1e6, 2.0**24, 1e30):
        direction = whitened_adam(grad, start._replace(step=torch.tensor(taken)), None, adam)
        unit = grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(direction.value, unit * spectral_shortening(unit))


def test_isotropic_inputs_give_adam() -> None:
    whitening = damped(7.0 * torch.eye(5, dtype=torch.float64), 0.3).whitening()
    plain, white = fresh(3, 5), fresh(3, 5)
    for grad in gradients(4, 3, 5):
        expected = whitened_adam(grad, plain, None, SETTINGS)
        found = whitened_adam(grad, white, whitening, SETTINGS)
        plain, white = expected.moments, found.moments
        torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=1e-9)


def test_it_is_adam_in_the_whitened_coordinates_as_long_as_adam_there() -> None:
    """Against explicit matrices: ``M' = M K^-T`` has the gradient ``G K``."""
    whitening = damped(gram(5), 0.1).whitening()
    k = torch.linalg.inv(whitening.factor).T
    torch.testing.assert_close(k @ k.T, torch.linalg.inv(whitening.factor @ whitening.factor.T))
    parameter = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    adam = AdamW([parameter], lr=1.0, weight_decay=0.0, betas=(0.0, 0.999))
    moments = fresh(3, 5)
    for grad in gradients(6, 3, 5):
        before = parameter.detach().clone()
        parameter.grad = grad @ k
        adam.step()
        unit = before - parameter.detach()
        direction = whitened_adam(grad, moments, whitening, NO_MOMENTUM)
        moments = direction.moments
        expected = unit @ k.T
        expected = expected * unit.norm() / expected.norm() * spectral_shortening(unit)
        torch.testing.assert_close(direction.value, expected, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-12, 1e12))
@settings(deadline=None, max_examples=40)
def test_scales_of_inputs_and_loss_do_not_matter(
    seed: int, input_scale: float, loss_scale: float
) -> None:
    settings_ = AdamSettings(0.9, 0.999, 0.0)
    x = gram(6, seed)
    plain, scaled = fresh(2, 6), fresh(2, 6)
    for grad in gradients(3, 2, 6, seed=seed):
        first = whitened_adam(grad, plain, damped(x, 0.2).whitening(), settings_)
        other = damped(x * input_scale**2, 0.2).whitening()
        second = whitened_adam(grad * loss_scale, scaled, other, settings_)
        plain, scaled = first.moments, second.moments
        torch.testing.assert_close(second.value, first.value, rtol=1e-7, atol=1e-10)


def test_more_damping_is_closer_to_adam() -> None:
    grads = gradients(5, 3, 8)

    def last(damping: float | None) -> Tensor:
        whitening = None if damping is None else damped(gram(8), damping).whitening()
        moments = fresh(3, 8)
        for grad in grads:
            direction = whitened_adam(grad, moments, whitening, SETTINGS)
            moments = direction.moments
        return direction.value

    adam = last(None)
    distances = [float((last(damping) - adam).norm()) for damping in (1e-3, 1e-1, 1e1, 1e3)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-2 * adam.norm()


def test_zero_gradients_do_not_move() -> None:
    zero = torch.zeros(2, 3, 4, dtype=torch.float64)
    direction = whitened_adam(zero, fresh(2, 3, 4), damped(gram(4), 0.1).whitening(), SETTINGS)
    assert bool(direction.usable.all())
    assert float(direction.value.abs().max()) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_bad_gradient_is_reported_and_touches_no_other(bad: float) -> None:
    grad = gradients(1, 3, 2, 4)[0].float()
    good = whitened_adam(grad, fresh(3, 2, 4, dtype=torch.float32), None, SETTINGS)
    broken = grad.clone()
    broken[1, 0, 2] = bad
    before = fresh(3, 2, 4, dtype=torch.float32)
    direction = whitened_adam(broken, before, None, SETTINGS)
    assert direction.usable.tolist() == [True, False, True]
    for new, clean in zip(direction.moments, good.moments, strict=True):
        torch.testing.assert_close(new[::2], clean[::2])
    torch.testing.assert_close(direction.value[::2], good.value[::2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-7)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_bias_correction_is_exact(beta: float, dtype: torch.dtype, tolerance: float) -> None:
    steps = torch.tensor([1.0, 2.0, 100.0, 1e6], dtype=dtype)
    exact = [-math.expm1(int(t) * math.log(beta)) if beta else 1.0 for t in steps]
    found = bias_correction(beta, steps).double()
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@given(st.integers(0, 1000), st.sampled_from([1e-12, 1.0, 1e12]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_hidden_whitening_inverts_the_damped_p(seed: int, scale: float, known: bool) -> None:
    """``K K^T`` is the inverse of ``P / mean + damping I``, normalised; of any scale of A."""
    generator = torch.Generator().manual_seed(seed)
    down = scale * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    x = gram(5, seed)
    model = damped(x, 0.2) if known else None
    whitening = hidden_whitening(down, model, 0.2)
    matrix = damped(x, 0.2).matrix if known else torch.eye(5, dtype=torch.float64)
    p = down @ matrix @ down.mT
    mean = p.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    expected = (p / mean + 0.2 * torch.eye(3, dtype=torch.float64)) / 1.2
    k = whitening.matrix
    torch.testing.assert_close(k @ k.mT, torch.linalg.inv(expected))


def test_hidden_whitening_of_a_zero_or_deficient_a_is_finite() -> None:
    down = torch.zeros(2, 3, 5)
    down[1, 0] = 1.0  # rank 1
    assert bool(torch.isfinite(hidden_whitening(down, None, 0.1).matrix).all())


def test_without_eps_entries_that_never_had_a_gradient_stay() -> None:
    grad = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    direction = whitened_adam(grad, fresh(2, 2), None, AdamSettings(0.9, 0.999, 0.0))
    assert bool(direction.usable)
    # Both entries of size one make a spectral norm of sqrt(2), which is the bound.
    expected = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(direction.value, expected)
