"""State dicts somebody has damaged at random: refused as a whole, or loaded and usable."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import CGOptimWarning, StateError
from tests.models import Tagger, assert_equal, snapshot, tagger, train

#: What may take the place of anything in a state dict.
VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "text": lambda: "exp_avg",
    "true": lambda: True,
    "negative": lambda: -1,
    "large": lambda: 2**70,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "complex": lambda: 1j,
    "list": lambda: [1, [2]],
    "dict": lambda: {"state": {}},
    "set": lambda: {1},
    "bytes": lambda: b"\x80\x04",
    "object": object,
    "scalar tensor": lambda: torch.tensor(3.0),
    "nan tensor": lambda: torch.tensor(float("nan")),
    "empty tensor": lambda: torch.empty(0),
}
#: What may happen to a tensor, whose shape stays.
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda t: torch.full_like(t.float(), float("nan")),
    "infinity": lambda t: torch.full_like(t.float(), float("inf")),
    "negative": lambda t: -torch.ones_like(t.float()),
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.to(torch.int32),
    "boolean": lambda t: t.bool(),
    "half": lambda t: t.half(),
    "huge": lambda t: torch.full_like(t.float(), 3e38),
    "beyond float32": lambda t: torch.full_like(t.double(), 1e300),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.ndim else t.to("meta"),
    "transposed": lambda t: t.mT if t.ndim == 2 else t[None],
    "random": lambda t: torch.randn(t.shape),
    "shared": lambda t: torch.zeros((), dtype=torch.float32).expand(t.shape),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "needs a gradient": lambda t: t.float().clone().requires_grad_(),
}


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += paths(inner, (*prefix, key))
    return found


def damage(saved: dict[str, Any], choose: random.Random) -> str:
    """Change one place at random; what was done, in words."""
    places = paths(saved)
    # The many entries of 'params' would otherwise take most of the draws.
    places = [p for p in places if "params" not in p[:-1] or choose.random() < 0.1]
    *way, last = choose.choice(places)
    inner = saved
    for key in way:
        inner = inner[key]
    value = inner[last]
    if isinstance(value, Tensor) and choose.random() < 0.7:
        name = choose.choice(sorted(TENSORS))
        inner[last] = TENSORS[name](value)
    elif choose.random() < 0.2:
        name = "missing"
        del inner[last]
    else:
        name = choose.choice(sorted(VALUES))
        inner[last] = VALUES[name]()
    return f"{[*way, last]}: {name}"


@pytest.fixture(scope="module")
def trained() -> tuple[Tagger, dict[str, Any], dict[str, Any]]:
    """A model, the state of its optimizer with and without low rank."""
    model = tagger()
    states = []
    for curvature in ("auto", 3):
        optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature)
        train(model, optimizer, range(2))
        states.append(copy.deepcopy(optimizer.state_dict()))
        optimizer.remove_hooks()
    return model, states[0], states[1]


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_refused_or_harmless(
    trained: tuple[Tagger, dict[str, Any], dict[str, Any]], seed: int
) -> None:
    model, dense, low_rank = trained
    choose = random.Random(seed)
    refused = 0
    for _ in range(40):
        curvature, state = choose.choice((("auto", dense), (3, low_rank)))
        saved = copy.deepcopy(state)
        what = [damage(saved, choose) for _ in range(choose.choice((1, 1, 2)))]
        mine = copy.deepcopy(model)
        optimizer = CGLoRAOptimizer(mine, lr=1e-2, curvature=curvature)
        train(mine, optimizer, range(1))
        before = snapshot(mine, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", CGOptimWarning)
            try:
                optimizer.load_state_dict(saved)
            except StateError:
                refused += 1
                assert_equal(snapshot(mine, optimizer), before)
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            train(mine, optimizer, range(1, 4))
        for parameter in mine.parameters():
            tensors = [parameter.detach(), *optimizer.state.get(parameter, {}).values()]
            assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors), what
    assert 0 < refused < 40


def test_tensors_in_one_file_and_numbers_in_another_are_enough(tmp_path: Path) -> None:
    """As safetensors and JSON have it: no pickle anywhere."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(7))
    saved = optimizer.state_dict()
    # safetensors stores nothing twice; q, k and v share one curvature.
    tensors = {
        f"{index}/{name}": value.clone()
        for index, values in saved["state"].items()
        for name, value in values.items()
    }
    safetensors.save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "groups.json").write_text(json.dumps(saved["param_groups"]))

    state: dict[int, dict[str, Tensor]] = {}
    for key, value in safetensors.load_file(tmp_path / "optimizer.safetensors").items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    groups = json.loads((tmp_path / "groups.json").read_text())
    other = tagger(seed=7)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = CGLoRAOptimizer(other, lr=0.5)
    resumed.load_state_dict({"state": state, "param_groups": groups})
    train(model, optimizer, range(7, 14))
    train(other, resumed, range(7, 14))
    left, right = snapshot(other, resumed), snapshot(model, optimizer)
    for each in (left, right):  # JSON has no tuples
        each["optimizer"]["param_groups"][0]["betas"] = tuple(
            each["optimizer"]["param_groups"][0]["betas"]
        )
    assert_equal(left, right)
