"""A byte-level Llama, pretrained here on one kind of text and adapted to another.

With ``--data`` the source is all of :data:`SOURCES` found there and the targets those of
:data:`TARGETS`: folders with ``train`` and ``valid`` files, ``.txt`` or ``.jsonl``, optionally
``.gz``. Own texts go to folders called ``source`` and ``target``. Without data, the English of the
standard library is the source, and its code the target.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import language_model
from ..adapters import linear_layers
from ..cells import data_identity
from ..datasets import read_bytes_text, read_jsonl_text
from ..errors import DataFileError
from ..language_model import LanguageModelRecipe
from ..problem import ConfiguredProblem, LoraSettings
from . import THOROUGH, Report, Task, files_identity, find

PRESETS = ("tiny", "quick", "medium", "full", "gpu")

SOURCES = ("wikitext2", "tinyshakespeare", "multi30k_en", "source")
TARGETS = {
    "pubmed": "pubmed_text",
    "french": "multi30k_fr",
    "gsm8k": "gsm8k",
    "target": "target",
}
"""Name in the tasks' names, and folder."""
SUFFIXES = (".txt", ".jsonl")

BASES: dict[str, LanguageModelRecipe] = {
    "tiny": LanguageModelRecipe(
        "tiny", hidden_size=32, layers=2, heads=2, intermediate_size=64, sequence_length=32,
        batch_size=8, steps=30,
    ),
    "quick": LanguageModelRecipe("quick", steps=400, bf16=True),
    "medium": LanguageModelRecipe("medium", steps=700, bf16=True),
    "full": LanguageModelRecipe(
        "full", hidden_size=256, layers=6, heads=8, intermediate_size=688, batch_size=16,
        steps=2000, learning_rate=2e-3, bf16=True,
    ),
    "gpu": LanguageModelRecipe(
        "gpu", hidden_size=768, layers=14, heads=12, intermediate_size=2048, sequence_length=256,
        batch_size=64, steps=1000, learning_rate=6e-4, bf16=True,
    ),
}  # fmt: skip
"""Pretrained bases: ``full`` takes about 15 minutes on two cores, ``medium`` 3, ``quick`` 2."""

BATCHES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {"b4": {"batch": 4, "rank": 2, "steps": 12}},
    "quick": {"b8": {"batch": 8, "rank": 8, "steps": 60}},
    "medium": {
        "b8": {"batch": 8, "rank": 8, "steps": 80},
        "b32": {"batch": 32, "rank": 16, "steps": 80},
        "b8-r32": {"batch": 8, "rank": 32, "steps": 80},
    },
    "full": {
        "b8": {"batch": 8, "rank": 8, "steps": 120},
        "b32": {"batch": 32, "rank": 16, "steps": 80},
    },
    "gpu": {"b64": {"batch": 64, "rank": 16, "steps": 80}},
}
WINDOWS = {"tiny": 8, "quick": 48, "medium": 64, "full": 64, "gpu": 64}
"""Held-out windows in each half."""
PREDICTED_WINDOWS = 24
"""Windows of the ``report`` half whose predictions are kept for the divergences."""

METHODS = {
    "tiny": ("adamw", "full-adamw", "cg"),
    "quick": ("adamw", "full-adamw", "cg", "soap", "lora+"),
    "medium": (),
    "full": (),
    "gpu": ("adamw", "full-adamw", "cg"),
}


def _sources(data: Path) -> list[Path]:
    found = [data / name for name in SOURCES if (data / name).is_dir()]
    if not found:
        raise DataFileError(data, f"has none of the source folders {', '.join(SOURCES)}")
    return [find(folder, "train", SUFFIXES) for folder in found]


def _target_names(preset: str, data: Path | None) -> list[str]:
    if data is None:
        return ["code"]
    found = [name for name, folder in TARGETS.items() if (data / folder).is_dir()]
    if not found:
        raise DataFileError(data, f"has none of the target folders {', '.join(TARGETS.values())}")
    return found if preset in THOROUGH else found[:1]


def _target_files(data: Path, name: str) -> tuple[Path, Path]:
    folder = data / TARGETS[name]
    train = find(folder, "train", SUFFIXES)
    try:
        return train, find(folder, "valid", SUFFIXES)
    except DataFileError:
        return train, find(folder, "dev", SUFFIXES)


