"""Models and data on which initialisations are tried: LoRA layers of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import LoRALinear, batch, tagger

peft = pytest.importorskip("peft")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

MODES = ("keep", "newton", "shift")
BATCHES = [batch(seed, padded=True) for seed in range(4)]
#: Sizes of the layers that are not a tagger's.
N, M = 10, 14


def fresh_tagger(seed: int = 0, **arguments: Any) -> nn.Module:
    model = tagger(seed, **arguments)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def two_layers(kind: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Module:
    return nn.Sequential(kind(N, M), nn.Tanh(), kind(M, N))


def adapted(base: nn.Module, **arguments: Any) -> nn.Module:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], **arguments}
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def with_loralib() -> nn.Module:
    loralib = pytest.importorskip("loralib")
    return nn.Sequential(
        loralib.Linear(N, M, r=4, lora_alpha=8), nn.Tanh(), loralib.Linear(M, N, r=4)
    )


def home_made() -> nn.Module:
    layers = LoRALinear(N, M, r=4), LoRALinear(M, N, r=4)
    for layer in layers:
        nn.init.zeros_(layer.lora_B.weight)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


KINDS: dict[str, Callable[[], nn.Module]] = {
    "peft": lambda: adapted(two_layers()),
    "conv1d": lambda: adapted(two_layers(lambda n, m: conv1d(m, n)), fan_in_fan_out=True),
    "rslora": lambda: adapted(two_layers(), use_rslora=True),
    "ranks": lambda: adapted(two_layers(), rank_pattern={"0": 7}, alpha_pattern={"2": 3}),
    "dora": lambda: adapted(two_layers(), use_dora=True),
    "bf16": lambda: adapted(two_layers().bfloat16()),
    "loralib": with_loralib,
    "home-made": home_made,
}


def regression(seed: int = 0, rows: int = 60) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, N, generator=source), torch.randn(rows, N, generator=source)


def squares(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x = data[0].to(next(p for p in model.parameters() if not p.requires_grad).dtype)
    return 0.5 * (model(x).float() - data[1]).square().sum(-1).mean()


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model


def train_once(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    squares(model, data).backward()
    optimizer.step()


def weight_of(pair: Any, model: nn.Module) -> Tensor:
    base = getattr(pair.input_module, "base_layer", pair.input_module)
    transposed = isinstance(base, conv1d)
    return base.weight.data.T if transposed else base.weight.data
