"""The report: tables and plots of the finished cells, by one command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..marked_block import refresh_block
from ..usage import UsageError
from .carry_over import carry_over
from .measures import Measures, measure
from .plots import draw
from .step_cost import draw_step_cost, step_costs, step_text
from .summary import summary
from .table import tables
from .targets import targets
from .topics import Topic, topics

BLOCK = "results"
"""Name of the block that the report fills."""
ROOT = Path(__file__).resolve().parents[2]
"""The repository, whose READMEs show the committed results."""

Section = Callable[[str], str]
"""Text of a section, given the way from the file it is put in to the folder of the pictures."""


def write_report(out: Path, *, refresh: bool) -> None:
    """Write ``out/report.md`` and the pictures it shows.

    Args:
        out: folder with the records of the works.
        refresh: also replace the block between the markers in the READMEs that have one.

    Raises:
        UsageError: If there is nothing to report.
    """
    found = [(topic, measure(topic)) for topic in topics(out)]
    sections = [*_trained(found, out), *_timed(out)]
    if not sections:
        raise UsageError(f"{out}: no finished runs to report")
    path = out / "report.md"
    path.write_text("\n\n".join(text("") for text in sections) + "\n", encoding="utf-8")
    print(f"report: {path}")
    if refresh:
        benchmarks = ROOT / "benchmarks"
        way = f"{out.resolve().relative_to(benchmarks).as_posix()}/"
        refresh_block(benchmarks / "README.md", BLOCK, "\n\n".join(text(way) for text in sections))
        refresh_block(ROOT / "README.md", BLOCK, summary(found))


def _trained(found: Sequence[tuple[Topic, Sequence[Measures]]], out: Path) -> list[Section]:
    overviews = {
        "Ours relative to AdamW": targets(found),
        "At the learning rate of AdamW": carry_over(found),
    }
    sections = [_section(label, text, []) for label, text in overviews.items() if text]
    for topic, measured in found:
        pictures = draw(topic, measured, out)
        sections.append(_section(topic.label, tables(topic, measured), pictures))
    return sections


def _timed(out: Path) -> list[Section]:
    sections = []
    for cost in step_costs(out):
        label = f"step / {cost.label}"
        picture = draw_step_cost(cost, out)
        pictures = [] if picture is None else [(f"{label}: step cost against rank", picture)]
        sections.append(_section(label, step_text(cost), pictures))
    return sections


def _section(label: str, text: str, pictures: Sequence[tuple[str, Path]]) -> Section:
    def written(way: str) -> str:
        images = [f"![{words}]({way}{path.as_posix()})" for words, path in pictures]
        return "\n\n".join([f"### {label}", text, *images])

    return written
