"""A training process that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.models import assert_equal

STEPS = 40

# Saves after each step; a rename is atomic, so a file is there as a whole or not at all.
TRAINING = f"""
import os, sys, time, torch
from cg_optim import CGLoRAOptimizer
from tests.models import snapshot, tagger, train
path = sys.argv[1]
model = tagger()
optimizer = CGLoRAOptimizer(model, lr=1e-2)
first = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["optimizer"]["param_groups"][0]["steps_taken"]
for step in range(first, {STEPS}):
    train(model, optimizer, [step])
    torch.save(snapshot(model, optimizer), path + ".new")
    os.replace(path + ".new", path)
    time.sleep(0.02)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_restarted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    choose = random.Random(0)
    path = tmp_path / "checkpoint.pt"
    root = Path(__file__).parents[1]
    # Processes alike: sums are split by threads, and tests before may have set their number.
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAINING, str(path)]

    def steps_saved() -> int:
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        return saved["optimizer"]["param_groups"][0]["steps_taken"]

    kills = 0
    for _ in range(2):
        process = subprocess.Popen(command, cwd=root, env=environment)
        target = steps_saved() + choose.randint(2, 14)
        while process.poll() is None and steps_saved() < target:
            time.sleep(choose.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, cwd=root, env=environment, timeout=120)
    assert kills == 2

    alone = tmp_path / "uninterrupted.pt"
    subprocess.run([*command[:-1], str(alone)], check=True, cwd=root, env=environment, timeout=120)
    assert_equal(*(torch.load(file, weights_only=True) for file in (path, alone)))
