"""Every row of docs/deepspeed.md has one test, here or in the other test_deepspeed files, and every test one row."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("test_deepspeed_numbers", "test_deepspeed_scripts", "test_deepspeed_config")
ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def rows() -> list[str]:
    """The first column of every table of the page."""
    return [name for name, _ in ROW.findall((ROOT / "docs" / "deepspeed.md").read_text())]


def written() -> list[str]:
    found = []
    for name in FILES:
        module = importlib.import_module(name)
        found += [each.removeprefix("test_") for each in vars(module) if each.startswith("test_")]
    return found


def test_every_row_has_a_test_and_every_test_a_row():
    assert len(rows()) >= 39, "the table is found"
    assert sorted(rows()) == sorted(set(rows()))
    assert sorted(written()) == sorted(rows())


def test_every_row_says_what_is_there_what_is_here_and_why():
    for name, cells in ROW.findall((ROOT / "docs" / "deepspeed.md").read_text()):
        texts = [cell.strip() for cell in cells.split(" | ")]
        assert len(texts) == 4, name
        assert all(texts), name


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_those_that_are_there(name):
    assert (Path(__file__).parent / f"{name}.py").is_file()
    assert len(list(Path(__file__).parent.glob("test_deepspeed_*.py"))) == len(FILES)
