"""The blocks of Markdown files that commands write, each between two markers with its name."""

from __future__ import annotations

from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def with_block(text: str, name: str, block: str) -> str | None:
    """``text`` with ``block`` between the markers of that name; None if it has no such markers."""
    begin, end = markers(name)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    return f"{before}{begin}\n{block}\n{end}{after}" if found_begin and found_end else None


def refresh_block(path: Path, name: str, block: str) -> bool:
    """Replace a block in a file, unless there is nothing to put there; whether it was done."""
    if not block or not path.is_file():
        return False
    text = with_block(path.read_text(encoding="utf-8"), name, block)
    if text is None:
        return False
    path.write_text(text, encoding="utf-8")
    return True
