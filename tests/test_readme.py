"""What the README shows runs as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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


#: Where each command of the README is run: a target of the Makefile, or a file that must
#: name the module it runs.
RUN_BY = {
    "python3 -m pip install .": "tests/test_readme.py",
    "make demo": "tests/benchmarks/test_demo.py",
    "make test": ".ci/run",
    "make docs": "tests/test_docs.py",
    "python3 -m venv .venv": "Makefile",
    '.venv/bin/python -m pip install -c constraints.txt -e ".[dev]"': "Makefile",
    ".venv/bin/python -m benchmarks.demo": "tests/benchmarks/test_demo.py",
    ".venv/bin/python -m pytest": "Makefile",
    "python -m benchmarks.examples.trainer": "tests/test_examples_transformers.py",
    "python -m benchmarks.peft_kinds": "tests/test_peft_kinds.py",
    "python -m cg_optim.report run.jsonl": "tests/test_report.py",
}


def test_every_command_in_it_is_run_somewhere() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = {line.partition("#")[0].strip() for block in blocks for line in block.splitlines()}
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    commands |= set(re.findall(r"`(python -m [^`]+)`", text)) - {"python -m benchmarks"}
    assert commands == set(RUN_BY)
    for command, file in RUN_BY.items():
        module = command.split()[-1] if "make" in command else command.split("-m ")[1].split()[0]
        name = module.rpartition(".")[2]
        assert name in (ROOT / file).read_text(encoding="utf-8"), command


def test_examples_it_names_exist() -> None:
    (names,) = re.findall(
        r"`python -m benchmarks\.examples\.trainer`, also (.*?)\.\n", README, re.S
    )
    named = {"trainer", *re.findall(r"`(\w+)`", names)}
    programs = {path.stem for path in (ROOT / "benchmarks" / "examples").glob("*.py")}
    assert named == programs - {"__init__", "small"}


@pytest.mark.slow
def test_a_plain_installation_needs_torch_only(tmp_path: Path) -> None:
    """python3 -m pip install . into an environment of its own, without its dependencies."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "cg_optim", source / "cg_optim")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--no-build-isolation", "--no-index", "--target", str(target), str(source)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    code = (
        "import sys, cg_optim, cg_optim.report, cg_optim.integrations, torch;"
        "assert cg_optim.__file__.startswith(sys.argv[1]), cg_optim.__file__;"
        "others = {'transformers', 'peft', 'lightning', 'matplotlib', 'accelerate'};"
        "assert not others & set(sys.modules), others & set(sys.modules);"
        "cg_optim.CGLoRAOptimizer(torch.nn.Linear(2, 2), curvature=None).step()"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    subprocess.run(
        [sys.executable, "-c", code, str(target)], check=True, env=environment, cwd=tmp_path
    )
    assert (target / "cg_optim" / "py.typed").exists()


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
