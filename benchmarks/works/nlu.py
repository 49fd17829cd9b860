"""MiniLM on sentence classification and on semantic search.

With ``--data`` the tasks are the folders of :data:`TASKS` found there, with ``train`` and ``dev``
files (``.tsv``, optionally ``.gz``), and any other folder that has both. Without data: docstring ->
module. Semantic search, function signature -> first sentence of the docstring, takes its pairs from
the standard library in either case.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import encoder, metrics
from ..adapters import linear_layers
from ..cells import data_identity
from ..datasets import LabelledTexts, few_shot, read_labelled_tsv
from ..errors import DataFileError
from ..problem import ConfiguredProblem, LoraSettings, Problem
from . import THOROUGH, Report, Task, files_identity, find

PRESETS = ("tiny", "quick", "medium", "full")

SEARCH = "search"
DOCSTRINGS = "docstrings"
FEW_SHOT = (8, 32)
"""Training texts per class of the few-shot variants."""
TASKS = ("cola", "mrpc", "rte", "banking77", "sst2", "trec6")
FULL = (
    "cola", "mrpc", "rte", "banking77", "banking77-8", "banking77-8-head5", "banking77-32", SEARCH,
    "sst2", "trec6",
)  # fmt: skip
"""Tasks of the thorough presets, the ones that decide most first."""
METHODS = ("adamw", "full-adamw", "cg", "nadam[betas=0.8:0.999]", "lora+[ratio=4]")
"""The peers are the two best on the language models at batch 8, with their best knob there."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "batch": 4, "steps": 4, "rank": 2, "length": 16, "half": 16, "every": 2,
        "search_batch": 8, "search_steps": 3,
    },
    "quick": {
        "batch": 8, "steps": 24, "rank": 8, "length": 32, "half": 64, "every": 12,
        "search_batch": 8, "search_steps": 16,
    },
    "medium": {
        "batch": 16, "steps": 60, "rank": 8, "length": 48, "half": 200, "every": 20,
        "search_batch": 32, "search_steps": 40,
    },
    "full": {
        "batch": 16, "steps": 100, "rank": 8, "length": 48, "half": 400, "every": 20,
        "search_batch": 64, "search_steps": 60,
    },
}  # fmt: skip

LR_SCALE = 0.3
"""A pretrained encoder wants smaller learning rates than the byte-level model."""


def _names(preset: str, data: Path | None) -> list[str]:
    if data is None:
        return [DOCSTRINGS, SEARCH]
    found = {
        folder.name
        for folder in data.iterdir()
        if folder.is_dir() and any(folder.glob("train.tsv*")) and any(folder.glob("dev.tsv*"))
    }
    if not found:
        raise DataFileError(data, "has no folder with the files train.tsv and dev.tsv (or .gz)")
    if preset not in THOROUGH:
        first = next((name for name in TASKS if name in found), min(found))
        return [first, SEARCH]
    listed = [n for n in FULL if n == SEARCH or _Name.of(n).folder in found]
    return listed + sorted(found - set(FULL))


@dataclass(frozen=True)
class _Name:
    """A task's name taken apart: ``<folder>[-<texts per class>][-head<times>]``.

    The new head's learning rate is so many times the adapters'. A folder that has such a name
    itself is no variant.
    """

    folder: str
    shots: int | None
    head_rate: int | None

    @classmethod
    def of(cls, task: str, data: Path | None = None) -> _Name:
        if data is not None and (data / task).is_dir():
            return cls(task, None, None)
        match = re.fullmatch(r"(.+?)(?:-(\d+))?(?:-head(\d+))?", task)
        assert match is not None
        folder, shots, head_rate = match.groups()
        return cls(folder, shots and int(shots), head_rate and int(head_rate))


def _files(data: Path, name: str) -> tuple[Path, Path]:
    folder = data / _Name.of(name, data).folder
    return find(folder, "train", (".tsv",)), find(folder, "dev", (".tsv",))


