"""The source distribution has everything that a wheel is built from."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATURIN = Path(sys.executable).with_name("maturin")


@pytest.mark.skipif(not MATURIN.exists(), reason="maturin is not installed beside this Python")
@pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed")
def test_kernels_are_in_the_source_distribution(tmp_path):
    """Catches: a wheel built from it that has no kernels, which lie outside of the crates."""
    subprocess.run([MATURIN, "sdist", "--out", tmp_path], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        found = {name.partition("/")[2] for name in packed.getnames()}
    folder = ROOT / "cuda"
    expected = [*folder.rglob("*.cu"), *folder.rglob("*.cuh")]
    assert expected
    assert {str(path.relative_to(ROOT)) for path in expected} - found == set()
    assert "crates/zeroxide-device/build.rs" in found
