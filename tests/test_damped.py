"""Both damped forms of the input curvature are the matrix they say they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.damped import DampedGram, DampedInput, DampedLowRank, stack_damped
from tests.strategies import (
    dampings,
    gaussian,
    generator,
    relative_error,
    scales,
    seeds,
    semidefinite,
)

quick = settings(max_examples=30, deadline=None)
N, K = 7, 3


def both(seed: int, damping: float, scale: float = 1.0) -> list[tuple[DampedInput, Tensor]]:
    """Each form with ``(X / mean + damping I) / (1 + damping)``, built densely."""
    source = generator(seed)
    gram = scale * semidefinite(source, N)
    basis = torch.linalg.qr(gaussian(source, N, K)).Q
    factor = scale**0.5 * gaussian(source, K, K)
    tail = torch.tensor(0.2 * scale, dtype=torch.float64)
    low = (
        tail * (torch.eye(N, dtype=torch.float64) - basis @ basis.mT)
        + basis @ factor @ factor.mT @ basis.mT
    )
    cases: list[tuple[DampedInput, Tensor]] = []
    for dense in (gram, low):
        mean = dense.trace() / N
        expected = (dense / mean + damping * torch.eye(N, dtype=torch.float64)) / (1 + damping)
        if dense is gram:
            cases.append((DampedGram.from_gram(gram, mean, damping), expected))
        else:
            several = (torch.stack([each]) for each in (factor, tail, mean))
            cases.append((*DampedLowRank.from_factors([basis], *several, damping), expected))
    return cases


@quick
@given(seeds, dampings, scales(30))
def test_whitening_squares_to_the_inverse(seed: int, damping: float, scale: float) -> None:
    eye = torch.eye(N, dtype=torch.float64)
    for form, expected in both(seed, damping, scale):
        whitening = form.whitening()
        inverse = whitening.apply_transposed(whitening.apply(eye))
        assert relative_error(inverse @ expected, eye) < 1e-9


@quick
@given(seeds, dampings, scales(30))
def test_hidden_gram_uses_the_damped_matrix(seed: int, damping: float, scale: float) -> None:
    down = gaussian(generator(seed + 1), 2, N)
    for form, expected in both(seed, damping, scale):
        assert relative_error(form.hidden_gram(down), down @ expected @ down.mT) < 1e-10


@quick
@given(seeds, st.tuples(dampings, dampings).map(sorted))
def test_more_damping_is_closer_to_no_whitening(seed: int, two: list[float]) -> None:
    eye = torch.eye(N, dtype=torch.float64)
    for less, more in zip(both(seed, two[0]), both(seed, two[1]), strict=True):
        far, near = (form.hidden_gram(eye) - eye for form, _ in (less, more))
        assert near.norm() <= far.norm() * (1 + 1e-9)


def test_isotropic_inputs_give_the_identity() -> None:
    eye = torch.eye(N)
    form = DampedGram.from_gram(5.0 * eye, torch.tensor(5.0), 0.1)
    torch.testing.assert_close(form.whitening().apply(eye), eye)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-12, 1e12, 1e30])
def test_single_precision_stays_finite_at_any_scale(scale: float) -> None:
    gram = scale * semidefinite(generator(0), N, rank=2).float()
    mean = gram.diagonal().mean()
    applied = DampedGram.from_gram(gram, mean, 1e-3).whitening().apply(torch.eye(N))
    assert bool(torch.isfinite(applied).all())
    if scale == 0:
        torch.testing.assert_close(applied, torch.eye(N))


def test_stacking_changes_nothing() -> None:
    down = gaussian(generator(9), 2, N)
    for which in (0, 1):
        forms = [both(seed, 0.1)[which][0] for seed in range(3)]
        stacked = stack_damped(forms)
        right = down.expand(3, 2, N)
        for index, form in enumerate(forms):
            torch.testing.assert_close(
                stacked.whitening().apply(right)[index], form.whitening().apply(down)
            )
            torch.testing.assert_close(stacked.hidden_gram(right)[index], form.hidden_gram(down))
