"""A plain PyTorch loop: accumulation, clipping, a schedule, a record of the run, resuming."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from cg_optim import CGLoRAOptimizer
from cg_optim.recorder import RunRecorder

from .small import CLIP, Windows, language_model_with_lora


def train(folder: Path, steps: int = 20, accumulate: int = 2) -> list[float]:
    """Train, going on from ``folder/checkpoint.pt`` if it is there; the losses."""
    model = language_model_with_lora()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=40)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    recorder = RunRecorder(folder / "run.jsonl", optimizer, every=5)

    batches = list(DataLoader(Windows(), batch_size=8))
    losses = []
    for step in range(schedule.last_epoch, schedule.last_epoch + steps):
        loss = 0.0
        for part in range(accumulate):
            batch = batches[(step * accumulate + part) % len(batches)]
            part_loss = model(**batch).loss / accumulate
            part_loss.backward()
            loss += float(part_loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        recorder.record(loss)  # after backward(), before step()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)

    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**saved, "schedule": schedule.state_dict()}, checkpoint)
    return losses


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        losses = train(Path(temporary))
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
