"""The optimizer inside what a framework has put around it."""

from __future__ import annotations

from cg_optim.errors import OptimizerTypeError
from cg_optim.optimizer import CGLoRAOptimizer


def unwrap(optimizer: object) -> CGLoRAOptimizer:
    """The ``CGLoRAOptimizer`` inside Accelerate's, Lightning's or DeepSpeed's wrapper.

    Args:
        optimizer: The optimizer itself, or a wrapper that keeps it as ``.optimizer``.

    Raises:
        OptimizerTypeError: If there is another optimizer inside, or none.
    """
    inside = optimizer
    while not isinstance(inside, CGLoRAOptimizer):
        inner = getattr(inside, "optimizer", None)
        if inner is None or inner is inside:
            raise OptimizerTypeError(
                f"got a {type(optimizer).__name__} with a {type(inside).__name__} in it; "
                "expected a CGLoRAOptimizer, or a framework's wrapper around one"
            )
        inside = inner
    return inside
