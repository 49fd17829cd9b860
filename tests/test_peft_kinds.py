"""Every kind of PEFT adapter really trains, and the README's table says what becomes of it."""

from __future__ import annotations

import functools
import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
from benchmarks import peft_kinds
from benchmarks.marked_block import with_block
from benchmarks.peft_kinds import BLOCK, HEADER, KINDS, Kind, Outcome, row
from benchmarks.report.table import grid
from cg_optim import CGLoRAOptimizer
from cg_optim.errors import NoPairsWarning


@functools.cache
def outcome(index: int) -> Outcome:
    return peft_kinds.train(KINDS[index])


@pytest.fixture(params=range(len(KINDS)), ids=[kind.name.replace("`", "") for kind in KINDS])
def trained(request: pytest.FixtureRequest) -> tuple[Kind, Outcome]:
    kind = KINDS[request.param]
    pytest.importorskip(kind.needs)
    return kind, outcome(request.param)


def test_it_learns_and_everything_trainable_moves(trained: tuple[Kind, Outcome]) -> None:
    _, result = trained
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert result.still == []
    assert not any(result.optimizer.diagnostics().values())


def test_pairs_said_to_be_observed_are_seen(trained: tuple[Kind, Outcome]) -> None:
    kind, result = trained
    observed = sum(layer.seen for layer in result.optimizer.layer_diagnostics())
    assert row(kind, result.optimizer.summary())[1] == str(observed or "")
    assert all(layer.missed_steps == 0 for layer in result.optimizer.layer_diagnostics())


def test_nothing_is_left_out_silently(trained: tuple[Kind, Outcome]) -> None:
    """Each trainable tensor is in a pair, or has a line that names it and gives a reason."""
    _, result = trained
    summary = result.optimizer.summary()
    paired = 2 * len(result.optimizer.layer_diagnostics())
    training = [name for name, p in result.model.named_parameters() if p.requires_grad]
    named = [
        name for name in training if re.search(rf"^  {re.escape(name)} \S+: \S", summary, re.M)
    ]
    assert paired + len(named) == len(training)
    assert f"left to AdamW: {len(named)} tensors" in summary


@pytest.mark.parametrize("index", [i for i, k in enumerate(KINDS) if k.name in ("VeRA", "AdaLoRA")])
def test_no_pair_at_all_is_warned_about(index: int) -> None:
    with pytest.warns(NoPairsWarning):
        CGLoRAOptimizer(outcome(index).model)


def test_the_readme_shows_this_table() -> None:
    for kind in KINDS:
        pytest.importorskip(kind.needs)
    rows = [row(kind, outcome(i).optimizer.summary()) for i, kind in enumerate(KINDS)]
    text = peft_kinds.README.read_text(encoding="utf-8")
    table = grid(HEADER, rows)
    assert with_block(text, BLOCK, table) == text, "run python -m benchmarks.peft_kinds"
