"""A CUDA driver for tests, built from crates/zeroxide-device/tests/fake_driver.c, with a log of what it did."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "crates" / "zeroxide-device" / "tests" / "fake_driver.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")
WHY_NOT = "no C compiler: the driver for tests cannot be built"


class FakeDriver:
    """One such driver, of which nothing is shared with another."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = str(folder / f"libcuda-{len(list(folder.iterdir()))}.so")
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", self.path, str(SOURCE), *options, "-lpthread"]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_log.restype = ctypes.c_char_p
        for name in ("fake_register_limit", "fake_argument_bytes"):
            getattr(self.library, name).argtypes = [ctypes.c_size_t]

    def log(self) -> list[str]:
        """What was done since the last look."""
        lines = self.library.fake_log().decode().splitlines()
        self.library.fake_clear()
        return lines

    def fail(self, call: str, code: int) -> None:
        """From now on `call` says `code`."""
        self.library.fake_fail(call.encode(), code)
