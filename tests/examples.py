"""What the tests of the examples share."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cg_optim import CGLoRAOptimizer


def healthy(optimizer: CGLoRAOptimizer) -> bool:
    """Every observed pair was seen and stepped every time, and no number went wrong."""
    layers = optimizer.layer_diagnostics()
    return (
        bool(layers)
        and all(layer.seen and layer.missed_steps == 0 for layer in layers)
        and not any(optimizer.diagnostics().values())
    )


def accelerate_forgets() -> Iterator[None]:
    """Accelerate, and Trainer through it, keep precision and accumulation for the process."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    before = dict(os.environ)
    forget()
    yield
    forget()
    for name in set(os.environ) - set(before):
        del os.environ[name]
