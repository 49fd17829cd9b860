"""Parts of bounded size, and that nothing depends on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cg_optim import CGLoRAOptimizer, stacks
from cg_optim.stacks import in_parts
from tests.models import assert_close, curvature_state, parameters_of, tagger, train


@given(st.lists(st.integers()), st.integers(0, 2 * stacks.MOST_ELEMENTS))
def test_parts_are_the_whole_and_within_the_bound(items: list[int], elements: int) -> None:
    parts = list(in_parts(items, elements))
    assert [item for part in parts for item in part] == items
    for part in parts:
        assert len(part) == 1 or len(part) * elements <= stacks.MOST_ELEMENTS
    if elements * len(items) <= stacks.MOST_ELEMENTS:
        assert len(parts) <= 1


@pytest.mark.parametrize("curvature", ["auto", 3])
def test_training_does_not_depend_on_the_parts(
    curvature: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[object, object]:
        model = tagger()
        optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature)
        train(model, optimizer, range(8))
        return parameters_of(model), curvature_state(model, optimizer)

    whole = trained()
    monkeypatch.setattr(stacks, "MOST_ELEMENTS", 1)
    assert_close(trained(), whole)
