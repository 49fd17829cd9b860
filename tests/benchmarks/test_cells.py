"""Records: identity of cells, what is written and read back, nothing of this machine's paths."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from benchmarks import cells
from benchmarks.cells import Cell, Result

CELL = Cell("lm", "full", "pubmed-b8", "cg[damping=0.3]", 1e-2, None, 0, 120, "recipe", "rev")


def test_every_field_of_a_cell_decides_its_path():
    other = {
        "lr": 2e-2, "knob": 4.0, "seed": 1, "steps": 60, "recipe": "x", "revision": "y",
        "work": "nlu", "preset": "quick", "task": "cola", "method": "cg[damping=0.4]",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(Cell)}
    paths = {CELL.path} | {replace(CELL, **{key: value}).path for key, value in other.items()}
    assert len(paths) == len(other) + 1


def test_names_are_stable_and_fit_for_file_systems():
    assert CELL.path == replace(CELL).path
    assert CELL.path.parent == Path("lm/full/pubmed-b8/cg_damping=0.3_")
    assert CELL.name.startswith("lr0.01-s0-n120-")


def test_round_trip_keeps_everything_and_writes_valid_json(tmp_path):
    result = Result(
        cell=CELL,
        status="diverged",
        error="non-finite",
        curve={"step": [0.0, 10.0], "choose": [2.0, math.nan], "report": [2.0, math.inf]},
        train=[1.0, math.nan],
        final={"choose": math.nan, "report": 1.5},
        costs={"ms_step": 1.0},
        settings={"rank": 8},
        environment={"threads": 1},
    )
    path = cells.save(result, tmp_path)
    assert path == tmp_path / CELL.path

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    again = cells.load(path)
    assert again.cell == CELL
    assert (again.status, again.error) == ("diverged", "non-finite")
    assert math.isnan(again.train[1])
    assert math.isnan(again.curve["report"][1])
    assert again.settings == {"rank": 8}
    assert cells.by_cell(cells.load_all(tmp_path))[CELL].costs == {"ms_step": 1.0}


def test_only_ok_results_have_a_loss():
    final = {"choose": 1.0, "report": 2.0}
    assert Result(CELL, "ok", final=final).loss("report") == 2.0
    for status in ("diverged", "failed"):
        assert Result(CELL, status, final=final).loss("report") == math.inf
    assert Result(CELL, "ok", final={"report": math.nan}).loss("report") == math.inf


def test_broken_records_and_other_files_are_passed_over(tmp_path):
    cells.save(Result(CELL, "ok"), tmp_path)
    folder = (tmp_path / CELL.path).parent
    (folder / "lr1-half.json").write_text('{"cell": {')
    (folder / "lr1-other.json").write_text('{"a": 1}')
    (folder / "timing.json").write_text("{}")
    assert [result.cell for result in cells.load_all(tmp_path)] == [CELL]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.json"
    cells.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        cells.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_environment_names_versions_and_commit_but_no_path():
    found = cells.environment("cpu", 2)
    assert found["threads"] == 2
    assert {"python", "torch", "peft"} <= set(found["versions"])
    assert found["commit"]
    assert str(Path.home()) not in json.dumps(found)


def test_recipe_hash_depends_on_values_and_not_on_order():
    assert cells.recipe_hash({"a": 1, "b": 2}) == cells.recipe_hash({"b": 2, "a": 1})
    assert cells.recipe_hash({"a": 1}) != cells.recipe_hash({"a": 2})
