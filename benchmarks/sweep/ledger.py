"""What the finished cells of a study say: losses, the tuned settings and what tuning lacks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..cells import Cell, Result
from .grid import COARSE, best_place, nearest, place, rate, wanted_places
from .study import Entry, Study

Key = tuple[str, float, float | None, int, int]


@dataclass(frozen=True)
class Choice:
    """A tuned setting: its place on the grid, its knob value and its loss when tuned."""

    place: int
    knob: float | None
    loss: float

    @property
    def lr(self) -> float:
        """Learning rate of the choice."""
        return rate(self.place)


class Ledger:
    """The finished cells of one study, asked in the terms of the protocol."""

    def __init__(self, study: Study, results: Collection[Result]) -> None:
        self.study = study
        self._results: dict[Key, Result] = {}
        revisions = {entry.method: entry.revision for entry in study.entries}
        for result in results:
            cell = result.cell
            same = (cell.work, cell.preset, cell.task, cell.recipe)
            if same != (study.work, study.preset, study.task, study.recipe):
                continue
            if revisions.get(cell.method) == cell.revision:
                self._results[(cell.method, cell.lr, cell.knob, cell.seed, cell.steps)] = result

    def cell(
        self, entry: Entry, lr: float, knob: float | None, seed: int, steps: int | None = None
    ) -> Cell:
        """The cell of a setting of ``entry`` in this study."""
        study = self.study
        return Cell(
            work=study.work,
            preset=study.preset,
            task=study.task,
            method=entry.method,
            lr=lr,
            knob=knob,
            seed=seed,
            steps=steps or study.steps,
            recipe=study.recipe,
            revision=entry.revision,
        )

    def get(self, cell: Cell) -> Result | None:
        """The finished result of ``cell``."""
        return self._results.get((cell.method, cell.lr, cell.knob, cell.seed, cell.steps))

    def of(self, method: str) -> list[Result]:
        """All finished cells of ``method``."""
        return [result for key, result in self._results.items() if key[0] == method]

    def mean(self, cells: Sequence[Cell], half: str) -> float | None:
        """Mean final loss over ``cells``; ``None`` while one is missing, infinite if one is bad."""
        found = [self.get(cell) for cell in cells]
        if any(result is None for result in found):
            return None
        return sum(result.loss(half) for result in found if result) / len(found)

    def rates(self, method: str, knob: float | None) -> list[float]:
        """Learning rates that any tuning seed of ``method`` has finished."""
        return sorted(
            {
                lr
                for (name, lr, value, seed, steps) in self._results
                if (name, value) == (method, knob)
                and seed in self.study.tuning_seeds
                and steps == self.study.steps
            }
        )

    def losses(self, entry: Entry, knob: float | None) -> dict[int, float]:
        """Tuning loss of every place of the grid that all tuning seeds have finished."""
        losses = {}
        for lr in self.rates(entry.method, knob):
            index = place(lr)
            mean = self.tuning_loss(entry, lr, knob)
            if index is not None and mean is not None:
                losses[index] = mean
        return losses

    def tuning_loss(self, entry: Entry, lr: float, knob: float | None) -> float | None:
        """Mean tuning loss of one setting, ``None`` while a seed is missing."""
        seeds = self.study.tuning_seeds
        return self.mean([self.cell(entry, lr, knob, seed) for seed in seeds], "choose")

    def centre(self, entry: Entry, knob: float | None) -> int | None:
        """Where the sweep of ``entry`` starts; ``None`` while that is not known yet."""
        if entry.follows is not None:
            followed = self.study.entry(entry.follows)
            if followed is None:
                return nearest(entry.lr)
            choice = self.choice(followed)
            return None if choice is None else choice.place
        first = nearest(entry.lr)
        if knob == entry.knobs[0]:
            return first
        # Later values of the knob start from the first one's best, to save widening; the density
        # and the stopping rule are the same.
        best = best_place(self.losses(entry, entry.knobs[0]))
        return first if best is None else first + COARSE * round((best - first) / COARSE)

    def pending(self, entry: Entry) -> list[tuple[int, float | None]]:
        """Settings that tuning still needs."""
        pending: list[tuple[int, float | None]] = []
        refine = self.study.refine and entry.follows is None
        for knob in entry.knobs:
            centre = self.centre(entry, knob)
            if centre is None:
                return []
            losses = self.losses(entry, knob)
            wanted = wanted_places(losses, centre, refine=refine)
            pending.extend((index, knob) for index in wanted)
            if wanted and knob == entry.knobs[0]:
                break
        return pending

    def choice(self, entry: Entry) -> Choice | None:
        """The tuned setting; ``None`` while tuning goes on or if every run diverged or failed."""
        if entry.follows and self.centre(entry, entry.knobs[0]) is None:
            return None
        if self.pending(entry):
            return None
        return self.leading(entry)

    def leading(self, entry: Entry) -> Choice | None:
        """The best setting so far, finished or not."""
        choices = []
        for knob in entry.knobs:
            losses = self.losses(entry, knob)
            best = best_place(losses)
            if best is not None:
                choices.append(Choice(best, knob, losses[best]))
        return min(choices, key=lambda choice: choice.loss, default=None)

    def reported(self, entry: Entry, lr: float, knob: float | None, steps: int) -> float | None:
        """Mean reporting loss of one setting."""
        seeds = self.study.reporting_seeds
        return self.mean([self.cell(entry, lr, knob, seed, steps) for seed in seeds], "report")
