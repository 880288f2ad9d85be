"""Runs the blocks of one page, in order, in one process: `doc_page_program.py PAGE FOLDER`.

- `python`: in one namespace for the whole page, or by a later command where the page shows one for its title. With
  `data-raises` it must end with that error.
- `diff`: two programs, first that of the lines with `-`, then that of those with `+`, which print the same.
- `text` behind a `python` block: what that has printed, or the message of its error.
- `json`: a config as `zeroxide config check` takes it; where it has a title, a file as well.
- `console`: commands behind `$ `, each followed by what it prints; `sh`: commands alone.

`...` in what is printed stands for anything. Commands that start several ranks are for `test_doc_blocks.py`: they are
written to FOLDER/ranks.json. The first thing that is not as the page says is one line on standard error, and ends this
process with 1.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

from doc_blocks import Block, blocks, commands, halves
from doc_given import GIVEN, make_files

NUMBER = re.compile(r"\d+(\.\d+)?")
ELSEWHERE = ("/mnt/", "/scratch")
"""Beginnings of absolute paths in the documents; what lies there is in the page's folder."""


class Unlike(Exception):
    """Something is not as the page says."""


class Page:
    """The state of one page: its folder, its namespace, and what the last block has said."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.blocks = blocks(path)
        self.folder = folder
        self.ranks: list[str] = []
        self.printed = ""
        self.names: dict[str, Any] = {"__name__": "__main__"}
        make_files(folder)
        prepare = GIVEN.get(self.blocks[0].page) if self.blocks else None
        self.names.update(prepare(folder) if prepare else {})

    def run(self) -> None:
        for block in self.blocks:
            if "title" in block.attributes:
                (self.folder / block.attributes["title"]).write_text(self.moved(block.text))
            if not block.is_run:
                continue
            print(f"doc: {block}", flush=True)
            try:
                self.run_block(block)
            except Unlike as error:
                raise SystemExit(f"{block}: {error}") from None
            except Exception:
                raise SystemExit(f"{block}: {traceback.format_exc()}") from None

    def run_block(self, block: Block) -> None:
        run = getattr(self, f"run_{block.language}", None) if block.language else None
        if run is None:
            raise Unlike(f"{block.language or 'no language'}: expected python, diff, text, json, console or sh")
        run(block, self.moved(block.text))

    def moved(self, text: str) -> str:
        """The text with its absolute paths in this page's folder."""
        for each in ELSEWHERE:
            text = text.replace(f":{each}", f":{self.folder}{each}").replace(f'"{each}', f'"{self.folder}{each}')
        return text

    def run_python(self, block: Block, text: str) -> None:
        title = block.attributes.get("title")
        shown = "".join(each.text for each in self.blocks if each.language in ("console", "sh"))
        if title and re.search(rf"^(\$ )?(python|zeroxide run)\b.* {re.escape(title)}\b", shown, re.MULTILINE):
            return
        # Lines in tracebacks are those of the page.
        code = compile("\n" * (block.line - 1) + text, block.page, "exec")
        raises, message = block.attributes.get("data-raises"), None
        with self.kept(errors=False):
            try:
                exec(code, self.names)
            except Exception as error:
                if type(error).__name__ != raises:
                    raise
                message = str(error)
        if raises and message is None:
            raise Unlike(f"expected {raises}, and nothing was raised")
        self.printed = self.printed if message is None else message

    def run_diff(self, block: Block, text: str) -> None:
        before, after = halves(text)
        printed = []
        for half in [after] if "data-before" in block.attributes else [before, after]:
            with self.kept(errors=False):
                exec(compile("\n" * (block.line - 1) + half, block.page, "exec"), {**self.names})
            printed.append(self.printed)
        if printed[0] != printed[-1]:
            raise Unlike(f"the first program printed {printed[0]}, the second {printed[1]}")

    def run_text(self, block: Block, text: str) -> None:
        if not like(text, self.printed, block):
            raise Unlike(f"expected\n{text}\ngot\n{self.printed}")

    def run_json(self, block: Block, text: str) -> None:
        path = self.folder / block.attributes.get("title", "block.json")
        path.write_text(text)
        self.command(f"zeroxide config check {path} --world-size {block.attributes.get('data-ranks', '1')}", status=0)

    def run_console(self, block: Block, text: str) -> None:
        for command, expected in commands(text, prompt=True):
            printed = self.command(command)
            if not like(expected, printed, block):
                raise Unlike(f"{command}: expected\n{expected}\ngot\n{printed}")

    def run_sh(self, block: Block, text: str) -> None:
        for command, _ in commands(text, prompt=False):
            self.command(command, status=0)

    def command(self, text: str, status: int | None = None) -> str:
        """What a command prints on both outputs. Without `status` the page shows what happens, an error too."""
        words = shlex.split(text, comments=True)
        with self.kept():
            if words[0] == "zeroxide" and words[1] != "run":
                from zeroxide.cli import main

                ended = main(words[1:])
            elif words[0] == "python":
                ended = script(words[1], words[2:])
            elif words[:1] == ["torchrun"] or words[:2] == ["zeroxide", "run"]:
                self.ranks.append(text)
                ended = 0
            elif words[0] == "cat":
                print((self.folder / words[1]).read_text(), end="")
                ended = 0
            else:
                raise Unlike(f"no way to run {words[0]}: give the block a data-check with the reason")
        if status is not None and ended != status:
            raise Unlike(f"{text} ended with {ended}: {self.printed}")
        return self.printed

    @contextlib.contextmanager
    def kept(self, *, errors: bool = True) -> Any:
        """Keeps what is printed inside, on standard error too where `errors`."""
        heard = io.StringIO()
        aside = contextlib.redirect_stderr(heard if errors else io.StringIO())
        with contextlib.redirect_stdout(heard), aside:
            try:
                yield
            finally:
                self.printed = heard.getvalue()


def script(path: str, arguments: list[str]) -> int:
    """`python PATH ARGUMENTS` in this process."""
    before, sys.argv = sys.argv, [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before
    return 0


def like(expected: str, got: str, block: Block) -> bool:
    """Whether `got` is what the page says, `...` being anything and runs of white space all the same."""
    if block.attributes.get("data-numbers") == "vary":
        expected, got = NUMBER.sub("#", expected), NUMBER.sub("#", got)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected.strip() + "\n", got.strip() + "\n", flags)


if __name__ == "__main__":
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    running = Page(page, folder)
    running.run()
    (folder / "ranks.json").write_text(json.dumps(running.ranks))
    # Engines that a page leaves open end here, before what they use does.
    running.names.clear()
