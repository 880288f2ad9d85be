"""README's pictures are those that the benchmark's lines make, and show what the lines say."""

from __future__ import annotations

import importlib
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawing(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    yield importlib.import_module("pictures")
    sys.modules.pop("pictures", None)


def results(drawing):
    return drawing.read((ROOT / "benches/results/hf_trainer.jsonl").read_text().splitlines())


def test_the_pictures_are_those_of_the_results(drawing):
    """Catches: a picture that was drawn from other results, or by hand."""
    lines = (ROOT / "benches/results/format_loss.jsonl").read_text().splitlines()
    made = drawing.pictures(results(drawing)) | drawing.formats(lines)
    assert {path.name: path.read_text() for path in (ROOT / "docs/pictures").iterdir()} == made


def test_bars_are_as_long_as_what_they_stand_for(drawing):
    """From 0, to a common scale. Catches: an axis that does not begin at 0, bars of another contestant."""
    found = results(drawing)
    for name, bars in (("memory.svg", drawing.memory(found)), ("speed.svg", drawing.speed(found))):
        root = ElementTree.fromstring((ROOT / "docs/pictures" / name).read_text())
        widths = [float(each.get("width")) for each in root.iter(f"{SVG}rect")]
        assert len(widths) == len(bars) == 6
        longest = max(bar.value for bar in bars)
        # Widths are written with one decimal.
        assert all(
            abs(width / max(widths) - bar.value / longest) < 1e-3 for width, bar in zip(widths, bars, strict=True)
        )
        texts = [each.text for each in root.iter(f"{SVG}text")]
        assert all(bar.shown in texts for bar in bars)
        ours = [each.get("class") == "ours" for each in root.iter(f"{SVG}rect")]
        assert ours == [bar.ours for bar in bars] == [False, False, True] * 2


def test_readme_says_what_the_pictures_show(drawing):
    """In words, for those who do not see them: of DeepSpeed's with its defaults, to a tenth."""
    found = results(drawing)

    def share(home, value):
        return value(found[f"zeroxide {home} defaults"]) / value(found[f"deepspeed {home} defaults"])

    readme = (ROOT / "README.md").read_text()
    memory = [share(home, lambda each: each["peak_bytes"]) for home in ("nvme", "cpu")]
    said = re.search(r"zeroxide's is ([\d.]+) of DeepSpeed's with state on disk, ([\d.]+) with", readme)
    assert [float(each) for each in said.groups()] == [pytest.approx(each, abs=0.05) for each in memory]
    said = re.search(r"zeroxide's is ([\d.]+) and ([\d.]+) of DeepSpeed's", readme)
    speed = [share(home, lambda each: each["step"]["median"]) for home in ("nvme", "cpu")]
    assert [float(each) for each in said.groups()] == [pytest.approx(each, abs=0.05) for each in speed]
