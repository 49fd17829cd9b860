"""``python -m tests.fuzz.kills``: training killed 30 times, compared with training left alone."""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cg_optim import CGLoRAOptimizer
from tests import models, processes
from tests.models import snapshot, tagger

#: How a user may save.  ``atomic`` renames a finished file, so one is there as a whole or not
#: at all; ``torch.save`` keeps the last files and goes on from the newest that can be read.
WAYS = ("atomic", "torch.save")


def newest(folder: Path) -> tuple[int, Any]:
    """The newest checkpoint that can be read, and its number of steps; 0 and None without."""
    for path in sorted(folder.glob("*.pt"), key=lambda path: -int(path.stem)):
        try:
            return int(path.stem), torch.load(path, weights_only=True)
        except Exception:
            continue  # killed while it was written
    return 0, None


def finished(folder: Path) -> int:
    """The highest number of any file, readable or not."""
    return max((int(path.stem) for path in folder.glob("*.pt")), default=0)


def _train(folder: Path, way: str, steps: int, pause: float) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=3)
    first, saved = newest(folder)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, steps):
        models.train(model, optimizer, [step])
        path = folder / f"{step + 1}.pt"
        if way == "atomic":
            torch.save(snapshot(model, optimizer), folder / "new")
            os.replace(folder / "new", path)
        else:
            torch.save(snapshot(model, optimizer), path)
        (folder / f"{step - 1}.pt").unlink(missing_ok=True)
        time.sleep(pause)


def train(folder: Path, way: str, steps: int, pause: float = 0.0) -> BaseProcess:
    """Start a process that trains from the newest checkpoint of a folder to the end."""
    folder.mkdir(exist_ok=True)
    return processes.start(_train, folder, way, steps, pause)


def train_with_kills(folder: Path, way: str, steps: int, kills: int, seed: int = 0) -> list[int]:
    """Kill a training at random moments, start it again each time, and let it finish.

    Returns:
        The number of steps that had been taken at each kill.
    """
    choose, killed = random.Random(seed), []
    for number in range(kills):
        process = train(folder, way, steps, pause=0.02)
        # Evenly spread, so that there is something left to kill at the end.
        target = steps * (number + 1) // (kills + 2) + choose.randint(0, 1)
        while process.is_alive() and finished(folder) < target:
            time.sleep(0.005)
        time.sleep(choose.random() * 0.04)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the training ended before kill {number}, with {process.exitcode}")
        killed.append(finished(folder))
    processes.finish(train(folder, way, steps))
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        alone = Path(temporary) / "alone"
        processes.finish(train(alone, "atomic", arguments.steps))
        expected = newest(alone)
        for way in WAYS:
            folder = Path(temporary) / way
            killed = train_with_kills(folder, way, arguments.steps, arguments.kills)
            torch.testing.assert_close(newest(folder), expected, rtol=0, atol=0)
            print(
                f"{way}: killed {len(killed)} times, at steps {killed}: the same bits", flush=True
            )


if __name__ == "__main__":
    main()
