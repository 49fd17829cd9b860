"""``curvature_init_`` in mode "keep": another ``A`` and the same function."""

from __future__ import annotations

import pytest
import torch

from cg_optim import curvature_init_
from tests.initialisation_models import (
    BATCHES,
    KINDS,
    built,
    fresh_tagger,
    regression,
    squares,
    state,
)
from tests.models import loss_of, parameters_of


@pytest.mark.parametrize("kind", KINDS)
def test_keep_changes_a_alone_and_no_output_bit(kind: str) -> None:
    model = built(kind)
    data = [regression(seed) for seed in range(2)]
    x = data[0][0].to(next(p for p in model.parameters() if not p.requires_grad).dtype)
    before, outputs = state(model), model(x)
    report = curvature_init_(model, data, squares)
    assert torch.equal(model(x), outputs)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_A" in name}
    for name in changed:
        torch.testing.assert_close(model.state_dict()[name].norm(), before[name].norm())
    assert len(report.layers) == 2
    assert not report.left_out


def test_scale_of_the_loss_does_not_matter_to_keep() -> None:
    results = []
    for scale in (1.0, 2.0**20):
        model = fresh_tagger()
        curvature_init_(model, BATCHES, lambda m, b, s=scale: s * loss_of(m, b))
        results.append(parameters_of(model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
