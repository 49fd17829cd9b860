"""The optimizer inside DistributedDataParallel, Accelerate and the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from cg_optim import CGLoRAOptimizer
from tests.models import (
    Batch,
    assert_close,
    assert_equal,
    batch,
    curvature_state,
    loss_of,
    parameters_of,
    tagger,
    train,
)


def halves(data: Batch) -> list[Batch]:
    return list(zip(*(tensor.split(4) for tensor in data), strict=True))


def trained_on_whole_batches(steps: int) -> tuple[nn.Module, CGLoRAOptimizer]:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(steps), rows=8)
    return model, optimizer


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_accumulation_without_synchronisation(view: bool, set_to_none: bool) -> None:
    """Gradients that are views of a bucket share its version, which others change.

    They are, from the second step on, if they are zeroed in place.
    """
    model = tagger()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = CGLoRAOptimizer(parallel, lr=1e-2)
    for step in range(4):
        first, second = halves(batch(step, rows=8))
        with parallel.no_sync():
            (loss_of(parallel, first) / 2).backward()
        (loss_of(parallel, second) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad(set_to_none=set_to_none)
    assert any(grad._is_view() for grad in grads) == view
    reference, other = trained_on_whole_batches(4)
    assert_close(curvature_state(model, optimizer), curvature_state(reference, other))
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-3, atol=1e-5)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare = tagger()
    model, optimizer = accelerator.prepare(bare, CGLoRAOptimizer(bare, lr=1e-2))
    for step in range(4):
        for part in halves(batch(step, rows=8)):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, part))
                optimizer.step()
                optimizer.zero_grad()
    reference, other = trained_on_whole_batches(4)
    assert_close(curvature_state(bare, optimizer.optimizer), curvature_state(reference, other))
    assert_close(parameters_of(bare), parameters_of(reference), rtol=1e-3, atol=1e-5)


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, mask, labels = batch(index, rows=1)
        return {"tokens": tokens[0], "mask": mask[0], "labels": labels[0]}


class WithLoss(nn.Module):
    """The tagger as Trainer wants it: named inputs, the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = tagger()

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.tagger, (tokens, mask, labels))}


def trainer(folder: Path, **arguments: Any) -> tuple[Any, WithLoss]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 3,
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_safetensors": False,
        "learning_rate": 1e-2,
        **arguments,
    }
    known = transformers.TrainingArguments.__dataclass_fields__
    settings = {name: value for name, value in settings.items() if name in known}
    model = WithLoss()
    built = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(CGLoRAOptimizer, {"model": model, "lr": 1e-2}),
    )
    return built, model


def test_trainer_resumes_bitwise(tmp_path: Path) -> None:
    whole, model = trainer(tmp_path / "whole")
    whole.train()
    optimizer = whole.optimizer.optimizer
    assert curvature_state(model, optimizer)
    assert not any(optimizer.diagnostics().values())
    resumed, again = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(parameters_of(again), parameters_of(model))
    assert_equal(
        curvature_state(again, resumed.optimizer.optimizer), curvature_state(model, optimizer)
    )
