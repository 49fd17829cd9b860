"""What is compared: the methods that take part and the settings of the protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Entry:
    """How one method takes part in a study.

    Attributes:
        method: its name.
        lr: learning rate to start the sweep around.
        default: learning rate its package sets, ``None`` if the package names none.
        knobs: values of the second knob to sweep, the package's own first; ``(None,)`` without.
        priority: methods of a lower number are finished first.
        follows: name of the method whose tuned learning rate is the centre (three values around
            it, widened but not refined), for initialisations.
        revision: see :class:`~benchmarks.cells.Cell`.
    """

    method: str
    lr: float
    default: float | None = None
    knobs: tuple[float | None, ...] = (None,)
    priority: int = 1
    follows: str | None = None
    revision: str = ""


@dataclass(frozen=True)
class Study:
    """One comparison: a task, the methods that take part and the protocol's settings."""

    work: str
    preset: str
    task: str
    recipe: str
    steps: int
    entries: tuple[Entry, ...]
    tuning_seeds: tuple[int, ...] = (0,)
    reporting_seeds: tuple[int, ...] = (1, 2, 3)
    refine: bool = True
    width: bool = True
    defaults: bool = True
    short: bool = True

    def entry(self, method: str) -> Entry | None:
        """The entry of ``method`` if it takes part."""
        return next((entry for entry in self.entries if entry.method == method), None)


def without_extras(study: Study) -> Study:
    """The study reduced to tuning and reporting."""
    return replace(study, width=False, defaults=False, short=False)