def tasks(preset: str, data: Path | None, device: str) -> list[Task]:
    """Tasks named ``<target>-b<batch>``, with ``-r<rank>`` behind it for another than the usual."""
    base = BASES[preset]
    found: list[Task] = []
    for name in _target_names(preset, data):
        if data is None:
            identity = source = data_identity(None)
        else:
            identity = files_identity(_target_files(data, name))
            source = files_identity(_sources(data))
        for label, size in BATCHES[preset].items():
            if name == "gsm8k" and label != "b32":  # a third target, at the larger batch only
                continue
            settings: dict[str, Any] = {
                "base": asdict(base),
                "source": source,
                "target": identity,
                "sequence": base.sequence_length,
                "batch": size["batch"],
                "rank": size["rank"],
                "alpha": 2 * size["rank"],
                "clip": 1.0,
                "bf16": preset != "tiny",
                "windows": WINDOWS[preset],
                "evaluate_every": 10 if preset != "tiny" else 4,
            }
            found.append(
                Task(
                    work="lm",
                    preset=preset,
                    name=f"{name}-{label}",
                    steps=size["steps"],
                    settings=settings,
                    data=data,
                    device=device,
                    width=base.hidden_size,
                    methods=METHODS[preset],
                    knobs=preset in THOROUGH,
                    refine=preset in THOROUGH,
                    defaults=preset in THOROUGH,
                    extras=preset in THOROUGH,
                    order=len(found),
                )
            )
    return found


def _read(path: Path) -> Tensor:
    return read_jsonl_text(path) if ".jsonl" in path.suffixes else read_bytes_text(path)


def _texts(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Pretraining text, training text and held-out text."""
    if task.data is None:
        from ..stdlib_texts import english_text, source_code_text

        code = source_code_text()
        return english_text().train, code.train, code.heldout
    train, heldout = _target_files(task.data, task.name.partition("-")[0])
    source = torch.cat([_read(path) for path in _sources(task.data)])
    length = task.settings["sequence"] + 1
    parts = {train: _read(train), heldout: _read(heldout)}
    for path, text in parts.items():
        if len(text) < 4 * length:
            raise DataFileError(path, f"has {len(text)} bytes; need at least {4 * length}")
    return source, parts[train], parts[heldout]


def base_recipe(task: Task) -> LanguageModelRecipe:
    """The recipe of the pretrained base of ``task``."""
    return LanguageModelRecipe(**task.settings["base"])


def prepare(task: Task, report: Report | None = None) -> None:
    """Pretrain the base unless it is cached, and keep texts and weights for the workers."""
    if task.prepared.exists():
        return
    source, train, heldout = _texts(task)
    recipe = base_recipe(task)

    def progress(step: int, steps: int, _: float) -> None:
        if report is not None:
            report(f"pretraining the {recipe.texts} base", step, steps)

    base = language_model.pretrain(recipe, source, task.cache, progress, task.device)
    middle = len(heldout) // 2
    payload = {
        "base": base.state_dict(),
        "train": train,
        "choose": heldout[:middle].clone(),
        "report": heldout[middle:].clone(),
    }
    temporary = task.prepared.with_suffix(f".{os.getpid()}.part")
    torch.save(payload, temporary)
    os.replace(temporary, task.prepared)


def problem(task: Task) -> LanguageModelProblem:
    """The problem of ``task``, from what ``prepare`` left."""
    prepared = torch.load(task.prepared, map_location="cpu", weights_only=True)
    return LanguageModelProblem(task, prepared)


class LanguageModelProblem(ConfiguredProblem):
    """See the module's documentation."""

    def __init__(self, task: Task, prepared: dict[str, Any]) -> None:
        super().__init__(task.settings, task.device)
        settings = task.settings
        self._recipe = base_recipe(task)
        self._state = prepared["base"]
        self._train = prepared["train"].to(self.device)
        self._halves = {
            half: language_model.heldout_windows(
                prepared[half], settings["sequence"], settings["windows"]
            ).to(self.device)
            for half in ("choose", "report")
        }
        with torch.device("meta"):
            skeleton = language_model.build_model(replace(self._recipe))
        self.lora = LoraSettings(
            settings["rank"], settings["alpha"], tuple(linear_layers(skeleton))
        )

    def base_model(self, seed: int) -> nn.Module:
        model = language_model.build_model(self._recipe)
        model.load_state_dict(self._state)
        return model

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        size, length = self.settings["batch"], self.settings["sequence"]
        while True:
            yield language_model.sample_batch(self._train, size, length, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return language_model.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {
            half: float(np.mean([float(language_model.loss(model, b)) for b in self._equal(w)]))
            for half, w in self._halves.items()
        }

    @staticmethod
    def _equal(windows: Tensor) -> Sequence[Tensor]:
        """Windows in parts of equal size, so that the mean of means is the mean."""
        parts = 1
        while len(windows) // parts > 32 and len(windows) % (2 * parts) == 0:
            parts *= 2
        return windows.chunk(parts)

    def predictions(self, model: nn.Module) -> NDArray[np.floating]:
        windows = self._halves["report"][:PREDICTED_WINDOWS]
        logits = model(input_ids=windows[:, :-1]).logits.float()
        return logits.log_softmax(-1).flatten(0, 1).cpu().numpy().astype(np.float16)

    def singles(self, batch: Tensor) -> Sequence[Tensor]:
        return list(batch.split(1))
