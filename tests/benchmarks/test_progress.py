"""What a run says while it goes on."""

import io

import pytest
from rich.console import Console

from benchmarks import progress
from benchmarks.cells import Cell, Result
from benchmarks.runner import Status

CELL = Cell("lm", "full", "pubmed-b8", "lora+", 1e-2, 4.0, 2, 120, "recipe")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (300, "5 min"), (7200, "2.0 h")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_lines_say_what_came_out():
    ok = progress.line(Result(CELL, "ok", final={"report": 1.2345678}))
    assert ok == "lm pubmed-b8: lora+ lr 0.01 knob 4 seed 2: 1.2346"
    assert progress.line(Result(CELL, "diverged")).endswith("diverged")
    assert progress.line(Result(CELL, "failed", error="E: no [bold]")).endswith("E: no [bold]")


def test_a_log_has_the_estimate_and_options_in_brackets_survive():
    file = io.StringIO()
    with progress.Bars(Console(file=file)) as bars:
        bars.prepared("pretraining", 1, 2)
        bars.prepared("pretraining", 2, 2)
        last = Result(CELL, "failed", error="cg[damping=1] broke")
        bars.status(Status(done=3, left=9, seconds=600.0, running=(CELL,), last=last))
    assert "cg[damping=1] broke  [3/12, about 10 min left]" in file.getvalue()
