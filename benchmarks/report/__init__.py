"""The report: tables and plots of the finished cells, by one command."""

from __future__ import annotations

from pathlib import Path

from ..usage import UsageError
from .measures import measure
from .table import tables
from .topics import topics

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def write_report(out: Path, *, refresh: bool) -> None:
    """Write ``out/report.md``.

    Args:
        out: folder with the records of the works.
        refresh: also replace the block between the markers in the READMEs that have one.

    Raises:
        UsageError: If there is nothing to report.
    """
    sections = []
    for topic in topics(out):
        sections.append(f"### {topic.label}\n\n{tables(topic, measure(topic))}")
    if not sections:
        raise UsageError(f"{out}: no finished runs to report")
    text = "\n\n".join(sections)
    path = out / "report.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"report: {path}")
    if refresh:
        readme = Path(__file__).resolve().parents[1] / "README.md"
        refresh_block(readme, text)


def refresh_block(path: Path, text: str) -> bool:
    """Replace what stands between the markers in ``path``; whether there were any."""
    if not path.is_file():
        return False
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return True
