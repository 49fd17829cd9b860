"""TRL's SFTTrainer, which puts the adapter into the model itself."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
import trl

from cg_optim.integrations.transformers import DiagnosticsCallback, trainer_optimizer

from .small import CLIP, language_model, lora_config


def bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each of the 256 bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    end = alphabet[0]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end
    )


def trainer(folder: Path, **more: Any) -> trl.SFTTrainer:
    """With ``peft_config=`` there is no adapter before the trainer is built, hence the factory."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": CLIP,
        "max_length": 48,
        "packing": False,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": True,
        "disable_tqdm": True,
    }
    args = trl.SFTConfig(**{**settings, **more})
    lines = [line for line in inspect.getsource(argparse).splitlines() if len(line) > 20]
    built = trl.SFTTrainer(
        language_model(),
        args,
        train_dataset=datasets.Dataset.from_dict({"text": lines[:160]}),
        processing_class=bytes_tokenizer(),
        peft_config=lora_config(),
        optimizer_cls_and_kwargs=trainer_optimizer(args),
    )
    built.add_callback(DiagnosticsCallback(built))
    return built


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        trainer(Path(temporary)).train()
