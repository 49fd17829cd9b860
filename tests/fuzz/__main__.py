"""``python -m tests.fuzz``: many random problems, from a seed; prints what was seen."""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from tests.fuzz import matrices
from tests.fuzz.problems import Tally, run

TOGETHER = 40
MATRICES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first model; others follow")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, tally = time.monotonic(), Tally()
    for seed in range(arguments.seed, arguments.seed + -(-arguments.problems // TOGETHER)):
        try:
            tally += run(seed, TOGETHER)
        except Exception as error:
            raise SystemExit(
                f"seed {seed}: {type(error).__name__}: {error}\n"
                f"again: python -m tests.fuzz --seed {seed} --problems {TOGETHER}"
            ) from error
    print(
        f"{tally.problems:,} problems, {tally.faults:,} faults injected: nothing that is not "
        f"finite left a step, and the {tally.healthy:,} healthy ones among them trained on; "
        f"{time.monotonic() - started:.0f} s. Absorbed:"
    )
    for kind, count in tally.events.items():
        print(f"  {kind}: {count:,}")
    rungs: Counter[str] = Counter()
    for seed in range(arguments.seed, arguments.seed + -(-arguments.problems // MATRICES)):
        rungs += matrices.run(seed, MATRICES)
    print(f"{rungs.total():,} matrices factorised, by the rung they needed:")
    for rung, count in rungs.items():
        print(f"  {rung}: {count:,}")


if __name__ == "__main__":
    main()
