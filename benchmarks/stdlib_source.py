"""The standard library's source files, read with ``ast`` and never imported."""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import DataFileError

LEFT_OUT = frozenset(
    {
        # Not the standard library itself, or not in every Python from 3.11 to 3.13.
        *("site-packages", "dist-packages", "test", "tests"),
        *("idlelib", "turtledemo", "lib2to3", "distutils"),
        # Tables, generated files and shims instead of text.
        *("encodings", "pydoc_data", "__phello__", "lib-dynload", "ensurepip"),
    }
)
"""Folders that are not read."""

GENERATED = ("_sysconfigdata", "config-")
"""Beginnings of files and folders that the build of this very Python made."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or method with a docstring.

    Attributes:
        name: Full name, ``json.dumps`` or ``tarfile.TarFile.add``.
        parameters: What stands between the parentheses, without ``self``.
        docstring: The cleaned docstring.
    """

    name: str
    parameters: str
    docstring: str


@dataclass(frozen=True)
class SourceFile:
    """What one file of the standard library says.

    Attributes:
        module: Top-level module, ``json`` for ``json/encoder.py``.
        docstrings: All docstrings, in the order of the file.
        functions: The documented functions among them.
        code: The source without docstrings and without lines that are only a comment.
    """

    module: str
    docstrings: tuple[str, ...]
    functions: tuple[Function, ...]
    code: str


def root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


@functools.cache
def files() -> tuple[str, ...]:
    """Paths of the source files relative to :func:`root`, sorted, with ``/`` everywhere.

    Raises:
        DataFileError: If this Python carries no source files.
    """
    found = tuple(
        sorted(
            path.as_posix()
            for path in (full.relative_to(root()) for full in root().rglob("*.py"))
            if not LEFT_OUT.intersection(path.parts) and not path.parts[0].startswith(GENERATED)
        )
    )
    if not found:
        raise DataFileError(root(), "holds no source files of the standard library")
    return found


def module_of(path: str) -> str:
    """Top-level module of a path from :func:`files`."""
    return path.split("/", 1)[0].removesuffix(".py")


@functools.cache
def read(path: str) -> SourceFile:
    """Read one of :func:`files`."""
    # Two files of the library are in Latin-1, declared in their first lines: ast wants bytes.
    content = (root() / path).read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # templates, and files meant to be broken
        return SourceFile(module_of(path), (), (), "")
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    docstrings: list[str] = []
    functions: list[Function] = []
    doc_lines: set[int] = set()
    for name, node in _documented(tree, dotted):
        text = ast.get_docstring(node)
        if not text:
            continue
        docstrings.append(text)
        statement = node.body[0]
        doc_lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append(Function(name, _parameters(node), text))
    code = "\n".join(
        line.rstrip()
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1)
        if number not in doc_lines and not line.lstrip().startswith("#")
    )
    return SourceFile(module_of(path), tuple(docstrings), tuple(functions), code)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, Documented]]:
    """All nodes that may have a docstring, in the order of the file, with their full names."""
    if isinstance(node, Documented):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # definitions under if, try, with
            yield from _documented(child, name)


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.unparse(node.args)
    first, _, rest = text.partition(",")
    return rest.lstrip() if first in {"self", "cls"} else text


def topics() -> dict[str, str]:
    """The texts of ``pydoc_data.topics``; empty where a distribution leaves them out."""
    path = root() / "pydoc_data" / "topics.py"
    if not path.exists():
        return {}
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign):
            value: dict[str, str] = ast.literal_eval(statement.value)
            return value
    return {}