def tasks(preset: str, data: Path | None, device: str) -> list[Task]:
    """Tasks named as :class:`_Name` says, ``docstrings`` and ``search``."""
    size = SIZES[preset]
    found: list[Task] = []
    for name in _names(preset, data):
        search = name == SEARCH
        from_python = data is None or search
        rank = 2 * size["rank"] if search else size["rank"]
        parts = _Name.of(name, data)
        settings: dict[str, Any] = {
            "model": encoder.PACKAGE,
            "data": data_identity(None) if from_python else files_identity(_files(data, name)),  # type: ignore[arg-type]
            "batch": size["search_batch"] if search else size["batch"],
            "rank": rank,
            "alpha": 2 * rank,
            "clip": 1.0,
            "bf16": False,
            "length": size["length"],
            "half": size["half"],
            "evaluate_every": size["every"],
            "shots": parts.shots,
        }
        if parts.head_rate is not None:
            settings["head_rate"] = float(parts.head_rate)
        found.append(
            Task(
                work="nlu",
                preset=preset,
                name=name,
                steps=size["search_steps"] if search else size["steps"],
                settings=settings,
                data=None if from_python else data,
                device=device,
                width=encoder.HIDDEN_SIZE,
                lr_scale=LR_SCALE,
                methods=METHODS if preset in THOROUGH else ("adamw", "full-adamw", "cg"),
                knobs=False,
                refine=preset in THOROUGH,
                defaults=preset in THOROUGH,
                extras=False,
                order=len(found),
            )
        )
    return found


# ---------------------------------------------------------------------- preparation


def prepare(task: Task, report: Report | None = None) -> None:
    """Read, split and tokenise once; the worker processes need no tokenizer."""
    if task.prepared.exists():
        return
    if report is not None:
        report(f"reading {task.name}", 0, 1)
    # What is wrong with a file is said before the encoder is looked for.
    parts = _pairs(task.settings["half"]) if task.name == SEARCH else _labelled(task)
    payload = {
        half: _tokens(texts, task.settings["length"], task.name == SEARCH)
        for half, texts in parts.items()
    }
    task.prepared.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.prepared.with_suffix(f".{os.getpid()}.part")
    torch.save(payload, temporary)
    os.replace(temporary, task.prepared)
    if report is not None:
        report(f"reading {task.name}", 1, 1)


def _labelled(task: Task) -> dict[str, LabelledTexts]:
    if task.data is None:
        from ..stdlib_texts import docstring_classification

        splits = docstring_classification()
        train, heldout = splits.train, splits.heldout
    else:
        first, second = _files(task.data, task.name)
        train = read_labelled_tsv(first)
        heldout = read_labelled_tsv(second, label_names=train.label_names)
        if (train.text_b is None) != (heldout.text_b is None):
            raise DataFileError(second, f"has other columns than {first.name}")
        train = _without(train, heldout)
    shots = task.settings["shots"]
    if shots is not None:
        train = few_shot(train, shots, seed=0)
    rows = list(range(len(heldout)))
    random.Random(0).shuffle(rows)
    middle = len(rows) // 2
    size = task.settings["half"]
    return {
        "train": train,
        "choose": heldout.subset(sorted(rows[:middle][:size])),
        "report": heldout.subset(sorted(rows[middle:][:size])),
    }


def _without(train: LabelledTexts, heldout: LabelledTexts) -> LabelledTexts:
    """The training texts that are not held out as well."""

    def keys(texts: LabelledTexts) -> list[tuple[str, str]]:
        seconds = texts.text_b or [""] * len(texts)
        return list(zip(texts.text_a, seconds, strict=True))

    unseen = set(keys(heldout))
    return train.subset([row for row, key in enumerate(keys(train)) if key not in unseen])


def _pairs(half: int) -> dict[str, LabelledTexts]:
    from ..stdlib_texts import search_pairs

    splits = search_pairs()
    parts = {"train": splits.train, "choose": splits.choose, "report": splits.report}
    found = {}
    for name, pairs in parts.items():
        texts = LabelledTexts(pairs.signatures, pairs.summaries, [0] * len(pairs), [])
        if name != "train" and len(texts) > half:
            texts = texts.subset(sorted(random.Random(0).sample(range(len(texts)), half)))
        found[name] = texts
    return found


def _tokens(texts: LabelledTexts, length: int, apart: bool) -> dict[str, Any]:
    """Token rows; with ``apart`` the two texts of a row are not one sequence."""
    tokenizer = encoder.load_tokenizer()
    assert not apart or texts.text_b is not None
    sides = (
        [(texts.text_a, None), (texts.text_b, None)] if apart else [(texts.text_a, texts.text_b)]
    )
    tokenized = [encoder.tokenize(tokenizer, a, b, length) for a, b in sides]  # type: ignore[arg-type]
    return {
        "rows": [one.rows for one in tokenized],
        "pad": tokenized[0].pad_token_id,
        "labels": texts.labels,
        "classes": len(texts.label_names),
    }


# ------------------------------------------------------------------------- problems


@dataclass
class _Part:
    """One part of the data: one or two texts per row."""

    sides: list[encoder.TokenizedTexts]
    labels: Tensor

    @classmethod
    def of(cls, saved: dict[str, Any]) -> _Part:
        sides = [encoder.TokenizedTexts(rows, saved["pad"]) for rows in saved["rows"]]
        return cls(sides, torch.tensor(saved["labels"]))

    def __len__(self) -> int:
        return len(self.labels)


