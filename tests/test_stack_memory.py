"""Checkpointing saves as much memory under this optimizer as under AdamW."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A process of its own, because the peak of a process never falls.  Activations are large
# beside everything else; the warm-up step has no activations to speak of.
TRAINING = """
import sys, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from cg_optim import CGLoRAOptimizer
from tests.models import LoRALinear

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = LoRALinear(128, 512), LoRALinear(512, 128)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.manual_seed(0)
way, which = sys.argv[1:]
model = nn.ModuleList(Block() for _ in range(6))
trainable = [p for p in model.parameters() if p.requires_grad]
if which == "ours":
    optimizer = CGLoRAOptimizer(model, lr=1e-3)
else:
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)

def step(rows):
    x = torch.randn(rows, 128, requires_grad=way == "reentrant")
    for block in model:
        x = block(x) if way == "none" else checkpoint(block, x, use_reentrant=way == "reentrant")
    x.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

step(8)
before = peak()
for _ in range(2):
    step(4096)
print(peak() - before)
"""


def growth(way: str, which: str) -> int:
    """By how much training raises the peak of a process's resident memory, in KiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Freed tensors go back to the system at once, or the peak would be that of the heap's holes.
    environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, way, which],
        check=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_the_peak_under_checkpointing_is_that_of_adamw(way: str) -> None:
    adamw, ours = growth(way, "adamw"), growth(way, "ours")
    assert ours < 1.10 * adamw
    # The measurement means something: without checkpointing it is several times as much.
    if way == "reentrant":
        assert growth("none", "adamw") > 2 * adamw
