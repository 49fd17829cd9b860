"""Texts that every CPython 3.11-3.13 carries, read without importing the modules.

* :func:`docstring_classification`: docstring -> the module it comes from.
* :func:`english_text` and :func:`source_code_text`: two kinds of text for language models.
* :func:`search_pairs`: function signature <-> first sentence of its docstring.

The texts differ a little between Python versions; within one version everything here is
deterministic.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from . import near_duplicates, stdlib_source
from .datasets import LabelledTexts, as_bytes

MODULES = (
    *("asyncio", "email", "importlib", "logging", "xml", "_pydecimal"),
    *("multiprocessing", "turtle", "unittest", "http", "mailbox", "tarfile"),
)
"""The classes of :func:`docstring_classification`."""

SHORTEST_DOCSTRING = 20
"""Characters; shorter docstrings ("See above.") say nothing about their module."""

SHARES = (0.7, 0.1, 0.2)
"""Training, validation and held-out share of the classification task."""

TEXT_CAP = 2_000_000
"""Most bytes of training text; the held-out text has at most a tenth of it."""

HELDOUT_TENTHS = 1
"""Tenths of the files and topics that are held out of the language models' texts."""

REPEAT_FROM = 40
"""Characters from which a paragraph that was seen before is dropped."""

UNSEEN_PAIRS = 600
"""Pairs of unseen modules, at least, in the two halves of the search task together."""

LARGEST_UNSEEN = 100
"""Modules with more pairs than this are always trained on: one would fill the unseen half."""


@dataclass(frozen=True)
class ClassificationSplits:
    """A classification task; no text, and no near-duplicate, is in two of its parts."""

    train: LabelledTexts
    validation: LabelledTexts
    heldout: LabelledTexts


@dataclass(frozen=True)
class TextSplit:
    """Text for a language model as ``uint8`` tensors, split by file or topic."""

    train: Tensor
    heldout: Tensor


@dataclass(frozen=True)
class TextPairs:
    """Queries and what they should find, row by row, and the module each pair is from."""

    signatures: list[str]
    summaries: list[str]
    modules: list[str]

    def __len__(self) -> int:
        return len(self.signatures)


@dataclass(frozen=True)
class SearchSplits:
    """Pairs split by module: ``choose`` and ``report`` are two halves of unseen modules."""

    train: TextPairs
    choose: TextPairs
    report: TextPairs


# ----------------------------------------------------------------- classification


def docstring_classification(seed: int = 0) -> ClassificationSplits:
    """Docstring -> one of the twelve :data:`MODULES`, whose names are cut out of the texts.

    A module that this Python lacks (distributions may package one apart) is left out.

    Args:
        seed: Decides which groups of near-duplicates go to which part.
    """
    texts, labels, names = _labelled_docstrings()
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(near_duplicates.groups(texts)):
        members[group].append(row)
    by_label: dict[int, list[list[int]]] = defaultdict(list)
    for group_rows in members.values():
        by_label[labels[group_rows[0]]].append(group_rows)
    draw = random.Random(seed)
    parts: tuple[list[int], ...] = ([], [], [])
    for label in sorted(by_label):
        groups = by_label[label]
        draw.shuffle(groups)
        size = sum(map(len, groups))
        done = 0
        for group_rows in groups:
            share = done / size
            part = 0 if share < SHARES[0] else 1 if share < SHARES[0] + SHARES[1] else 2
            parts[part].extend(group_rows)
            done += len(group_rows)
    everything = LabelledTexts(texts, None, labels, names)
    return ClassificationSplits(*(everything.subset(sorted(rows)) for rows in parts))


@functools.cache
def _labelled_docstrings() -> tuple[list[str], list[int], list[str]]:
    found: dict[str, dict[str, str]] = {}  # module -> normalised text -> text
    for path in stdlib_source.files():
        module = stdlib_source.module_of(path)
        if module not in MODULES:
            continue
        for docstring in stdlib_source.read(path).docstrings:
            text = " ".join(without_module_names(docstring).split())
            key = near_duplicates.normalised(text)
            if len(key) >= SHORTEST_DOCSTRING:
                found.setdefault(module, {}).setdefault(key, text)
    occurrences: dict[str, int] = defaultdict(int)
    for texts in found.values():
        for key in texts:
            occurrences[key] += 1
    names = [module for module in MODULES if module in found]
    rows = [
        (text, label)
        for label, module in enumerate(names)
        for key, text in found[module].items()
        if occurrences[key] == 1
    ]
    return [text for text, _ in rows], [label for _, label in rows], names


def without_module_names(text: str) -> str:
    """``text`` with the names of the classes cut out, which would give the label away."""
    names = "|".join(sorted({*MODULES, *(name.strip("_") for name in MODULES), "decimal"}))
    return re.sub(rf"(?<![a-z])({names})(?![a-z])", "module", text, flags=re.IGNORECASE)


