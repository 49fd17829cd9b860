"""What surrounds the passes of an initialisation: the user's state, and a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cg_optim.pairs import LoRAPair
from cg_optim.precision import autocast_off


@contextlib.contextmanager
def left_alone(model: nn.Module, pairs: Sequence[LoRAPair], seed: int) -> Iterator[None]:
    """Only the ``B`` of the pairs get gradients inside; everything is as before outside.

    Autocast is off inside: statistics and factors need their full precision.
    """
    factors = {id(pair.B) for pair in pairs}
    parameters = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    indices = sorted(index for index in devices if index is not None)
    with autocast_off(pair.A for pair in pairs), torch.random.fork_rng(devices=indices):
        torch.manual_seed(seed)
        try:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in factors)
            yield
        finally:
            for parameter, (required, grad) in zip(parameters, before, strict=True):
                parameter.requires_grad_(required)
                parameter.grad = grad


def under_autocast_of_now(
    function: Callable[[nn.Module, Any], Tensor], pairs: Sequence[LoRAPair]
) -> Callable[[nn.Module, Any], Tensor]:
    """The function, run whenever it is called with the autocast of the present surroundings."""
    device = pairs[0].A.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(model: nn.Module, data: Any) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return function(model, data)

    return run


@contextlib.contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """A progress bar that shows after two seconds; none without a terminal or without tqdm."""
    try:
        if not wanted:
            raise ImportError
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc="curvature initialisation", delay=2.0, disable=None) as bar:
        yield bar.update
