"""`import deepspeed` without a DeepSpeed: what is found, when, and what is said of the rest.

Each case is a new interpreter: what is imported when is what these are about.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed_names import USED

import zeroxide

PACKAGE = Path(zeroxide.__file__).parents[1]


def python(source: str, *paths: Path, **env: str) -> str:
    """What a new interpreter prints. Its end is 0, and it does not import zeroxide from the folder of the test."""
    known = os.environ.get("PYTHONPATH")
    found = [*map(str, paths), str(PACKAGE), *([known] if known else [])]
    ended = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A folder in which something called deepspeed is installed."""
    package, metadata = tmp_path / "deepspeed", tmp_path / "deepspeed-0.19.8.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("theirs = True\n")
    (package / "extra.py").write_text("theirs = True\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n")
    return tmp_path


def test_every_name_that_libraries_use_is_there():
    """Catches: a name left out of the table, a place that does not exist, a module that is no attribute."""
    source = f"""
import importlib, json
import zeroxide.integrations.deepspeed, deepspeed
missing = []
for module, names in json.loads({json.dumps(json.dumps(USED))}).items():
    found, chain = importlib.import_module(module), deepspeed
    for part in module.split(".")[1:]:
        chain = getattr(chain, part)
    assert chain is found, module
    missing += [f"{{module}}.{{name}}" for name in names.split() if not hasattr(found, name)]
from zeroxide.integrations.deepspeed.surface import SURFACE
for module, names in SURFACE.items():
    missing += [f"{{module}}.{{name}}" for name in names if not hasattr(importlib.import_module(module), name)]
    assert set(dir(importlib.import_module(module))) >= set(names), module
print(missing)
"""
    assert python(source).strip() == "[]"


def test_libraries_that_look_for_deepspeed_find_it():
    """Catches: metadata that nobody can read, and an import that begins torch."""
    source = """
import sys, importlib.metadata, importlib.util
import zeroxide.integrations.deepspeed
import deepspeed
assert "torch" not in sys.modules
assert importlib.util.find_spec("deepspeed") is not None
assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
assert importlib.metadata.version("deepspeed") == deepspeed.__version__ == "0.19.8+zeroxide"
assert importlib.util.find_spec("deepspeed.no_such_module") is None
assert importlib.metadata.version("numpy")
zeroxide.integrations.deepspeed.activate()
assert sum(type(each).__name__ == "_Finder" for each in sys.meta_path) == 1
"""
    python(source)


def test_installing_zeroxide_changes_nothing(another: Path):
    """Catches: a finder that importing zeroxide puts in force."""
    source = "import zeroxide, zeroxide.optim, importlib.util as u; print(u.find_spec('deepspeed') is None)"
    assert python(source, ZEROXIDE_AS_DEEPSPEED="0").strip() == "True"
    source = "import zeroxide, deepspeed; print(deepspeed.theirs)"
    assert python(source, another, ZEROXIDE_AS_DEEPSPEED="").strip() == "True"


def test_beside_a_deepspeed_that_is_installed(another: Path):
    """Catches: the other's modules or version found under the name."""
    source = """
import importlib.metadata, importlib.util
import zeroxide.integrations.deepspeed
import deepspeed
assert not hasattr(deepspeed, "theirs")
assert importlib.metadata.version("deepspeed") == "0.19.8+zeroxide"
assert importlib.util.find_spec("deepspeed.extra") is None
"""
    python(source, another)


@pytest.mark.parametrize("first", ["deepspeed", "accelerate"])
def test_too_late_is_said(another: Path, first: str):
    """Catches: a name that is in force for some of a process. Nobody has looked for it in a process that can go on."""
    (another / "accelerate.py").write_text("")
    source = f"""
import sys, {first}
from zeroxide.errors import ModelError
try:
    import zeroxide.integrations.deepspeed
except ModelError as error:
    print(error)
assert not any(type(each).__name__ == "_Finder" for each in sys.meta_path)
"""
    said = python(source, another)
    assert said.startswith(f"{first} has been imported")
    assert "zeroxide run" in said
    assert said.count("\n") == 1


def test_what_is_not_built_says_so_when_it_is_used():
    """Catches: a placeholder that refuses to be imported, or to be asked about, and one that can be called."""
    source = """
import zeroxide.integrations.deepspeed, deepspeed
from deepspeed import DeepSpeedHybridEngine
from zeroxide.errors import ModelError
assert not isinstance(3, DeepSpeedHybridEngine)
for call in (lambda: DeepSpeedHybridEngine(None),):
    try:
        call()
    except ModelError as error:
        print(error)
try:
    deepspeed.utils.no_such_name
except AttributeError as error:
    print(error)
try:
    from deepspeed.utils import no_such_name
except ImportError:
    print("ImportError")
"""
    assert python(source).splitlines() == [
        "deepspeed.DeepSpeedHybridEngine: the hybrid engine is not built in zeroxide yet",
        "deepspeed.utils.no_such_name: zeroxide, which answers for DeepSpeed 0.19.8, has no such name",
        "ImportError",
    ]


def test_a_variable_reaches_every_python(another: Path):
    """The wheel's `zeroxide.pth`. Catches: a file that is not in the wheel."""
    source = "import deepspeed, subprocess, sys; print(deepspeed.__version__)"
    assert python(source, ZEROXIDE_AS_DEEPSPEED="1").strip() == "0.19.8+zeroxide"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {source!r}], check=True)"
    assert python(source, another, ZEROXIDE_AS_DEEPSPEED="1").strip() == "0.19.8+zeroxide"
