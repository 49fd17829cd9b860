"""Every example runs, learns, and resumes where it says it does."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cg_optim import CGLoRAOptimizer
from cg_optim.recorder import read_run
from tests.examples import accelerate_forgets, healthy
from tests.models import assert_equal, parameters_of

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from benchmarks.examples import (
    accelerate_loop,
    loralib_layers,
    own_layer,
    raw_loop,
)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "benchmarks" / "examples"


@pytest.fixture(autouse=True)
def forgetful_accelerate() -> Iterator[None]:
    yield from accelerate_forgets()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", sorted({p.stem for p in EXAMPLES.glob("*.py")} - {"__init__", "small"})
)
def test_each_runs_as_a_program(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"trl_sft": "trl", "lightning_module": "lightning", "loralib_layers": "loralib"}
    pytest.importorskip(needed.get(name, "torch"))
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.delitem(sys.modules, f"benchmarks.examples.{name}", raising=False)
    runpy.run_module(f"benchmarks.examples.{name}", run_name="__main__")
    assert "loss" in capsys.readouterr().out


# ----------------------------------------------------------------- loops of one's own


def test_raw_loop_learns_and_resumes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    losses = raw_loop.train(whole, steps=12)
    assert losses[-1] < losses[0] - 0.05
    assert raw_loop.train(parts, steps=7) + raw_loop.train(parts, steps=5) == losses
    run = read_run(parts / "run.jsonl")
    assert [record["step"] for record in run] == [0, 5, 10]
    assert [record["loss"] for record in run] == [losses[0], losses[5], losses[10]]


@pytest.mark.parametrize("example", [own_layer, loralib_layers], ids=lambda m: m.__name__)
def test_layers_of_other_make_learn(example: Any) -> None:
    losses, optimizer = example.train()
    assert losses[-1] < losses[0] - 1
    assert healthy(optimizer)


def test_own_layers_are_pairs_and_loralib_says_what_is_not() -> None:
    own = own_layer.train(steps=1)[1].summary()
    assert "left to AdamW: 0 tensors" in own
    assert own.count("hooks, dense") == 2
    summary = loralib_layers.train(steps=1)[1].summary()
    assert summary.count("hooks, dense") == 1
    for left, reason in (("embed.lora_A", "embedding"), ("qkv.lora_B", "fused projections")):
        (line,) = [line for line in summary.splitlines() if line.lstrip().startswith(left)]
        assert reason in line


def gain(make: Callable[[nn.Module], torch.optim.Optimizer], epochs: int) -> float:
    """By how much the loss fell, summed over an epoch of four steps."""
    model = raw_loop.language_model_with_lora()
    optimizer = make(model)
    loader = DataLoader(raw_loop.Windows(), batch_size=16)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return sum(losses[:4]) - sum(losses[-4:])


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def test_the_default_learning_rate_learns_as_much_as_adamw_at_its_own() -> None:
    assert gain(CGLoRAOptimizer, epochs=16) > 0.9 * gain(adamw, epochs=16) > 0


@pytest.mark.parametrize("rate", [3e-4, 1e-3])
def test_at_twice_the_rate_of_adamw_it_learns_more(rate: float) -> None:
    """The recipe for who comes from AdamW; the early steps are the ones at risk."""
    ours = gain(lambda model: CGLoRAOptimizer(model, lr=2 * rate), epochs=8)
    assert ours > gain(lambda model: adamw(model, rate), epochs=8) > 0


# --------------------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_accelerate_saves_and_loads_its_state(tmp_path: Path, precision: str) -> None:
    losses = accelerate_loop.train(tmp_path / "whole", 2, precision)
    assert losses[-1] < losses[0] - 0.05
    first = accelerate_loop.train(tmp_path / "parts", 1, precision)
    second = accelerate_loop.train(tmp_path / "parts", 1, precision, resume=True)
    assert first + second == losses


# ---------------------------------------------------------------------------- Lightning


def scaled_half_precision() -> Any:
    """16-mixed as on a GPU: Lightning itself turns it into bf16-mixed on a CPU."""
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("lightning")
    from benchmarks.examples import lightning_module

    def train(folder: Path, steps: int, **more: Any) -> nn.Module:
        folder.mkdir(exist_ok=True)
        if precision == "16-mixed":
            more |= {"precision": None, "plugins": [scaled_half_precision()]}
        return lightning_module.train(folder, steps, **more)

    whole = train(tmp_path / "whole", 8)
    assert whole.losses[-1] < whole.losses[0] - 0.05
    optimizer = whole.trainer.optimizers[0]
    assert not any(optimizer.diagnostics().values())
    assert all(layer.seen for layer in optimizer.layer_diagnostics())
    again = train(tmp_path / "whole", 8, resume=True)
    assert again.losses == whole.losses[8:]
    assert_equal(parameters_of(again), parameters_of(whole))
    run = read_run(tmp_path / "whole" / "run.jsonl")
    assert [record["step"] for record in run] == [1, 3, 5, 7]
    assert run[0]["loss"] == pytest.approx(whole.losses[3])
    # The rate of the step that was looked at, not the one the scheduler has set since.
    assert [record["lr"] for record in run] == pytest.approx(
        [1e-2 * (1 - 0.9 * step / 20) for step in (1, 3, 5, 7)]
    )


@pytest.mark.filterwarnings("ignore")
def test_lightning_sends_diagnostics_to_its_loggers(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.loggers import Logger

    from benchmarks.examples import lightning_module

    class Tracker(Logger):
        name, version = "tracker", 0

        def __init__(self) -> None:
            super().__init__()
            self.logged: dict[int, dict[str, float]] = {}

        def log_hyperparams(self, *_: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.logged[step] = metrics

    tracker = Tracker()
    lightning_module.train(tmp_path, 4, logger=[tracker])
    assert sorted(tracker.logged) == [1, 3]
    assert tracker.logged[3]["cg/predicted_decrease"] > 0
    assert tracker.logged[3]["cg/unseen_pairs"] == 0
