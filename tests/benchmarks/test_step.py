"""Step costs: bytes against a real optimizer, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.works.step import MODELS, adamw_state_bytes, make_pairs, run_step


def test_state_bytes_are_those_of_a_real_optimizer() -> None:
    model = MODELS["toy"]
    pairs = [pair for _ in range(model.layers) for pair in make_pairs(model, 4, "cpu")]
    optimizer = torch.optim.AdamW([p for pair in pairs for p in (pair.A, pair.B)])
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert adamw_state_bytes(model, 4) == held


def test_tiny_run(tmp_path: Path) -> None:
    record = json.loads(run_step("tiny", "cpu", tmp_path).read_text())
    (row,) = record["rows"]
    assert set(row["ms"]) == {"adamw_foreach", "adamw_fused", "cg_without_curvature"}
    assert all(value > 0 for value in row["ms"].values())
    assert record["environment"]["versions"]["torch"]
