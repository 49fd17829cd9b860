"""The works: what methods are measured on."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..cells import recipe_hash
from ..errors import DataFileError
from ..methods import Method
from ..sweep import Study

if TYPE_CHECKING:
    from ..problem import Problem

CACHE = Path(__file__).resolve().parents[1] / "cache"
"""Prepared data and pretrained bases; not under version control."""

Report = Callable[[str, int, int], None]

TRAINED = ("linear", "lm", "nlu")
"""Works that are made of training runs, in the order of their cost."""

THOROUGH = ("medium", "full")
"""Presets with every task, the fine grid and, on language models, all measures."""


@dataclass(frozen=True)
class Task:
    """One task of a work in one preset: everything a worker process needs to build it.

    Attributes:
        work, preset, name: identity.
        steps: optimizer steps of a run.
        settings: all that decides the results; part of the recipe.
        data: folder of the user's data, ``None`` for what Python carries.
        device: device of the runs.
        width: input size of most adapted layers.
        lr_scale: factor on the methods' sweep centres, which are set for the lm work.
        tuning_seeds, reporting_seeds: disjoint seeds for choosing and for reporting.
        methods: methods that take part unless the user names others, all if empty.
        knobs: whether second knobs are swept.
        refine: whether the sweep goes on to the fine grid.
        defaults: whether every method also runs at the learning rate its package sets.
        extras: whether width and short budgets are measured.
        log_scale: whether losses span orders of magnitude (for plots and means).
        order: place of the task among others of its work.
        cache: folder of what ``prepare`` makes.
    """

    work: str
    preset: str
    name: str
    steps: int
    settings: dict[str, Any] = field(hash=False)
    data: Path | None = None
    device: str = "cpu"
    width: int | None = None
    lr_scale: float = 1.0
    tuning_seeds: tuple[int, ...] = (0,)
    reporting_seeds: tuple[int, ...] = (1, 2, 3)
    methods: tuple[str, ...] = ()
    knobs: bool = True
    refine: bool = True
    defaults: bool = True
    extras: bool = True
    log_scale: bool = False
    order: int = 0
    cache: Path = CACHE

    @property
    def adapters(self) -> tuple[int, int, float] | None:
        """Usual input size, rank and scaling of the adapters, where the size is known."""
        if self.width is None:
            return None
        rank = self.settings["rank"]
        return self.width, rank, self.settings.get("alpha", rank) / rank

    @property
    def recipe(self) -> str:
        """Digest of the settings."""
        return recipe_hash({"task": self.name, "device": self.device, **self.settings})

    @property
    def prepared(self) -> Path:
        """The file that ``prepare`` leaves for the worker processes."""
        return self.cache / f"{self.work}-{self.recipe}.pt"

    @property
    def folder(self) -> Path:
        """Where the records of this task live, relative to the output folder."""
        return Path(self.work) / self.preset / self.name

    def study(self, methods: Sequence[Method]) -> Study:
        """The comparison of ``methods`` on this task."""
        return Study(
            work=self.work,
            preset=self.preset,
            task=self.name,
            recipe=self.recipe,
            steps=self.steps,
            entries=tuple(
                method.entry(self.lr_scale, self.knobs, self.adapters) for method in methods
            ),
            tuning_seeds=self.tuning_seeds,
            reporting_seeds=self.reporting_seeds,
            refine=self.refine,
            width=self.extras,
            defaults=self.defaults,
            short=self.extras,
        )


class Work(Protocol):
    """The functions of a work's module."""

    PRESETS: tuple[str, ...]

    def tasks(self, preset: str, data: Path | None, device: str) -> list[Task]:
        """The tasks of a preset, without reading data beyond its identity."""

    def prepare(self, task: Task, report: Report | None = None) -> None:
        """What is made once before the cells of ``task`` (a pretrained base), cached.

        Args:
            task: the task.
            report: called with what is being done, the steps done and the steps in all.

        Raises:
            DataFileError: If a data file is missing or malformed.
        """

    def problem(self, task: Task) -> Problem:
        """The task itself; called in every worker process."""


def work(name: str) -> Work:
    """The module of a work."""
    return cast(Work, importlib.import_module(f"{__name__}.{name}"))


def files_identity(paths: Sequence[Path]) -> str:
    """Digest of the contents of data files; a missing file counts as such."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return f"files {digest.hexdigest()[:12]}"


def find(folder: Path, name: str, suffixes: Sequence[str]) -> Path:
    """``folder/name`` with the first of ``suffixes``, compressed or not.

    Raises:
        DataFileError: If there is none.
    """
    candidates = [folder / f"{name}{suffix}{gz}" for suffix in suffixes for gz in (".gz", "")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataFileError(candidates[-1], "no such file (nor with .gz)")
