"""Every exception and warning this package raises.

Each message prints the offending value and says what to change.  All errors
derive from :class:`CGOptimError`, so ``except CGOptimError`` catches exactly what
this package decided to refuse; each also derives from the builtin that
``torch.optim`` would raise in its place, so existing handlers keep working.
"""

from __future__ import annotations

import sys
import warnings


class CGOptimError(Exception):
    """Base class of all errors raised by :mod:`cg_optim`."""


class HyperparameterError(CGOptimError, ValueError):
    """A hyper-parameter is outside the range in which it means something."""


class PairError(CGOptimError, ValueError):
    """Two matrices declared as a LoRA pair cannot be one (shapes, dtype, identity)."""


class AdapterError(CGOptimError, ValueError):
    """The model's adapters cannot be trained as they are (frozen, merged, disabled)."""


class InitialisationError(CGOptimError, ValueError):
    """The adapters cannot be initialised as asked (trained already, rank too large)."""


class ParameterError(CGOptimError, ValueError):
    """The parameters handed over cannot be optimised (none at all, duplicates, complex)."""


class GradientError(CGOptimError, RuntimeError):
    """A gradient has a layout or dtype the optimizer cannot use (sparse, complex)."""


class StateError(CGOptimError, ValueError):
    """A state dict does not belong to this optimizer and model."""


class OptimizerTypeError(CGOptimError, TypeError):
    """Something else was given where only a ``CGLoRAOptimizer`` will do."""


class RunFileError(CGOptimError, ValueError):
    """A recorded run cannot be read or drawn."""


class NumericalError(CGOptimError, RuntimeError):
    """A numerical failure under ``strict=True``; without it the failure is absorbed."""


class CGOptimWarning(UserWarning):
    """Base class of all warnings issued by :mod:`cg_optim`."""


class NoPairsWarning(CGOptimWarning):
    """No LoRA pair is known, so the optimizer works as plain AdamW."""


class UnobservedPairWarning(CGOptimWarning):
    """A pair gets gradients but its curvature hooks do not fire."""


class IgnoredSettingWarning(CGOptimWarning):
    """A setting of the training framework means nothing to the LoRA factors."""


class NumericalWarning(CGOptimWarning):
    """A numerical failure was absorbed; see ``optimizer.diagnostics()`` for counts."""


def warn(message: str, category: type[CGOptimWarning]) -> None:
    """Warn at the line of the user's that led here, however many wrappers are in between.

    ``step`` is wrapped by torch (no_grad, profiler, schedulers), so a fixed
    ``stacklevel`` would point into one of them.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours_or_torch(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_ours_or_torch(module: str) -> bool:
    return module.partition(".")[0] in ("cg_optim", "torch", "contextlib")
