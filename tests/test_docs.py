"""The documentation builds, its code runs, and its numbers are those of the code."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import cg_optim
from cg_optim import CGLoRAOptimizer, curvature_store, input_curvature, rule

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def hook(name: str) -> ModuleType:
    """A Python file of the docs folder, which is no package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------ building


@pytest.mark.slow
def test_it_builds_without_a_warning_and_names_everything_public(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    site = {page.name: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES} <= set(site)
    for name in ("CGLoRAOptimizer.step", "LoRAPair", "curvature_init_"):
        assert re.search(rf'id="cg_optim\.[\w.]*{re.escape(name)}"', site["api.html"])
    assert 'id="cg_optim.rule.whitened_adam"' in site["internals.html"]
    # A name that a docstring mentions leads to where the site has it.
    assert 'href="internals.html#cg_optim.rule"' in site["api.html"]
    assert 'href="api.html#cg_optim.pairs.LoRAPair"' in site["internals.html"]
    rest = re.findall(r":[a-z]+:`|\.\. math::", site["api.html"] + site["internals.html"])
    assert rest == []  # Sphinx's markup that nobody translated


def test_all_that_the_package_exports_is_in_the_api_reference() -> None:
    shown = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    shown_names = {path.rpartition(".")[2] for path in shown}
    assert set(cg_optim.__all__) - {"__version__"} <= shown_names


def test_a_public_name_without_docstring_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    package = tmp_path / "cg_optim"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "part.py").write_text(
        '"""A module."""\n\n\ndef told() -> None:\n    """Documented."""\n\n\n'
        "def untold() -> None:\n    pass\n\n\ndef _private() -> None:\n    pass\n"
    )
    (tmp_path / "docs").mkdir()
    for name in ("reference.py", "sphinx_roles.py"):
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text())
    (tmp_path / "docs" / "api.md").write_text("# API\n\n::: cg_optim\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    navigation = settings[settings.index("nav:") : settings.index("exclude_docs")]
    (tmp_path / "mkdocs.yml").write_text(settings.replace(navigation, ""))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Abort):
        build(load_config(str(tmp_path / "mkdocs.yml")))
    reference = hook("reference")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    missing = set(reference.public_names(reference.load()))
    missing -= reference.names_in(tmp_path / "build" / "site")
    assert missing == {"cg_optim.part.untold"}


def test_sphinx_markup_becomes_markdown() -> None:
    pytest.importorskip("griffe")
    translate = hook("sphinx_roles").as_markdown
    text = "See :func:`~cg_optim.a.b` and :class:`C`::\n\n    code\n"
    assert translate(text) == "See `b` and `C`:\n\n    code\n"
    linked = translate(text, {"C": "cg_optim.c.C"}.get)
    assert linked == "See `b` and [`C`][cg_optim.c.C]:\n\n    code\n"
    text = "Sum\n\n.. math::\n    x = 1\n\n    y = 2\n\nand on.\n"
    assert " ".join(translate(text).split()) == "Sum $$ x = 1 $$ $$ y = 2 $$ and on."


# ------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w./]+\.md)(?:#([\w.-]+))?\)", page.read_text()):
        if target == "internals.md":  # written by the build
            continue
        other = page.parent / target
        assert other.exists(), target
        if anchor and not anchor.startswith("cg_optim"):
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_the_method_page_describes_this_rule() -> None:
    """Whoever changes the rule or its constants changes docs/method.md as well."""
    text = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    damping = inspect.signature(CGLoRAOptimizer).parameters["damping"].default
    assert f"rule version {rule.RULE_VERSION} " in text
    assert f"decay {curvature_store.DECAY}," in text
    assert f"first {curvature_store.WARM_UP_STEPS} steps" in text
    assert f"every {curvature_store.INTERVAL}th" in text
    assert f"\\lambda = {damping}," in text
    momentum = inspect.signature(CGLoRAOptimizer).parameters["momentum"].default
    assert f"\\beta = {momentum}$ (`momentum`)" in text
    assert f"keep {input_curvature.DEFAULT_RANK} directions" in text
    dense = [n for n in range(1, 999) if input_curvature.directions(n, "auto") is None]
    assert f"size up to {max(dense)} keep the whole" in text


def test_equations_are_numbered_in_order() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert re.findall(r"\\tag\{(\d+)\}", text) == [str(i) for i in range(1, 15)]


# --------------------------------------------------------------------------- code in it


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(6, 2, bias=False)
        self.restore = nn.Linear(2, 6, bias=False)


def given() -> dict[str, Any]:
    """What the pages take for granted."""
    from benchmarks.examples.small import Windows, language_model_with_lora

    model, own_model, dataset = language_model_with_lora(), OwnModel(), Windows(16)
    loader = DataLoader(dataset, batch_size=4)
    return {
        "torch": torch,
        "model": model,
        "optimizer": CGLoRAOptimizer(model, lr=1e-3),
        "dataset": dataset,
        "loader": loader,
        "batch": next(iter(loader)),
        "own_model": own_model,
        "squeeze": own_model.squeeze,
        "restore": own_model.restore,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if not blocks:
        return
    for needed in ("peft", "transformers", "accelerate", "lightning"):
        pytest.importorskip(needed)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.chdir(tmp_path)
    names = given()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in blocks:
                exec(compile(block, f"{page.name}", "exec"), names)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
