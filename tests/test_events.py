"""Counting and warning, on the host and for counts that arrive later."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from cg_optim.errors import NumericalWarning
from cg_optim.events import CURVATURE_DROPPED, MEANING, PAIR_SKIPPED, EventCounter


def test_counts_numbers_and_tensors() -> None:
    events = EventCounter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events.add(PAIR_SKIPPED, [])
        events.add(PAIR_SKIPPED, [torch.tensor([False, False])])
    assert events.counts() == dict.fromkeys(MEANING, 0)
    with pytest.warns(NumericalWarning, match="LoRA pair"):
        events.add(PAIR_SKIPPED, [torch.tensor([True, False]), torch.tensor(True)])
    with pytest.warns(NumericalWarning, match="inputs of a layer"):
        events.add(CURVATURE_DROPPED, [torch.tensor(True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events.add(PAIR_SKIPPED, [torch.ones(3, dtype=torch.bool)])
    assert events.counts() == {**dict.fromkeys(MEANING, 0), PAIR_SKIPPED: 5, CURVATURE_DROPPED: 1}


def test_nothing_is_looked_at_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinning memory, or asking an event, would end the capture.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    events = EventCounter()
    events._watch(PAIR_SKIPPED, SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
    assert not events._arriving


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counting_on_a_gpu_does_not_wait_for_it() -> None:
    events = EventCounter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        events.add(PAIR_SKIPPED, [torch.ones((), dtype=torch.bool, device="cuda")])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.warns(NumericalWarning):
        events.add(PAIR_SKIPPED, [torch.ones((), dtype=torch.bool, device="cuda")])
    assert events.counts()[PAIR_SKIPPED] == 2
