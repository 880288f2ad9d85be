"""The pages in `docs`: tables that the code gives, links that lead somewhere, and a site that fetches nothing."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from doc_blocks import FENCE, ROOT, blocks, pages, prose

DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
WIDEST = 88
"""Characters of a line of code that fit beside both menus."""


@functools.cache
def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_pages_are_those_that_the_code_gives():
    """`python docs/generate.py` makes them so."""
    made = generator()
    texts = {page: page.read_text() for page in pages()}
    assert [str(page) for page, text in texts.items() if made.rewritten(text) != text] == []
    placed = [found["name"] for text in texts.values() for found in made.PLACE.finditer(text)]
    assert sorted(placed) == sorted(made.TABLES)


def test_a_table_that_is_not_the_code_s_is_found():
    made = generator()
    page = DOCS / "from-deepspeed.md"
    text = page.read_text()
    wrong = text.replace("| `overlap_comm` | no effect |", "| `overlap_comm` | works |")
    assert wrong != text
    assert made.rewritten(wrong) == text


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors(page: Path) -> set[str]:
    """Anchors of its headings; those of the API pages that docstrings have are mkdocs' to check."""
    return {slug(each) for each in HEADING.findall(prose(page))}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings_that_are_there(page: Path):
    lost = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.is_file() or (anchor and anchor not in anchors(other)):
            lost.append(target)
    assert lost == []


def test_anchors_are_those_of_the_site():
    assert slug("Where the memory went") == "where-the-memory-went"
    assert slug("The section `zeroxide`") == "the-section-zeroxide"
    assert slug("[x](y.md) a, *b*") == "x-a-b"


def test_pages_name_one_another_by_links():
    """A path in the text is one that nobody can follow on the site."""
    named = {page.name: re.findall(r"docs/[\w/-]+\.md", prose(page)) for page in DOCS.rglob("*.md")}
    assert {name: found for name, found in named.items() if found} == {}


def test_every_page_is_in_the_menu():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def listed(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [path for each in (entry.values() if isinstance(entry, dict) else entry) for path in listed(each)]

    assert sorted(listed(config["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert config["theme"]["font"] is False


def test_lines_of_code_fit_on_the_page():
    wide = [
        f"{block.page}:{block.line + number}"
        for page in DOCS.rglob("*.md")
        for block in blocks(page)
        for number, line in enumerate(block.text.splitlines())
        if block.language not in ("text", "console") and len(line) > WIDEST
    ]
    assert wide == []


def test_every_fence_is_found():
    """A fence that the pattern misses would be a block that nobody checks."""
    for page in pages():
        lines = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
        assert len(lines) == 2 * len(FENCE.findall(page.read_text())), page


PACKAGE = ROOT / "python" / "zeroxide"
NO_PLACE = {
    "SCHEDULES": "the schedules by name",
    "Schedule": "what the schedules are made of",
    "__version__": "a text",
    "errors": "a module",
    "optim": "a module",
    "zero": "a module",
}
FILES = [
    "__init__.py",
    "errors.py",
    "integrations/lightning/__init__.py",
    "optim/__init__.py",
    "optim/schedules.py",
    "zero/__init__.py",
]


def public(file: str) -> list[str]:
    """`__all__` of a module, read and not imported."""
    for node in ast.parse((PACKAGE / file).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{file} has no __all__")


@pytest.mark.parametrize("file", FILES)
def test_every_public_name_has_its_place_in_the_reference(file: str):
    """That what stands there exists is for mkdocs to say."""
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    paths = re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE)
    shown = {path.rpartition(".")[2] for path in paths} | set(HEADING.findall(reference))
    assert [name for name in public(file) if name not in shown and name not in NO_PLACE] == []


def test_a_section_of_the_readme_is_shown_with_its_links():
    spec = importlib.util.spec_from_file_location("readme_section", DOCS / "readme_section.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    named = {name for page in DOCS.rglob("*.md") for name in module.PLACE.findall(page.read_text())}
    assert named == {"Limits"}
    shown = module.section("Limits")
    assert shown.startswith("- ")
    assert shown.count("\n- ") > 15
    links = [target for target in LINK.findall(shown) if not target.startswith("http")]
    assert links
    assert [each for each in links if not (DOCS / each).is_file()] == []
    with pytest.raises(LookupError):
        module.section("No such")


def test_the_site_is_built_and_fetches_nothing(tmp_path: Path):
    """As `make docs` does, whose tools must be there."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    fetched = []
    for path in tmp_path.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text())
        fetched += [f"{path.name}: {tag}" for tag in tags if re.search(r'(?:src|href)="?(?:https?:)?//', tag)]
        # A fence that the site's Markdown does not know, and what is left of a table, are text.
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        fetched += [f"{path.name}: {each}" for each in re.findall(r"```.*|\{data-.*|<p>\|.*", text)]
    for path in tmp_path.rglob("*.css"):
        fetched += re.findall(r"url\(['\"]?https?:[^)]*\)", path.read_text())
    assert fetched == []
    assert (tmp_path / "search" / "search_index.json").is_file()
