"""The error of a data file that cannot be used."""

from __future__ import annotations

from pathlib import Path


class DataFileError(ValueError):
    """A data file is missing or malformed; shown as one line, exit code 2.

    Args:
        path: The file.
        problem: What is wrong with it, and where it helps what would be right.
        line: Number of the offending line, counted from 1.
    """

    def __init__(self, path: str | Path, problem: str, line: int | None = None) -> None:
        self.path = Path(path)
        self.problem = problem
        self.line = line
        place = f"{path}" if line is None else f"{path}, line {line}"
        # Names and contents of files may hold line breaks; the message stays one line.
        super().__init__(" ".join(f"{place}: {problem}".split()))
