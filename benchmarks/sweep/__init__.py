"""Which cell next: the plan of a comparison as a pure function of the finished cells.

Every method goes through the same stages, with the same density of learning rates:

1. *tune*: on the tuning seeds and the ``choose`` half of the held-out data, three learning rates
   half a decade apart, widened while the best one lies at an edge, then refined to a quarter of a
   decade (a factor of 1.78) around the best one; so for each value of the second knob.
2. *report*: the chosen setting on the reporting seeds.
3. *default*: the method as its package sets it, on the tuning seeds.
4. *width*: the sweep of the chosen knob value extended until both ends leave both bands.
5. *short*: for methods that beat tuned AdamW, shorter budgets with their own schedule.

Nothing here trains or reads a file, and nothing is remembered: stopping at any point and asking
again gives the same plan minus what is finished.
"""

from .grid import (
    COARSE,
    SHORT_FRACTIONS,
    STEPS_PER_DECADE,
    best_place,
    nearest,
    place,
    rate,
    wanted_budget,
    wanted_for_width,
    wanted_places,
)
from .ledger import Choice, Ledger
from .planning import (
    BAND,
    BASELINE,
    ENOUGH_FAILURES,
    Request,
    forecast,
    is_broken,
    plan,
    short_steps,
    shortest,
)
from .study import Entry, Study, without_extras

__all__ = [
    "BAND",
    "BASELINE",
    "COARSE",
    "ENOUGH_FAILURES",
    "SHORT_FRACTIONS",
    "STEPS_PER_DECADE",
    "Choice",
    "Entry",
    "Ledger",
    "Request",
    "Study",
    "best_place",
    "forecast",
    "is_broken",
    "nearest",
    "place",
    "plan",
    "rate",
    "short_steps",
    "shortest",
    "wanted_budget",
    "wanted_for_width",
    "wanted_places",
    "without_extras",
]
