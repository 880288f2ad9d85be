"""Every code block of README and of the pages in `docs` does what the page says, or says why it is not run."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, blocks, commands, pages
from forking import ForkServer, without_leaks

import zeroxide

HERE = Path(__file__).parent
PACKAGE = Path(zeroxide.__file__).parents[1]
IMPORTS = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto", "tokenizers", "typer")
LANGUAGES = {"python", "diff", "json", "sh", "console", "text"}

ALL = {str(page.relative_to(ROOT)): blocks(page) for page in pages()}
RUN = {page: found for page, found in ALL.items() if any(each.is_run for each in found)}
CHECKED = [each for found in ALL.values() for each in found if "data-check" in each.attributes]
QUOTED = [each for found in ALL.values() for each in found if "data-source" in each.attributes]


@functools.cache
def server(*modules: str) -> ForkServer:
    """The process that others are forked from which want torch and `modules`."""
    return ForkServer(modules)


def fork(script: Path, arguments: list[str], folder: Path, name: str, imports: tuple[str, ...] = IMPORTS, **env: str):
    """A process of `script`, and a function that waits for its end and tells (status, output)."""
    modules = [str(each) for each in (PACKAGE, HERE.parent, HERE)]
    # What pages print of units and threads does not depend on the machine's processors.
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    process = server(*imports).fork(script, arguments, whole, out, err)

    def ended() -> tuple[int, str]:
        try:
            status = process.wait(120)
        finally:
            process.kill()
        return status, out.read_text()[-4000:] + without_leaks(err.read_text())[-8000:]

    return ended


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_do_what_it_says(page: str, tmp_path: Path):
    status, said = fork(HERE / "doc_page_program.py", [str(ROOT / page), str(tmp_path)], tmp_path, "page")()
    assert status == 0, said
    for number, line in enumerate(json.loads((tmp_path / "ranks.json").read_text())):
        start_ranks(line, tmp_path, number)


def start_ranks(line: str, folder: Path, number: int) -> None:
    """Plays torchrun, and `zeroxide run`, with processes that are forked and have its variables."""
    words = shlex.split(line, comments=True)
    as_deepspeed = words[:2] == ["zeroxide", "run"]
    words = words[2:] if as_deepspeed else words
    world = 1
    if words[0] == "torchrun":
        del words[0]
    while words[0].startswith("--"):
        option, _, value = words.pop(0).partition("=")
        assert option.replace("_", "-") in ("--nproc-per-node", "--ranks"), line
        world = int(value or words.pop(0))
    env = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    # The name must be there before accelerate is, which comes with transformers.
    imports = () if as_deepspeed else IMPORTS
    program = folder / f"ranks{number}.py"
    # What `zeroxide.pth` does when Python starts.
    first = "import zeroxide.integrations.deepspeed\n" if as_deepspeed else ""
    program.write_text(
        f"import os, runpy\nos.chdir({str(folder)!r})\n{first}runpy.run_path({words[0]!r}, run_name='__main__')\n"
    )
    started = [
        fork(program, words[1:], folder, f"ranks{number}-{rank}", imports, **env, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(world)
    ]
    for ended in started:
        status, said = ended()
        assert status == 0, f"{line}: {said}"


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_headings_of_troubleshooting_are_words_of_their_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    parts = re.split(r"^### `(.+)`$", page, flags=re.MULTILINE)
    messages = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        messages[heading] = re.search(r"^```text[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    assert len(messages) > 25
    assert [heading for heading, message in messages.items() if heading not in message] == []


def test_every_block_names_a_language_that_is_checked():
    assert [str(each) for found in ALL.values() for each in found if each.language not in LANGUAGES] == []
    assert sum(map(len, RUN.values())) > 10


@pytest.mark.parametrize("block", CHECKED, ids=str)
def test_a_block_that_is_not_run_says_why_and_has_no_mistakes_of_syntax(block: Block):
    assert len(block.attributes["data-check"].split()) >= 2
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language in ("sh", "console"):
        lines = [command for command, _ in commands(block.text, prompt=block.language == "console")]
        subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)


@pytest.mark.parametrize("block", QUOTED, ids=str)
def test_a_message_that_no_block_raises_stands_in_the_source(block: Block):
    source = "".join((ROOT / each).read_text() for each in block.attributes["data-source"].split())
    # An f-string that goes over several lines is one message.
    joined = "".join(source.replace('"\n', "").split())
    for words in block.text.split("..."):
        assert "".join(words.split()) in joined, words