def problem(task: Task) -> Problem:
    """The problem of ``task``, from what ``prepare`` left."""
    prepared = torch.load(task.prepared, map_location="cpu", weights_only=True)
    kind = SearchProblem if task.name == SEARCH else ClassificationProblem
    return kind(task, prepared)


class _EncoderProblem(ConfiguredProblem):
    def __init__(self, task: Task, prepared: dict[str, Any]) -> None:
        super().__init__(task.settings, task.device)
        settings = task.settings
        self.classes = prepared["train"]["classes"]
        self.train = _Part.of(prepared["train"])
        self.halves = {half: _Part.of(prepared[half]) for half in ("choose", "report")}
        self._encoder = encoder.load_encoder()
        self.lora = LoraSettings(
            settings["rank"],
            settings["alpha"],
            tuple(f"encoder.{name}" for name in linear_layers(self._encoder)),
        )

    def _fresh_encoder(self) -> nn.Module:
        # The first call gives away what the constructor loaded, the next ones load again.
        model, self._encoder = self._encoder, None  # type: ignore[assignment]
        return encoder.load_encoder() if model is None else model

    def _rows(self, seed: int) -> Iterator[list[int]]:
        return encoder.shuffled_indices(len(self.train), self.settings["batch"], seed)


def _row(tokens: encoder.TokenBatch, row: int) -> encoder.TokenBatch:
    return {name: tensor[row : row + 1] for name, tensor in tokens.items()}


class ClassificationProblem(_EncoderProblem):
    """Mean over the tokens and a new linear head, which every method trains."""

    def base_model(self, seed: int) -> nn.Module:
        return encoder.SentenceClassifier(self._fresh_encoder(), self.classes, seed)

    def trainable_besides_lora(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.head.parameters())  # type: ignore[union-attr]

    def batches(self, seed: int) -> Iterator[tuple[encoder.TokenBatch, Tensor]]:
        for rows in self._rows(seed):
            tokens = self.train.sides[0].batch(rows, self.device)
            yield tokens, self.train.labels[rows].to(self.device)

    def loss(self, model: nn.Module, batch: tuple[encoder.TokenBatch, Tensor]) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(model(tokens).float(), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        values: dict[str, float] = {}
        for half, part in self.halves.items():
            logits = encoder.classifier_logits(model, part.sides[0])
            values[half] = float(F.cross_entropy(logits, part.labels))
            if half == "report":
                predicted = logits.argmax(-1).numpy()
                values |= metrics.classification_metrics(part.labels.numpy(), predicted)
        return values

    def predictions(self, model: nn.Module) -> NDArray[np.floating]:
        logits = encoder.classifier_logits(model, self.halves["report"].sides[0])
        return logits.log_softmax(-1).numpy().astype(np.float32)

    def singles(
        self, batch: tuple[encoder.TokenBatch, Tensor]
    ) -> Sequence[tuple[encoder.TokenBatch, Tensor]]:
        tokens, labels = batch
        return [
            (
                {name: tensor[row : row + 1] for name, tensor in tokens.items()},
                labels[row : row + 1],
            )
            for row in range(len(labels))
        ]


class SearchProblem(_EncoderProblem):
    """Queries find their answers among those of the batch; held-out modules were never seen."""

    def base_model(self, seed: int) -> nn.Module:
        return encoder.SentenceEncoder(self._fresh_encoder())

    def batches(self, seed: int) -> Iterator[tuple[encoder.TokenBatch, encoder.TokenBatch]]:
        queries, answers = self.train.sides
        for rows in self._rows(seed):
            yield queries.batch(rows, self.device), answers.batch(rows, self.device)

    def loss(
        self, model: nn.Module, batch: tuple[encoder.TokenBatch, encoder.TokenBatch]
    ) -> Tensor:
        queries, answers = batch
        return encoder.contrastive_loss(model(queries).float(), model(answers).float())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        values: dict[str, float] = {}
        for half, part in self.halves.items():
            found = encoder.evaluate_search(model, *part.sides)
            values[half] = found["loss"]
            if half == "report":
                values["mrr"] = found["mrr"]
        return values

    def singles(
        self, batch: tuple[encoder.TokenBatch, encoder.TokenBatch]
    ) -> Sequence[tuple[encoder.TokenBatch, encoder.TokenBatch]]:
        queries, answers = batch
        size = len(queries["input_ids"])
        return [(_row(queries, row), _row(answers, row)) for row in range(size)]
