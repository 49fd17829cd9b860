"""``python -m cg_optim.report``: a picture of a run, or a message that says what to do."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import RunFileError
from cg_optim.recorder import RunRecorder, read_run
from cg_optim.report import draw, findings, main, without_common_prefix
from tests.models import tagger
from tests.test_recorder import train

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run.jsonl"
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, RunRecorder(path, optimizer, every=2), range(9))
    return path


def test_the_picture_lies_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    image = matplotlib.image.imread(run.with_suffix(".png"))
    assert image.shape[0] > 500
    assert image.shape[1] > 1000
    assert image[..., :3].std() > 0.05  # something was drawn
    assert capsys.readouterr().out.splitlines() == [
        f"{run.with_suffix('.png')}: 5 records, 10 layers"
    ]


def test_another_place_and_format(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "-o", str(tmp_path / "picture.svg")]) == 0
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_every_panel_shows_what_was_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    records = read_run(run)
    draw(records, Path("unused.png"))
    loss, decrease, lengths, conditions, ranks, layers, *_ = drawn[0].axes
    assert list(loss.lines[0].get_ydata()) == [record["loss"] for record in records]
    expected = [sum(layer["predicted_decrease"] for layer in r["layers"]) for r in records]
    assert list(decrease.lines[0].get_ydata()) == pytest.approx(expected)
    assert len(lengths.lines) == len(conditions.lines) == 2
    # Nothing is known of the inputs before the first step.
    assert list(ranks.lines[0].get_xdata()) == [2, 4, 6, 8]
    grid = layers.images[0].get_array()
    assert grid.shape == (10, 5)
    first = records[2]["layers"][0]
    longer = max(first["relative_step_A"], first["relative_step_B"])
    assert grid[0, 2] == pytest.approx(math.log10(longer))


def test_the_actual_decrease_is_drawn_where_it_is_known(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    records = read_run(run)
    records[1]["decrease"] = {"predicted": 0.2, "actual": 0.1}
    records[2]["decrease"] = {"predicted": 0.2, "actual": None}
    draw(records, Path("unused.png"))
    _, actual, _ = drawn[0].axes[1].lines
    assert list(actual.get_xydata().flatten()) == [2, 0.1]


def test_factors_that_stand_still_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A's gradient is zero at B = 0, and zero has no place on a logarithmic axis."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    records = read_run(run)
    for layer in records[0]["layers"]:
        layer["relative_step_A"] = 0.0
    draw(records, Path("unused.png"))
    lengths = drawn[0].axes[2]
    assert list(lengths.lines[0].get_xdata()) == [2, 4, 6, 8]
    assert list(lengths.lines[1].get_xdata()) == [0, 2, 4, 6, 8]
    assert lengths.get_yscale() == "log"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([], []),
        (["model.layers.0.q"], ["q"]),
        (["model.0.q", "model.0.k", "model.1.q"], ["0.q", "0.k", "1.q"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["x", "y.z"], ["x", "y.z"]),
    ],
)
def test_names_are_told_apart_by_what_differs(names: list[str], short: list[str]) -> None:
    assert without_common_prefix(names) == short


def test_a_run_of_one_look_without_layers_is_drawn(tmp_path: Path) -> None:
    record = {"step": 0, "loss": None, "lr": 1e-3, "events": {}, "layers": []}
    draw([record], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_what_went_wrong_is_said_first(run: Path) -> None:
    records = read_run(run)
    assert findings(records) == []
    layers = records[-1]["layers"]
    layers[0] = {**layers[0], "seen": False}
    layers[1] = {**layers[1], "missed_steps": 3}
    records[-1]["events"]["pair skipped"] = 2
    assert findings(records) == [
        f"hooks have seen no input of 1 pairs, e.g. {layers[0]['name']}",
        f"1 pairs were not stepped in every step, e.g. {layers[1]['name']}: 3 of 8 left out",
        "pair skipped: 2",
    ]


def test_bad_input_ends_with_a_message(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.jsonl").write_text("[]\n")
    assert main([str(tmp_path / "other.jsonl")]) == 2
    assert "not a record of a run" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
    assert main([str(run), "-o", str(tmp_path / "run.nonsense")]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_without_matplotlib_it_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RunFileError, match="pip install matplotlib"):
        draw(read_run(run), Path("unused.png"))


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "run.png"
    monkeypatch.setattr(sys, "argv", ["report", str(run), "-o", str(picture)])
    monkeypatch.delitem(sys.modules, "cg_optim.report")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("cg_optim.report", run_name="__main__")
    assert picture.exists()
