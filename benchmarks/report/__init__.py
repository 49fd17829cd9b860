"""The report: a Markdown table per task from the finished cells."""

from __future__ import annotations

from pathlib import Path

from ..cells import Result, load_all
from ..methods import METHODS, select
from ..sweep import Ledger, Study
from ..works import work
from .table import table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def write_report(out: Path, *, refresh: bool) -> None:
    """Write ``out/report.md``.

    Args:
        out: folder with the records of the works.
        refresh: also replace the block between the markers in the READMEs that have one.
    """
    text = "\n\n".join(_sections(out)) or "No finished runs."
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
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


def _sections(out: Path) -> list[str]:
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in load_all(out):
        cell = result.cell
        groups.setdefault((cell.work, cell.preset, cell.task, cell.recipe), []).append(result)
    sections = []
    for (name, preset, task, recipe), results in sorted(groups.items()):
        study = _study(name, preset, task, recipe, results)
        if study is not None:
            title = f"### {name} / {preset} / {task} (recipe {recipe})"
            sections.append(f"{title}\n\n{table(Ledger(study, results), out)}")
    return sections


def _study(name: str, preset: str, task: str, recipe: str, results: list[Result]) -> Study | None:
    """The study of a task as registered, with the recipe that the records were made by."""
    from dataclasses import replace

    known = [one for one in work(name).tasks(preset, None, "cpu") if one.name == task]
    if not known:
        return None
    used = {result.cell.method for result in results}
    methods = [METHODS[one] for one in METHODS if one in used]
    methods += select([one for one in sorted(used) if one not in METHODS])
    return replace(known[0].study(methods), recipe=recipe)
