"""Statistics live and die with the gradient they came with: micro-batches, zeroing, clipping.

Everything is tested twice: where a gradient can be looked at, and where that would mean waiting.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer, host
from tests.models import (
    assert_close,
    assert_equal,
    batch,
    curvature_state,
    loss_of,
    parameters_of,
    snapshot,
    tagger,
    train,
)
from tests.test_hooks import N, gram, layer, mean_gram, wrapped


@pytest.fixture(autouse=True, params=["at hand", "elsewhere"])
def _where_values_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "elsewhere":
        monkeypatch.setattr(host, "at_hand", lambda tensor: False)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("missed", [1, 2])
def test_a_zeroed_gradient_takes_its_statistics_along(set_to_none: bool, missed: int) -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    for step in range(4):
        for skipped in range(missed):
            loss_of(model, batch(60 + skipped)).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
        train(model, optimizer, [step])
        train(reference, other, [step])
    assert_equal(snapshot(model, optimizer), snapshot(reference, other))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_zeroed_gradient_of_a_layer_unused_in_the_next_step(set_to_none: bool) -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    (one(torch.randn(3, N)).sum() + two(torch.full((3, N), torch.inf)).sum()).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    x = torch.randn(4, N)
    one(x).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))
    assert optimizer.diagnostics()["curvature update dropped"] == 0


def test_a_zeroed_gradient_is_forgotten_when_only_other_layers_come_next() -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    two(torch.randn(3, N)).square().sum().backward()
    optimizer.zero_grad()
    one(torch.randn(4, N)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    x = torch.randn(4, N)
    two(x).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, two), mean_gram(x))


@pytest.mark.parametrize("first", [0, 1])
def test_a_zeroed_gradient_of_one_consumer_only(first: int) -> None:
    """The other consumer's gradient arrives first and must not be forgotten with it."""
    layers = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(*layers))
    layers[1](torch.randn(3, N)).square().sum().backward()
    optimizer.zero_grad()
    x = torch.randn(4, N)
    loss = layers[first](x).square().sum()
    (loss + layers[1 - first](x).square().sum()).backward()
    optimizer.step()
    for each in layers:
        assert_close(gram(optimizer, each), mean_gram(x))


def test_a_partly_used_input_of_a_zeroed_gradient_is_forgotten() -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    x, y = torch.randn(6, N), torch.randn(4, N)
    unused = two(x)
    one(x).square().sum().backward()
    optimizer.zero_grad()
    (one(y) + two(y)).square().sum().backward()
    optimizer.step()
    assert unused is not None
    assert_close(gram(optimizer, one), mean_gram(y))


@pytest.mark.parametrize("split", [[4, 4], [2, 2, 2, 2], [5, 3], [7, 1]])
@pytest.mark.parametrize("curvature", ["auto", 3])
def test_micro_batches_equal_the_whole_batch(split: list[int], curvature: str | int) -> None:
    model, reference = tagger(), tagger()
    optimizer, other = (
        CGLoRAOptimizer(each, lr=1e-2, curvature=curvature) for each in (model, reference)
    )
    for step in range(4):
        data = batch(step, rows=8, padded=True)
        tokens = int((data[2] != -100).sum())
        for part in zip(*(tensor.split(split) for tensor in data), strict=True):
            (loss_of(model, part, "sum") / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        train(reference, other, [step], rows=8, padded=True)
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-3, atol=1e-5)
    assert_close(curvature_state(model, optimizer), curvature_state(reference, other), rtol=1e-3)


def test_zeroing_in_place_between_micro_batches_that_were_clipped() -> None:
    """Looked at while it held something, then zeroed, and unused in the next step."""
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    two(torch.randn(3, N)).square().sum().backward()
    nn.utils.clip_grad_norm_(two.parameters(), 1e-3)
    one(torch.randn(3, N)).square().sum().backward()
    optimizer.zero_grad(set_to_none=False)
    x = torch.randn(4, N)
    one(x).square().sum().backward()
    optimizer.step()
    assert int(optimizer.state[two.lora_A.weight]["input_updates"]) == 0
    assert_close(gram(optimizer, one), mean_gram(x))


def test_clipping_between_micro_batches_keeps_their_statistics() -> None:
    """Writing into .grad is not zeroing it."""
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one))
    x, y = torch.randn(4, N), torch.randn(3, N)
    for part in (x, y):
        one(part).square().sum().backward()
        nn.utils.clip_grad_norm_(one.parameters(), 1e-3)
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x, y))


@pytest.mark.filterwarnings("ignore::cg_optim.errors.UnobservedPairWarning")
def test_a_forward_from_before_loading_does_not_count_after_it() -> None:
    model = wrapped(layer())
    optimizer = CGLoRAOptimizer(model)
    model[0](torch.randn(4, N)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = gram(optimizer, model[0]).clone()
    loss = model[0](torch.randn(4, N)).square().sum()
    optimizer.load_state_dict(optimizer.state_dict())
    loss.backward()
    optimizer.step()
    assert torch.equal(gram(optimizer, model[0]), before)


def test_a_retained_graph_run_twice_neither_fails_nor_counts_twice() -> None:
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one))
    x = torch.randn(4, N)
    loss = one(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))
