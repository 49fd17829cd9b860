"""Brings the docstrings' Sphinx markup into Markdown, for the API reference.

The docstrings use Sphinx's roles, ``.. math::`` and ``::``, as torch's do, because they are
what people read in an editor; mkdocstrings reads Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`(~?)([\w.]+)`")
_MATH = re.compile(r"^( *)\.\. math::\n((?:\n|\1 +.*\n?)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"((?:^ *>>> .*\n?)+)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring with Markdown in place of Sphinx's markup."""
    text = _MATH.sub(_display, text)
    text = _ROLE.sub(_code, text)
    text = _EXAMPLE.sub(r"\n\1\n", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _display(match: re.Match[str]) -> str:
    lines = [line.strip() for line in match[2].splitlines()]
    blocks = "\n".join(lines).strip().split("\n\n")
    return "\n" + "\n\n".join(f"$$\n{block}\n$$" for block in blocks) + "\n\n"


def _code(match: re.Match[str]) -> str:
    name = match[2].removeprefix("cg_optim.") if match[1] == "" else match[2].rpartition(".")[2]
    return f"`{name}`"


class SphinxRoles(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for modules, classes, functions and attributes."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
