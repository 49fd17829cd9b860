"""Checkpointing saves as much memory under this optimizer as under AdamW."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cg_optim import CGLoRAOptimizer
from tests import processes
from tests.models import LoRALinear

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = LoRALinear(128, 512), LoRALinear(512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def peak() -> int:  # not ru_maxrss, which a process inherits from the one that started it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def growth_here(way: str, which: str) -> int:
    # Freed tensors go back to the system at once, or the peak would be that of the heap's holes.
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 65536)
    torch.manual_seed(0)
    model = nn.ModuleList(Block() for _ in range(6))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        CGLoRAOptimizer(model, lr=1e-3)
        if which == "ours"
        else torch.optim.AdamW(trainable, lr=1e-3)
    )

    def step(rows: int) -> None:
        x = torch.randn(rows, 128, requires_grad=way == "reentrant")
        for block in model:
            if way == "none":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=way == "reentrant")
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    # Activations are large beside everything else; this first step has none to speak of.
    step(8)
    before = peak()
    for _ in range(2):
        step(4096)
    return peak() - before


def growth(way: str, which: str) -> int:
    """By how much training raises the peak of a process's resident memory, in KiB.

    In a process of its own, because the peak of a process never falls.
    """
    return processes.call(growth_here, way, which)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_the_peak_under_checkpointing_is_that_of_adamw(way: str) -> None:
    adamw, ours = growth(way, "adamw"), growth(way, "ours")
    assert ours < 1.10 * adamw
    # The measurement means something: without checkpointing it is several times as much.
    if way == "reentrant":
        assert growth("none", "adamw") > 2 * adamw
