"""A small share of ``make fuzz``, and hypothesis looking for the smallest bad seed."""

from __future__ import annotations

from collections import Counter, deque
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cg_optim.linalg import Rung
from tests.fuzz import matrices, problems

consume = partial(deque, maxlen=0)


def test_hopeless_problems_stay_finite_and_do_not_touch_healthy_ones() -> None:
    tally = problems.Tally()
    for seed in range(12):
        tally += problems.run(seed)
    # What is drawn must be bad enough to be worth it, and good enough to train at all.
    assert all(count > 0 for count in tally.events.values())
    assert tally.healthy > 0


@settings(max_examples=40)
@given(st.integers(1000, 2**31 - 1), st.integers(1, 3))
def test_few_problems_from_any_seed(seed: int, together: int) -> None:
    problems.run(seed, together)


def test_random_matrices_reach_every_rung() -> None:
    rungs: Counter[str] = Counter()
    for seed in range(150):
        rungs += matrices.run(seed, 20)
    assert set(rungs) == {rung.name for rung in Rung}


def test_the_check_sees_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does not look at its result would be found."""
    monkeypatch.setattr(
        "cg_optim.pair_step.all_finite", lambda value: value[:, 0, 0] == value[:, 0, 0]
    )
    with pytest.raises(AssertionError, match="not finite"):
        consume(map(problems.run, range(12)))
