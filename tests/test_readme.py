"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from cg_optim import CGLoRAOptimizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(nn.Module):
    """A layer that PEFT adapts, and two that only a declaration makes a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)


def names() -> dict[str, object]:
    """What the README's code takes as given."""
    model = get_peft_model(Block(), LoraConfig(r=2, target_modules=["linear"]))
    down, up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    model.base_model.model.squeeze, model.base_model.model.restore = down, up
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    return {"model": model, "groups": groups, "down": down, "up": up}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_runs_without_a_warning(code: str) -> None:
    given = names()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(code, given)
    optimizer = given.get("optimizer")
    if isinstance(optimizer, CGLoRAOptimizer):
        assert "linear" in optimizer.summary()


def test_make_has_the_commands_it_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_files_it_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_defaults_are_those_of_the_signature() -> None:
    import inspect

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(CGLoRAOptimizer).parameters.items()
    }
    for name in ("lr", "damping", "curvature"):
        (shown,) = re.findall(rf"^\| `{name}` \| `?\"?([^`\"|]+?)\"?`? \|", README, re.MULTILINE)
        assert str(defaults[name]) == shown or float(shown) == defaults[name]