# ------------------------------------------------------------------- language model


@functools.cache
def english_text() -> TextSplit:
    """English prose: the language reference in ``pydoc_data.topics``, and docstrings.

    Held out by topic and by top-level module.  Paragraphs that were seen before are
    dropped: topics quote each other, and classes repeat docstrings.
    """
    pieces = {f"topic {name}": text for name, text in stdlib_source.topics().items()}
    docstrings: dict[str, list[str]] = defaultdict(list)
    for path in stdlib_source.files():
        source = stdlib_source.read(path)
        docstrings[f"module {source.module}"] += source.docstrings
    return _text_split(pieces | {name: "\n\n".join(texts) for name, texts in docstrings.items()})


@functools.cache
def source_code_text() -> TextSplit:
    """Source code of the standard library without its docstrings and comments.

    Held out by file.  Blocks of lines that were seen before are dropped.
    """
    return _text_split({path: stdlib_source.read(path).code for path in stdlib_source.files()})


def _text_split(pieces: dict[str, str]) -> TextSplit:
    """Held-out and training text of the pieces, in an order that is fixed but mixed."""
    ordered = sorted(pieces, key=_digest)
    heldout = [name for name in ordered if _digest(name) % 10 < HELDOUT_TENTHS]
    train = [name for name in ordered if _digest(name) % 10 >= HELDOUT_TENTHS]
    seen: set[str] = set()

    def join(names: Sequence[str], cap: int) -> Tensor:
        texts = ("\n\n".join(_new_paragraphs(pieces[name], seen)) for name in names)
        return as_bytes("\n\n".join(text for text in texts if text))[:cap]

    return TextSplit(heldout=join(heldout, TEXT_CAP // 10), train=join(train, TEXT_CAP))


def _digest(name: str) -> int:
    """A number that depends on the name alone, unlike ``hash``."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if not key or key in seen:
            continue
        if len(key) >= REPEAT_FROM:
            seen.add(key)
        yield paragraph.strip("\n")


# ----------------------------------------------------------------------------- search


def search_pairs(seed: int = 0) -> SearchSplits:
    """Function signature <-> first sentence of its docstring, split by top-level module.

    Sentences that occur twice are dropped but for the first, and so are pairs of unseen
    modules that nearly repeat a pair of another part.

    Args:
        seed: Decides which modules are unseen, and which half they are in.
    """
    pairs = _all_pairs()
    by_module: dict[str, list[int]] = defaultdict(list)
    for row, (module, _, _) in enumerate(pairs):
        by_module[module].append(row)
    small = sorted(module for module, rows in by_module.items() if len(rows) <= LARGEST_UNSEEN)
    random.Random(seed).shuffle(small)
    unseen: tuple[list[int], list[int]] = ([], [])  # choose, report
    taken: set[str] = set()
    for module in small:
        if len(unseen[0]) + len(unseen[1]) >= UNSEEN_PAIRS:
            break
        min(unseen, key=len).extend(by_module[module])
        taken.add(module)
    train = [
        row for module in sorted(by_module) if module not in taken for row in by_module[module]
    ]
    group = near_duplicates.groups([summary for _, _, summary in pairs])
    parts: list[list[int]] = [train]
    known = {group[row] for row in train}
    for rows in unseen:
        parts.append([row for row in rows if group[row] not in known])
        known.update(group[row] for row in rows)
    return SearchSplits(*(_as_pairs([pairs[row] for row in rows]) for rows in parts))


def _as_pairs(rows: Iterable[tuple[str, str, str]]) -> TextPairs:
    rows = list(rows)
    return TextPairs(
        signatures=[signature for _, signature, _ in rows],
        summaries=[summary for _, _, summary in rows],
        modules=[module for module, _, _ in rows],
    )


@functools.cache
def _all_pairs() -> tuple[tuple[str, str, str], ...]:
    """Module, signature and summary of every documented function."""
    seen: set[str] = set()
    pairs: list[tuple[str, str, str]] = []
    for path in stdlib_source.files():
        source = stdlib_source.read(path)
        for function in source.functions:
            summary = first_sentence(function.docstring)
            key = near_duplicates.normalised(summary)
            if len(key) < SHORTEST_DOCSTRING or key in seen:
                continue
            seen.add(key)
            pairs.append((source.module, f"{function.name}({function.parameters})", summary))
    return tuple(pairs)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    # A full stop after a single letter ("e.g.", "i.e.") or after "vs" ends no sentence.
    return re.split(r"(?<=[.!?])(?<!\b\w\.)(?<!\bvs\.) ", paragraph, maxsplit=1)[0]
