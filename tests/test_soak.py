"""A short soak, and that the long one would notice what it looks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fuzz.soak import Soak, Window, complaints


def test_nothing_grows_or_drifts_in_a_short_run() -> None:
    soak = Soak()
    for _ in range(300):  # until the loss has settled
        soak.step()
    windows = [soak.window(25) for _ in range(10)]
    assert complaints(windows, timed=False) == []
    assert not any(soak.optimizer.diagnostics().values())


STEADY = Window(1.0, 0.1, 1e-7, 1.0, 1e-3, 300.0, 50)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": 1.2},
        {"curvature_error": 0.2},
        {"skewness": 1e-2},
        {"size": 2.0},
        {"seconds": 2e-3},
        {"memory": 320.0},
        {"tensors": 51},
    ],
    ids=str,
)
def test_each_kind_of_growth_is_noticed(change: dict[str, float]) -> None:
    assert complaints([STEADY] * 10, timed=True) == []
    (complaint,) = complaints([*[STEADY] * 8, *[replace(STEADY, **change)] * 2], timed=True)
    assert next(iter(change)) in complaint or "orthonormal" in complaint
