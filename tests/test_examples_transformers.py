"""The examples with Trainer and TRL run, learn, log, and resume bitwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import (
    CGOptimWarning,
    IgnoredSettingWarning,
    OptimizerTypeError,
    ParameterError,
)
from cg_optim.recorder import read_run
from tests.examples import accelerate_forgets, healthy
from tests.models import assert_equal, parameters_of

pytest.importorskip("peft")
pytest.importorskip("accelerate")
from peft import get_peft_model

from benchmarks.examples import small, trainer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def forgetful_accelerate() -> Iterator[None]:
    yield from accelerate_forgets()


class Until(trainer.transformers.TrainerCallback):
    """Kills the process in the middle of a step, as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_after(folder: Path, step: int) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[3]));"
        "from pathlib import Path; from benchmarks.examples import trainer;"
        "from tests.test_examples_transformers import Until;"
        "built = trainer.trainer(Path(sys.argv[1]));"
        "built.add_callback(Until(int(sys.argv[2]))); built.train()"
    )
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), str(step), threads]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built = trainer.trainer(tmp_path_factory.mktemp("whole"))
    built.train()
    return built


def test_trainer_logs_what_the_optimizer_does(uninterrupted: Any) -> None:
    assert healthy(uninterrupted.optimizer.optimizer)
    history = uninterrupted.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    norms = [entry["grad_norm"] for entry in history if "loss" in entry]
    assert max(norms) > uninterrupted.args.max_grad_norm  # it is clipped, as it is meant to be
    looks = [entry for entry in history if "cg/predicted_decrease" in entry]
    assert [entry["step"] for entry in looks] == [4, 8, 12]
    assert all(entry["cg/predicted_decrease"] > 0 for entry in looks)
    assert all(entry["cg/unseen_pairs"] == entry["cg/events"] == 0 for entry in looks)
    run = read_run(Path(uninterrupted.args.output_dir) / "run.jsonl")
    assert [record["step"] for record in run] == [3, 7, 11]
    assert [record["loss"] for record in run] == losses
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert (
        [record["lr"] for record in run] == rates == pytest.approx([0.0075, 1e-2 / 2.4, 1e-2 / 12])
    )


@pytest.mark.parametrize("form", ["class", "instance"])
def test_all_forms_of_handing_it_over_train_alike(
    tmp_path: Path, uninterrupted: Any, form: str
) -> None:
    built = trainer.trainer(tmp_path, form, save_strategy="no")
    built.train()
    assert_equal(parameters_of(built.model), parameters_of(uninterrupted.model))
    again = trainer.trainer(tmp_path, form, save_strategy="no")
    again.train(resume_from_checkpoint=f"{uninterrupted.args.output_dir}/checkpoint-8")
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [4, 8, 12]
    assert_equal(parameters_of(again.model), parameters_of(uninterrupted.model))


@pytest.mark.slow
def test_a_killed_trainer_resumes_bitwise(tmp_path: Path, uninterrupted: Any) -> None:
    killed_after(tmp_path, step=6)
    again = trainer.trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_equal(parameters_of(again.model), parameters_of(uninterrupted.model))
    assert [record["step"] for record in read_run(tmp_path / "run.jsonl")] == [3, 7, 11]


def test_the_factory_takes_its_settings_from_the_arguments(tmp_path: Path) -> None:
    from cg_optim.integrations.transformers import trainer_optimizer

    given = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.2}
    args = trainer.arguments(tmp_path, learning_rate=3e-3, **given)
    expected = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
    expected["momentum"] = 0.7
    model = trainer.language_model_with_lora()
    more = {"damping": 2.0, "momentum": 0.7}
    for form in (trainer_optimizer(args, **more), trainer_optimizer(args, model, **more)):
        built = trainer.transformers.Trainer(model, args, optimizer_cls_and_kwargs=form)
        group = built.create_optimizer().param_groups[0]
        assert {name: group[name] for name in expected} == expected
        assert group["damping"] == 2.0
        built.optimizer.remove_hooks()
    form = trainer_optimizer(args, lr=1e-4, momentum=0.7)
    built = trainer.transformers.Trainer(model, args, optimizer_cls_and_kwargs=form)
    assert built.create_optimizer().param_groups[0]["lr"] == 1e-4


