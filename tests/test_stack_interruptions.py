"""A training process that is killed at any moment goes on as if nothing had happened.

``make soak`` kills 30 times in each way.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import processes
from tests.fuzz.kills import WAYS, newest, train, train_with_kills
from tests.models import assert_equal

STEPS = 24


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_restarted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    # The reference runs beside the others, which are killed once each.
    alone = train(tmp_path / "alone", "atomic", STEPS)
    for way in WAYS:
        assert len(train_with_kills(tmp_path / way, way, STEPS, kills=1)) == 1
    processes.finish(alone)
    steps, expected = newest(tmp_path / "alone")
    assert steps == STEPS
    for way in WAYS:
        assert_equal(newest(tmp_path / way), (steps, expected))


def test_a_checkpoint_cut_off_by_the_kill_is_passed_over(tmp_path: Path) -> None:
    processes.finish(train(tmp_path, "torch.save", 2))
    whole = (tmp_path / "2.pt").read_bytes()
    (tmp_path / "2.pt").write_bytes(whole[: len(whole) // 2])
    steps, saved = newest(tmp_path)
    assert steps == 1
    assert saved["optimizer"]["param_groups"][0]["steps_taken"] == 1
