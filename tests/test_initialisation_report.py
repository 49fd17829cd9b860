"""The report on a layer, against spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cg_optim import LoRAPair
from cg_optim.initialisation.report import LayerReport, layer_report

SIZE = 40


def report(kept: torch.Tensor, energy: float, rank: int = 2) -> LayerReport:
    down, up = nn.Linear(SIZE, rank, bias=False), nn.Linear(rank, SIZE + 10, bias=False)
    pair = LoRAPair(down.weight, up.weight, "layer", 1.0, down, up)
    return layer_report(pair, kept, torch.tensor(energy))


def test_a_spectrum_that_is_known_whole() -> None:
    found = report(torch.tensor([3.0, 2.0, 1.0]), energy=14.0)
    assert found.captured_energy == pytest.approx(13 / 14)
    entropy = -sum(share * math.log(share) for share in (9 / 14, 4 / 14, 1 / 14))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert found.suggested_rank == 2


@pytest.mark.parametrize("kept", [2, 10, SIZE])
def test_equal_directions_are_as_many_as_there_are(kept: int) -> None:
    found = report(torch.ones(kept), energy=float(SIZE))
    assert found.effective_rank == pytest.approx(SIZE)
    assert found.captured_energy == pytest.approx(2 / SIZE)
    assert found.suggested_rank == min(kept, 36)


def test_rounding_gives_no_more_than_the_whole() -> None:
    found = report(torch.ones(3), energy=2.9999)
    assert found.captured_energy <= 1.0
    assert found.effective_rank <= 3.0 + 1e-9