def test_a_beta1_that_does_not_reach_the_pairs_is_warned_about(tmp_path: Path) -> None:
    from cg_optim.integrations.transformers import trainer_optimizer

    args = trainer.arguments(tmp_path, adam_beta1=0.95)
    with pytest.warns(IgnoredSettingWarning, match=r"adam_beta1=0\.95.*momentum") as caught:
        trainer_optimizer(args)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", CGOptimWarning)
        trainer_optimizer(args, momentum=0.8)
        trainer_optimizer(trainer.arguments(tmp_path, learning_rate=0.1, weight_decay=0.3))


def test_the_factory_decays_what_the_trainer_itself_decays(tmp_path: Path) -> None:
    """No decay for biases and normalisation layers; LoRA factors of one group stay in it."""
    from cg_optim.integrations.transformers import trainer_optimizer

    torch.manual_seed(0)
    config = small.lora_config()
    config.lora_bias, config.modules_to_save = True, ["norm"]
    model = get_peft_model(small.language_model(), config)
    args = trainer.arguments(tmp_path, weight_decay=0.3)

    def decays(**form: Any) -> dict[str, float]:
        built = trainer.transformers.Trainer(model, args, **form)
        groups = built.create_optimizer().param_groups
        names = {p: name for name, p in model.named_parameters()}
        return {names[p]: group["weight_decay"] for group in groups for p in group["params"]}

    ours = decays(optimizer_cls_and_kwargs=trainer_optimizer(args))
    assert ours == decays()
    undecayed = {name.rpartition(".")[2] for name, decay in ours.items() if decay == 0}
    assert undecayed == {"bias", "weight"}
    assert {decay for name, decay in ours.items() if "lora_A" in name} == {0.3}


def test_the_class_alone_does_not_see_the_learning_rate_of_the_arguments(tmp_path: Path) -> None:
    """Why the factory exists; if this fails, transformers has changed and it can go."""
    model = trainer.language_model_with_lora()
    args = trainer.arguments(tmp_path, learning_rate=3e-3)
    form = (CGLoRAOptimizer, {"model": model})
    built = trainer.transformers.Trainer(model, args, optimizer_cls_and_kwargs=form)
    assert built.create_optimizer().param_groups[0]["lr"] == CGLoRAOptimizer(model).defaults["lr"]


def test_a_trainer_that_passes_no_model_is_told_how_to(tmp_path: Path) -> None:
    from cg_optim.integrations.transformers import trainer_optimizer

    optimizer_class, settings = trainer_optimizer(trainer.arguments(tmp_path))
    with pytest.raises(ParameterError, match="model=model"):  # what transformers 4 does
        optimizer_class([{"params": []}], **settings)


def test_the_callback_refuses_another_optimizer(tmp_path: Path) -> None:
    built = trainer.trainer(tmp_path, save_strategy="no", max_steps=1)
    built.optimizer = torch.optim.AdamW(built.model.parameters())
    with pytest.raises(OptimizerTypeError, match="AdamW"):
        built.train()


# ---------------------------------------------------------------------------------- TRL


def test_sft_trainer_adds_the_adapter_itself(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from benchmarks.examples import trl_sft

    built = trl_sft.trainer(tmp_path)
    built.train()
    optimizer = built.optimizer.optimizer
    assert isinstance(optimizer, CGLoRAOptimizer)
    assert len(optimizer.layer_diagnostics()) == 14
    assert healthy(optimizer)
    history = built.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    assert losses[-1]["loss"] < losses[0]["loss"]
    # TRL empties its own metrics whenever something is logged: ours must come after.
    assert all("mean_token_accuracy" in entry for entry in losses)
    assert losses[0]["learning_rate"] == pytest.approx(1e-2 * 9 / 10)
    assert sum("cg/relative_step" in entry for entry in history) == len(losses) == 5
