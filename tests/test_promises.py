"""The table in ``tests/README.md`` names tests that exist, and names all of a kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", (FOLDER / "README.md").read_text())


@pytest.mark.parametrize(("file", "test"), NAMED, ids=str)
def test_a_named_test_exists(file: str, test: str) -> None:
    assert re.search(rf"^def {test}\(", (FOLDER / file).read_text(), re.MULTILINE)


def test_every_file_about_the_stack_is_in_the_table() -> None:
    assert {path.name for path in FOLDER.glob("test_stack_*.py")} <= {file for file, _ in NAMED}
