"""Stacked steps against single ones, and what is written back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cg_optim.damped import DampedGram, DampedLowRank
from cg_optim.pair_step import FactorWork, PairWork, step_pairs
from cg_optim.rule import AdamSettings, Moments, hidden_whitening, whitened_adam

SETTINGS = AdamSettings(0.9, 0.999, 1e-8)
DAMPING = 0.3


def factor(value: Tensor, grad: Tensor | None, **options: Any) -> FactorWork:
    state = Moments(torch.zeros(()), torch.zeros(value.shape), torch.zeros(value.shape))
    state = Moments(*(t.to(value.dtype) if value.dtype == torch.float64 else t for t in state))
    settings = {"lr": 0.01, "weight_decay": 0.1, **options}
    return FactorWork(value, grad, state, settings["lr"], settings["weight_decay"], SETTINGS)


def curvature(n: int, generator: torch.Generator, dtype: torch.dtype) -> DampedGram:
    rows = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    x = (rows.T @ rows / (3 * n)).to(dtype)
    return DampedGram.from_gram(x, x.diagonal().mean(), DAMPING)


def pair(seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> PairWork:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    a = factor(random(2, 5), random(2, 5), **options)
    b = factor(random(4, 2), random(4, 2), **options)
    return PairWork(a, b, curvature(5, generator, dtype), DAMPING)


def values(work: list[PairWork]) -> list[Tensor]:
    return [
        tensor.clone() for item in work for f in (item.a, item.b) for tensor in (f.value, *f.state)
    ]


def test_a_stack_steps_as_its_pairs_do_alone() -> None:
    together, alone = [pair(s) for s in range(4)], [pair(s) for s in range(4)]
    for _ in range(3):
        assert len(step_pairs(together)) == 1
        for item in alone:
            step_pairs([item])
    for one, other in zip(values(together), values(alone), strict=True):
        torch.testing.assert_close(one, other)


def test_float32_stack_follows_the_float64_rule() -> None:
    """The fast path against the pure rule, one pair at a time, in double precision."""
    fast, slow = [pair(s) for s in range(3)], [pair(s, torch.float64) for s in range(3)]
    step_pairs(fast)
    for item, exact in zip(fast, slow, strict=True):
        assert exact.damped is not None
        assert exact.a.grad is not None
        assert exact.b.grad is not None
        whitening = exact.damped.whitening()
        hidden = hidden_whitening(exact.a.value, exact.damped, DAMPING)
        for one, other, k in ((item.a, exact.a, whitening), (item.b, exact.b, hidden)):
            direction = whitened_adam(other.grad, other.state, k, SETTINGS)
            expected = other.value * (1 - 0.01 * 0.1) - 0.01 * direction.value
            torch.testing.assert_close(one.value.double(), expected, rtol=1e-5, atol=1e-6)


def test_pairs_of_other_shapes_settings_or_damping_are_stacked_apart() -> None:
    base, other = pair(0), pair(1)
    strong = PairWork(other.a, other.b, other.damped, 2 * DAMPING)
    blind = PairWork(pair(2).a, pair(2).b, None, DAMPING)
    basis = torch.linalg.qr(torch.randn(5, 2)).Q
    core = torch.tensor([3.0, 2.0])
    directions = DampedLowRank(basis, core.diag(), core.rsqrt().diag(), torch.tensor(0.5))
    low_rank = PairWork(pair(3).a, pair(3).b, directions, DAMPING)
    keys = {item.stacking_key() for item in (base, strong, blind, low_rank)}
    assert len(keys) == 4
    assert base.stacking_key() == other.stacking_key()
    assert [int(skipped.sum()) for _, skipped in step_pairs([base, strong, blind, low_rank])] == [
        0
    ] * 4


def test_a_bad_pair_keeps_everything_and_the_others_move() -> None:
    work, clean = [pair(s) for s in range(3)], [pair(s) for s in range(3)]
    assert work[1].b.grad is not None
    work[1].b.grad[0, 0] = math.nan
    before = values([work[1]])
    ((_, skipped),) = step_pairs(work)
    step_pairs(clean)
    assert skipped.tolist() == [False, True, False]
    for new, old in zip(values([work[1]]), before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    for one, other in zip(values([work[0], work[2]]), values([clean[0], clean[2]]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_that_would_leave_the_range_of_the_parameter_is_skipped() -> None:
    work = pair(0, lr=1e38, weight_decay=100.0)
    before = values([work])
    ((_, skipped),) = step_pairs([work])
    assert skipped.tolist() == [True]
    for new, old in zip(values([work]), before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_each_pair_has_its_own_learning_rate_and_decay() -> None:
    apart = [pair(0, lr=0.5), pair(1, lr=torch.tensor(0.25), weight_decay=0.0)]
    single = [pair(0, lr=0.5), pair(1, lr=0.25, weight_decay=0.0)]
    assert len(step_pairs(apart)) == 2
    for item in single:
        step_pairs([item])
    for one, other in zip(values(apart), values(single), strict=True):
        torch.testing.assert_close(one, other)


def test_a_factor_without_gradient_stays_and_the_other_moves() -> None:
    whole, half = pair(0), pair(0)
    half = PairWork(
        FactorWork(half.a.value, None, half.a.state, 0.01, 0.1, SETTINGS),
        half.b,
        half.damped,
        DAMPING,
    )
    before = half.a.value.clone()
    step_pairs([half])
    step_pairs([whole])
    torch.testing.assert_close(half.a.value, before)
    torch.testing.assert_close(half.b.value, whole.b.value)


def test_views_of_transposed_parameters_are_written_through() -> None:
    straight = pair(0)
    stored = straight.a.value.t().contiguous()
    view = FactorWork(stored.t(), straight.a.grad, pair(0).a.state, straight.a.lr, 0.1, SETTINGS)
    step_pairs([PairWork(view, pair(0).b, straight.damped, DAMPING)])
    step_pairs([straight])
    torch.testing.assert_close(stored.t(), straight.a.value)
