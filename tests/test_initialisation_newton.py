"""``curvature_init_`` in mode "newton": the step that is taken, and how it is searched for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cg_optim import curvature_init_, find_lora_pairs
from tests.initialisation_models import (
    BATCHES,
    KINDS,
    built,
    fresh_tagger,
    regression,
    squares,
    state,
    weight_of,
)
from tests.models import assert_equal, loss_of, parameters_of
from tests.strategies import relative_error


@pytest.mark.parametrize("kind", KINDS)
def test_newton_lowers_the_loss_of_the_first_batch_and_leaves_the_base_alone(kind: str) -> None:
    model = built(kind)
    data = [regression(seed) for seed in range(2)]
    before = state(model)
    report = curvature_init_(model, data, squares, mode="newton")
    assert report.length is not None
    assert report.loss_after is not None
    assert report.loss_before is not None
    with torch.no_grad():
        torch.testing.assert_close(float(squares(model, data[0])), report.loss_after)
    assert report.loss_after < report.loss_before
    for name, value in state(model).items():
        assert torch.equal(value, before[name]) != ("lora_A" in name or "lora_B" in name)


@pytest.mark.parametrize("kind", ["peft", "rslora", "loralib", "home-made", "conv1d"])
def test_a_full_newton_step_does_not_depend_on_where_the_gradient_is_seen(kind: str) -> None:
    """Hooks on B's module see ``s g``, those on the layer ``g``; ``s B A`` must be the same."""
    model = built(kind)
    reference = built("home-made" if kind == "peft" else "peft")
    copy_base(model, reference)
    steps = []
    for each in (model, reference):
        curvature_init_(each, [regression()], squares, mode="newton", length=0.1)
        first = find_lora_pairs(each).pairs[0]
        down, up = first.as_matrices(first.A.detach(), first.B.detach())
        steps.append(first.scaling * up @ down)
    assert relative_error(*steps) < 1e-3


def copy_base(source: nn.Module, target: nn.Module) -> None:
    pairs = zip(find_lora_pairs(source).pairs, find_lora_pairs(target).pairs, strict=True)
    for one, two in pairs:
        weight_of(two, target).copy_(weight_of(one, source))
        bases = [getattr(p.input_module, "base_layer", p.input_module) for p in (one, two)]
        bases[1].bias.data.copy_(bases[0].bias.data)


def test_an_error_in_the_search_leaves_the_adapters_as_they_were() -> None:
    model = fresh_tagger()
    before = parameters_of(model)
    searched = 0

    def loss(model: nn.Module, data: Any) -> Tensor:
        nonlocal searched
        searched += not torch.is_grad_enabled()
        if searched == 1:  # what factors of that length do is never learnt
            raise KeyboardInterrupt
        return loss_of(model, data)

    with pytest.raises(KeyboardInterrupt):
        curvature_init_(model, BATCHES, loss, mode="newton")
    assert_equal(parameters_of(model), before)


def test_cross_entropy_with_labels_of_the_models_own() -> None:
    """The way to use ``sampled_loss_fn`` for a classifier."""

    def sampled(model: nn.Module, data: Any) -> Tensor:
        tokens, mask, labels = data
        logits = model(tokens, mask).flatten(0, 1)
        drawn = logits.detach().softmax(-1).multinomial(1).squeeze(-1)
        return functional.cross_entropy(logits, drawn.where(labels.flatten() >= 0, -100))

    model = fresh_tagger()
    report = curvature_init_(model, BATCHES, loss_of, mode="newton", sampled_loss_fn=sampled)
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
