"""Imported once by the fork server, so that a worker process starts in milliseconds.

Nothing here may run tensor code: a thread pool does not survive a fork.
"""

from . import execute, initialisations, methods, training
from .works import linear, lm, nlu

__all__ = ["execute", "initialisations", "linear", "lm", "methods", "nlu", "training"]
