"""What surrounds the passes of an initialisation: the user's state, and a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from cg_optim.pairs import LoRAPair


@contextlib.contextmanager
def left_alone(model: nn.Module, pairs: Sequence[LoRAPair], seed: int) -> Iterator[None]:
    """Only the ``B`` of the pairs get gradients inside; everything is as before outside."""
    factors = {id(pair.B) for pair in pairs}
    parameters = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
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
