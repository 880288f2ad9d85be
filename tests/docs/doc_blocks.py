"""Code blocks of the documents: what stands in a fence, in which language, and what its attributes say of it.

Attributes stand behind the language in braces, where the site's Markdown and that of others take them, as
```python {title="train.py" data-check="needs a GPU"}```:

| attribute | means |
|---|---|
| `title="train.py"` | the block is a file of that name, which a later block runs |
| `data-raises="ConfigError"` | the block ends with that error; the `text` block behind it is its message |
| `data-check="needs a GPU"` | the block is not run but checked for syntax, for the reason given |
| `data-before="DeepSpeed itself"` | of a `diff` block: its first half is not run, for the reason given |
| `data-ranks="8"` | of a `json` block: a config for so many ranks |
| `data-numbers="vary"` | what is printed has other numbers each time, or on each machine |
| `data-source="python/zeroxide/errors.py"` | of a `text` block: its words stand in that file |

Every other block is run: see `doc_page_program.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks", "commands", "halves", "pages", "prose"]

ROOT = Path(__file__).parents[2]

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is that of its first line of code, from 1."""

    page: str
    line: int
    language: str
    attributes: dict[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return "data-check" not in self.attributes and "data-source" not in self.attributes


def pages() -> list[Path]:
    """Every document whose blocks are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    return [_block(name, text, found) for found in FENCE.finditer(text)]


def _block(page: str, text: str, found: re.Match[str]) -> Block:
    language, _, rest = found["info"].strip().partition(" ")
    indent = len(found["indent"])
    lines = [line[indent:] for line in found["text"].splitlines(keepends=True)]
    first = text.count("\n", 0, found.start("text")) + 1
    return Block(page, first, language, dict(ATTRIBUTE.findall(rest)), "".join(lines))


def prose(page: Path) -> str:
    """The page without its blocks, each of whose lines is left empty."""
    return FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())


def halves(text: str) -> tuple[str, str]:
    """What a diff leads from and to."""
    lines = text.splitlines(keepends=True)
    before = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
    after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
    return before, after


def commands(text: str, *, prompt: bool) -> list[tuple[str, str]]:
    """(command, what it prints) of a block of commands.

    With `prompt` a command is a line that begins with `$ `, and what follows is what it prints; without, every line is
    a command that prints what it likes. A backslash at the end of a line joins the next.
    """
    found: list[tuple[str, str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if not prompt:
            found += [(line, "")] if line.strip() and not line.startswith("#") else []
        elif line.startswith("$ "):
            found.append((line[2:], ""))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
        else:
            raise ValueError(f"output before the first command: {line!r}")
    return found
