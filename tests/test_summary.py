"""The table a user reads to see what is trained how."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer, LoRAPair
from cg_optim.errors import NoPairsWarning
from tests.models import LoRALinear, tagger


def test_each_pair_has_a_line_with_everything_about_it() -> None:
    model = nn.ModuleDict({"small": LoRALinear(6, 5, r=3, scaling=0.5), "wide": LoRALinear(200, 4)})
    optimizer = CGLoRAOptimizer(model)
    model["small"](torch.ones(1, 6)).sum().backward()
    optimizer.step()
    lines = optimizer.summary().splitlines()
    titles = lines[0].split()
    assert titles == ["layer", "kind", "A", "B", "rank", "scaling", "curvature"]
    rows = {line.split()[0]: line.split() for line in lines[2:4]}
    assert rows["small"][2:6] == ["3x6", "5x3", "3", "0.5"]
    assert rows["small"][6:] == ["hooks,", "dense", "6x6"]
    assert rows["wide"][2:6] == ["2x200", "4x2", "2", "2"]
    assert " ".join(rows["wide"][6:]).endswith("of 200 directions (nothing seen yet)")
    optimizer.remove_hooks()
    assert "hooks removed, dense 6x6" in optimizer.summary()


def test_pairs_are_counted_by_how_they_are_stepped() -> None:
    model = nn.ModuleDict({"small": LoRALinear(6, 5, r=3), "wide": LoRALinear(200, 4)})
    assert "\nLoRA: 2 pairs, 441 values; 2 with input curvature\n" in (
        CGLoRAOptimizer(model).summary()
    )
    model.a, model.b = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2))
    pairs = [LoRAPair(model.a, model.b, name="mine")]
    assert (
        "\nLoRA: 3 pairs, 459 values; 2 with input curvature and 1 by the gradient-only rule\n"
        in (CGLoRAOptimizer(model, pairs=pairs).summary())
    )
    only = CGLoRAOptimizer([model.a, model.b], pairs=pairs).summary()
    assert "\nLoRA: 1 pair, 18 values; 1 by the gradient-only rule\n" in only


def test_what_is_left_to_adamw_is_counted_and_named() -> None:
    text = CGLoRAOptimizer(tagger()).summary()
    assert "left to AdamW: 6 tensors, 59 values" in text
    assert "  head.weight 3x8: not a LoRA factor" in text


def test_without_names_parameters_are_numbered() -> None:
    with pytest.warns(NoPairsWarning):
        optimizer = CGLoRAOptimizer([nn.Parameter(torch.ones(2, 3))])
    assert optimizer.summary().splitlines()[0] == "no LoRA pairs"
    assert "  parameter 0 2x3: not a LoRA factor" in optimizer.summary()


def test_a_pair_without_modules_says_that_only_gradients_are_used() -> None:
    a, b = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2))
    text = CGLoRAOptimizer([a, b], pairs=[LoRAPair(a, b, name="mine")]).summary()
    assert "mine" in text
    assert "none: gradient only" in text


def test_half_a_pair_is_explained() -> None:
    model = nn.ModuleDict({"one": LoRALinear(6, 5), "two": LoRALinear(6, 5)})
    given = [*model["one"].parameters(), model["two"].lora_A.weight]
    given = [p for p in given if p.requires_grad]
    text = CGLoRAOptimizer(given, model=model).summary()
    assert "two" in text
    assert "B is not being optimised" in text


def test_a_declared_pair_that_is_not_among_the_parameters_is_mentioned() -> None:
    foreign = LoRALinear(6, 5)
    pair = LoRAPair(foreign.lora_A.weight, foreign.lora_B.weight, name="foreign")
    text = CGLoRAOptimizer(tagger(), pairs=[pair]).summary()
    assert "not optimised as pairs:\n  foreign: A and B are not being optimised" in text


def test_frozen_parameters_handed_over_are_called_frozen() -> None:
    model = tagger()
    text = CGLoRAOptimizer(model.parameters(), model=model).summary()
    assert "  embed.weight 11x8: frozen (requires_grad=False)" in text
    assert "  head.weight 3x8: not a LoRA factor" in text
