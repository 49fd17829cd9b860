"""Brings the docstrings' Sphinx markup into Markdown, for the API reference.

The docstrings use Sphinx's roles, ``.. math::`` and ``::``, as torch's do, because they are
what people read in an editor; mkdocstrings reads Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`(~?)([\w.]+)`")
_MATH = re.compile(r"^( *)\.\. math::\n((?:\n|\1 +.*\n?)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"((?:^ *>>> .*\n?)+)", re.MULTILINE)


def as_markdown(text: str, target_of: Callable[[str], str | None] = lambda name: None) -> str:
    """A docstring with Markdown in place of Sphinx's markup.

    Args:
        text: The docstring.
        target_of: The full name under which the site has what a role names, or None; it
            becomes a link.
    """
    text = _MATH.sub(_display, text)
    text = _ROLE.sub(lambda match: _code(match, target_of), text)
    text = _EXAMPLE.sub(r"\n\1\n", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _display(match: re.Match[str]) -> str:
    lines = [line.strip() for line in match[2].splitlines()]
    blocks = "\n".join(lines).strip().split("\n\n")
    return "\n" + "\n\n".join(f"$$\n{block}\n$$" for block in blocks) + "\n\n"


def _code(match: re.Match[str], target_of: Callable[[str], str | None]) -> str:
    name = match[2].removeprefix("cg_optim.") if match[1] == "" else match[2].rpartition(".")[2]
    target = target_of(match[2])
    return f"[`{name}`][{target}]" if target else f"`{name}`"


class SphinxRoles(griffe.Extension):
    """Rewrites every docstring of a package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when the package is loaded as a whole, so that names can be looked up."""
        for described in _everything_in(pkg):
            if described.docstring:
                text = described.docstring.value
                described.docstring.value = as_markdown(text, partial(_target, pkg, described))


def _everything_in(holder: griffe.Object) -> Iterator[griffe.Object]:
    yield holder
    for member in holder.members.values():
        if not member.is_alias:
            yield from _everything_in(member)


def _target(package: griffe.Module, described: griffe.Object, name: str) -> str | None:
    """Where the site has a module, class or function; None if it is on no page."""
    try:
        path = name if name.startswith(package.path + ".") else described.resolve(name)
        found = package[path.removeprefix(package.path + ".")]
        found = found.final_target if found.is_alias else found
    except (KeyError, griffe.GriffeError):
        return None
    shown = found.is_module or found.is_class or found.is_function
    private = any(part.startswith("_") for part in found.path.split("."))
    return found.path if shown and found.has_docstring and not private else None
