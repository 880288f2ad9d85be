"""Real texts that every machine with Python has: the standard library's sources and what is documented in them.

The examples take them so that they run without a network. In a script of your own, `datasets.load_dataset` stands here.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("asyncio", "email", "tkinter", "unittest")


@dataclass(frozen=True)
class Documented:
    """A function or a class of the standard library that has a docstring."""

    package: str
    name: str
    heading: str
    """Its `def` or `class`, on one line."""
    body: str
    """Its code without the docstring."""
    docstring: str


def files(folder: Path, ending: str = ".py") -> list[str]:
    """The texts of all files below a folder, in an order that is the same everywhere."""
    found = sorted(
        each for each in folder.rglob(f"*{ending}") if not {"site-packages", "test", "tests"} & {*each.parts}
    )
    return [each.read_text(errors="replace") for each in found]


def documented(package: str) -> Iterator[Documented]:
    """What is documented in a package of the standard library; "" is all of it."""
    for source in files(LIBRARY / package):
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue  # files that are there to be wrong
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
                # The docstring is the first statement of the body; what is left of a body may be nothing.
                code = [ast.unparse(each) for each in node.body[1:]]
                heading = ast.unparse(node).partition(":\n")[0].splitlines()[-1]
                yield Documented(package, node.name, heading, "\n".join(code), ast.get_docstring(node))


def first_sentence(text: str) -> str:
    """Its first paragraph up to the first full stop, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."
