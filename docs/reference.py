"""A mkdocs hook: the page of internals, and the check that no public name is missing.

``mkdocs build`` fails if a class, function or method of the package that does not begin with
an underscore has no docstring, or is on no page.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cg_optim"

_INTRODUCTION = """# Internals

What the optimizer is made of, module by module. Nothing here is needed to use it, and it may
change in any version; [the API reference](api.md) is what stays.

"""


def on_files(files: Files, config: Any) -> Files:
    """Add ``internals.md``: every module that ``api.md`` does not show."""
    shown = set(re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    others = [module.path for module in modules(load()) if module.path not in shown]
    # What api.md shows name by name must not come twice: a name has one place.
    blocks = [
        f"::: {path}\n" + _without([name for name in shown if name.rpartition(".")[0] == path])
        for path in others
        if path != PACKAGE
    ]
    page = File.generated(config, "internals.md", content=_INTRODUCTION + "\n".join(blocks))
    files.append(page)
    return files


def _without(names: list[str]) -> str:
    if not names:
        return ""
    excluded = ", ".join(f'"!^{name.rpartition(".")[2]}$"' for name in sorted(names))
    return f'    options:\n      filters: ["!^_", {excluded}]\n'


def on_post_build(config: Any) -> None:
    """Check the finished site.

    Raises:
        PluginError: With the names that are missing.
    """
    missing = sorted(set(public_names(load())) - names_in(Path(config["site_dir"])))
    if missing:
        raise PluginError(
            "undocumented public names; write a docstring, or an underscore before the name:\n  "
            + "\n  ".join(missing)
        )


def load() -> griffe.Module:
    """The package as its source says it is."""
    found = griffe.load(PACKAGE, search_paths=[str(ROOT)], allow_inspection=False)
    assert isinstance(found, griffe.Module)
    return found


def modules(package: griffe.Module) -> Iterator[griffe.Module]:
    """The package and its modules, by name, without private ones."""
    yield package
    for name, module in sorted(package.modules.items()):
        if not name.startswith("_"):
            yield from modules(module)


def public_names(package: griffe.Module) -> Iterator[str]:
    """Classes, functions and methods, as ``module.Class.method``."""
    for module in modules(package):
        yield module.path
        yield from _public_in(module)


def _public_in(holder: griffe.Module | griffe.Class) -> Iterator[str]:
    for name, member in holder.members.items():
        if name.startswith("_") or member.is_alias or not (member.is_class or member.is_function):
            continue
        yield member.path
        if isinstance(member, griffe.Class):
            yield from _public_in(member)


def names_in(site: Path) -> set[str]:
    """The names a finished site documents, from its inventory (Sphinx's format)."""
    content = (site / "objects.inv").read_bytes()
    # Four lines of text, the rest is compressed.
    body = content.split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(body).decode().splitlines()}
