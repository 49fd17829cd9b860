"""A compiled model trains like an eager one, or it is said that the hooks cannot run."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import UnobservedPairWarning
from tests.models import assert_close, batch, curvature_state, loss_of, parameters_of, tagger, train

# The default needs a C++ compiler; the others compile to Python functions.
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                sys.platform == "win32" or not (shutil.which("g++") or shutil.which("clang++")),
                reason="needs a C++ compiler",
            ),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_after_the_optimizer_was_built(backend: str) -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnobservedPairWarning)
        train(compiled, optimizer, range(3), padded=True)
    train(reference, other, range(3), padded=True)
    assert_close(curvature_state(model, optimizer), curvature_state(reference, other))
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-3, atol=1e-5)


def test_an_optimizer_may_be_given_the_compiled_model_before_its_first_call() -> None:
    model, reference = tagger(), tagger()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = CGLoRAOptimizer(compiled, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    train(compiled, optimizer, range(3))
    train(reference, other, range(3))
    assert_close(curvature_state(model, optimizer), curvature_state(reference, other))
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-3, atol=1e-5)


def test_statistics_pause_and_go_on_in_compiled_code() -> None:
    """Which steps collect must not be frozen into the compiled code."""
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    train(torch.compile(model, backend="eager"), optimizer, range(18))
    train(reference, other, range(18))
    updates = [int(v) for k, v in curvature_state(model, optimizer).items() if "updates" in k]
    expected = [int(v) for k, v in curvature_state(reference, other).items() if "updates" in k]
    assert updates == expected
    assert 0 < max(updates) < 18
    optimizer.remove_hooks()
    loss_of(model, batch()).backward()


@pytest.mark.parametrize("which", ["this model", "another of its class"])
def test_compiled_before_the_optimizer_was_built_is_reported(which: str) -> None:
    model = tagger()
    first = model if which == "this model" else tagger(1)
    loss_of(torch.compile(first, backend="eager"), batch()).backward()
    model.zero_grad()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UnobservedPairWarning, match="compiled before the optimizer") as caught:
        train(compiled, optimizer, range(3))
    assert len(caught) == 1
    assert "torch._dynamo.reset()" in str(caught[0].message)
    assert not any(v.any() for k, v in curvature_state(model, optimizer).items() if "trace" in k)
    torch._dynamo.reset()
    train(compiled, optimizer, range(3, 5))
    assert all(v > 0 for k, v in curvature_state(model, optimizer).items() if "trace" in k)
