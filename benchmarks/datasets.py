"""Readers of the data files that users bring: labelled TSV, plain text, JSON lines.

Whatever is wrong with a file comes out as one :class:`~benchmarks.errors.DataFileError`.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataFileError

COLUMNS = (("label", "text_a"), ("label", "text_a", "text_b"))
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, or pairs of texts, with one label each.

    Attributes:
        text_a: First (or only) text of every row.
        text_b: Second text of every row, ``None`` for single texts.
        labels: Index into ``label_names`` of every row.
        label_names: Names of the classes.
    """

    text_a: list[str]
    text_b: list[str] | None
    labels: list[int]
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Sequence[int]) -> LabelledTexts:
        """The given rows, in the given order."""
        return LabelledTexts(
            text_a=[self.text_a[row] for row in rows],
            text_b=None if self.text_b is None else [self.text_b[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            label_names=self.label_names,
        )


def split_rows(
    texts: LabelledTexts, fraction: float, seed: int
) -> tuple[LabelledTexts, LabelledTexts]:
    """Split at random, the same way for the same seed.

    Rows with the same text stay together, so that no text is on both sides.

    Args:
        texts: What to split.
        fraction: Share of the first part.
        seed: Decides which rows.
    """
    same: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, first in enumerate(texts.text_a):
        second = "" if texts.text_b is None else texts.text_b[row]
        same[_plain(first), _plain(second)].append(row)
    groups = list(same.values())
    random.Random(seed).shuffle(groups)
    left: list[int] = []
    right: list[int] = []
    for group in groups:
        (left if len(left) < round(fraction * len(texts)) else right).extend(group)
    return texts.subset(sorted(left)), texts.subset(sorted(right))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def few_shot(texts: LabelledTexts, per_class: int, seed: int) -> LabelledTexts:
    """At most ``per_class`` rows of every class, drawn by ``seed``, in the order of the file."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(texts.labels):
        rows_of[label].append(row)
    draw = random.Random(seed)
    chosen: list[int] = []
    for label in sorted(rows_of):
        rows = rows_of[label]
        chosen += draw.sample(rows, min(per_class, len(rows)))
    return texts.subset(sorted(chosen))


def read_labelled_tsv(path: str | Path, label_names: Sequence[str] | None = None) -> LabelledTexts:
    """Read ``.tsv`` or ``.tsv.gz``: header ``label<TAB>text_a[<TAB>text_b]``, no quoting, UTF-8.

    Args:
        path: The file.
        label_names: Names of the classes in their order (those of the training file when a
            development file is read); ``None`` takes the sorted names found in the file.

    Raises:
        DataFileError: If the file is missing, unreadable or malformed.
    """
    lines = _lines(path)
    columns = tuple(lines[0].split("\t"))
    if columns not in COLUMNS:
        found = "\\t".join(columns)
        message = f"the header must be label\\ttext_a[\\ttext_b], not {found[:80]!r}"
        raise DataFileError(path, message, 1)
    rows: list[list[str]] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(columns):
            message = f"has {len(cells)} column(s) where the header names {len(columns)}"
            raise DataFileError(path, message, number)
        for name, cell in zip(columns, cells, strict=True):
            if not cell.strip():
                raise DataFileError(path, f"column {name} is empty", number)
        if label_names is not None and cells[0] not in label_names:
            message = f"label {cells[0]!r} is not one of the {len(label_names)} known labels"
            raise DataFileError(path, message, number)
        rows.append(cells)
    if not rows:
        raise DataFileError(path, "has a header but no rows")
    names = sorted({row[0] for row in rows}) if label_names is None else list(label_names)
    if len(names) < 2:
        raise DataFileError(path, f"every row has the label {names[0]!r}; need at least two labels")
    index = {name: place for place, name in enumerate(names)}
    return LabelledTexts(
        text_a=[row[1] for row in rows],
        text_b=[row[2] for row in rows] if len(columns) == 3 else None,
        labels=[index[row[0]] for row in rows],
        label_names=names,
    )


def read_bytes_text(path: str | Path) -> Tensor:
    """Bytes of a ``.txt`` or ``.txt.gz`` file, UTF-8, as a ``uint8`` tensor.

    Raises:
        DataFileError: If the file is missing, unreadable, empty or not UTF-8.
    """
    return as_bytes(_text(path))


def read_jsonl_text(path: str | Path) -> Tensor:
    """Questions and answers of a ``.jsonl[.gz]`` file, joined, as bytes in a ``uint8`` tensor.

    Every line is an object with the strings ``question`` and ``answer``.

    Raises:
        DataFileError: If the file is missing, unreadable or malformed.
    """
    pieces: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataFileError(path, f"is not JSON: {error.msg}", number) from None
        for field in ("question", "answer"):
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise DataFileError(path, f"has no string in the field {field!r}", number)
        pieces.append(f"{record['question']}\n{record['answer']}\n")
    return as_bytes("\n".join(pieces))


def as_bytes(text: str) -> Tensor:
    """UTF-8 bytes of ``text`` as a ``uint8`` tensor."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def as_numpy(text: Tensor) -> NDArray[np.uint8]:
    """The bytes of a text as an array, wherever the tensor lives."""
    return text.cpu().numpy()


def _lines(path: str | Path) -> list[str]:
    # Not splitlines(): texts may hold form feeds or Unicode line separators.
    lines = _text(path).replace("\r\n", "\n").split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _text(path: str | Path) -> str:
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataFileError(path, "no such file") from None
    except OSError as error:
        raise DataFileError(path, f"cannot be read: {error.strerror or error}") from None
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataFileError(path, f"is not a complete gzip file: {error}") from None
    elif content.startswith(GZIP_MAGIC):
        raise DataFileError(path, "is compressed; its name must end in .gz")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8: byte 0x{content[error.start]:02x}"
        raise DataFileError(path, message, line) from None
    if not text.strip():
        raise DataFileError(path, "is empty")
    return text
