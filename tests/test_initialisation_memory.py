"""Memory of an initialisation at the size of Llama-7B, counted in bytes on its layer shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cg_optim import LoRAPair, curvature_init_
from cg_optim.initialisation.first_step import FirstStep

HIDDEN, INTERMEDIATE, BLOCKS, RANK = 4096, 11008, 32, 16
#: One decoder block: input and output sizes; layers of one group share their input.
GROUPS = (
    [(HIDDEN, HIDDEN)] * 3,
    [(HIDDEN, HIDDEN)],
    [(HIDDEN, INTERMEDIATE)] * 2,
    [(INTERMEDIATE, HIDDEN)],
)
GIB = 2**30


class Adapter(nn.Module):
    """A LoRA pair without the base weight under it."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.down = nn.Linear(n, RANK, bias=False)
        self.up = nn.Linear(RANK, m, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Block(nn.Module):
    """All pairs of one decoder block, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList(
            nn.ModuleList(Adapter(n, m) for n, m in group) for group in GROUPS
        )

    def forward(self, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        total = torch.zeros(())
        for group in self.groups:
            x = torch.randn(8, group[0].down.in_features, generator=source)
            for adapter in group:
                y = adapter(x)
                total = total + (y * torch.randn(y.shape, generator=source)).sum()
        return total

    def pairs(self) -> list[LoRAPair]:
        return [
            LoRAPair(a.down.weight, a.up.weight, f"{i}.{j}", 2.0, a, a.up)
            for i, group in enumerate(self.groups)
            for j, a in enumerate(group)
        ]


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def gradients_of_all_weights(bytes_each: int) -> int:
    """What LoRA-GA holds: the gradient of every adapted weight at once."""
    return bytes_each * BLOCKS * sum(n * m for group in GROUPS for n, m in group)


@pytest.mark.slow
def test_statistics_for_a_7b_model_are_an_eighth_of_its_gradients(block: Block) -> None:
    report = curvature_init_(
        block, [0, 1], lambda model, seed: model(seed), pairs=block.pairs(), progress=False
    )
    assert len(report.layers) == 7
    # The test matrices are shared by all blocks; counting them with each is on the safe side.
    whole = BLOCKS * report.bytes_held
    assert whole < 1.25 * GIB
    assert whole < gradients_of_all_weights(bytes_each=2) / 8  # in bf16
    assert whole < gradients_of_all_weights(bytes_each=4) / 16
    # Every layer holds O(n + m) numbers: no tensor is near the size of a weight.
    assert report.bytes_held < 4 * HIDDEN * INTERMEDIATE / 2


@pytest.mark.slow
def test_sketches_of_the_first_step_are_smaller_still(block: Block) -> None:
    first = FirstStep(block.pairs())
    held = 0
    for index, pair in enumerate(block.pairs()):
        first.consume(index, torch.randn(2, pair.in_features), torch.randn(2, pair.out_features))
    held = sum(sketch.nbytes for sketch in first._sketches.values())
    assert len(first._sketches) == 7
    assert BLOCKS * held < GIB / 2
