"""Makes the machine code that a wheel carries: `python cuda/cubins.py FOLDER`, with a built zeroxide on the path.

Writes a file for each source of kernels and each architecture that the compiler knows into FOLDER, and removes others.
What is there already and was made of the same by the same compiler stays. Where there is no NVRTC one line says so, the
folder is left without files, and kernels are compiled where they are used.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels import KERNELS
from zeroxide.kernels.compile import compiler, kernel_text
from zeroxide.kernels.shipped import ARCHITECTURES, file_name


def made(source: str, architecture: int, present: Path, scratch: Path) -> bytes:
    """The file of a source's code for an architecture, out of `present` where that is the same."""
    text, headers = kernel_text(source), _core.kernel_headers()
    try:
        found = _core.read_cubin(present, f"{source}.cu", text, headers, architecture=architecture)
    except DeviceError:
        found = None
    if found is None or found.compiler != compiler().version:
        found = compiler().compile(f"{source}.cu", text, headers, architecture=architecture, cache=scratch)
    return found.file()


def fill(folder: Path) -> None:
    """Leaves the files of all kernels in `folder`, and no others. Raises DeviceError where they cannot be made."""
    known = [each for each in ARCHITECTURES if each in compiler().architectures]
    every = [*product(sorted({kernel.source for kernel in KERNELS}), known)]
    names = [file_name(*each) for each in every]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        files = list(pool.map(lambda each, name: made(*each, folder / name, Path(scratch)), every, names))
    for name, file in zip(names, files, strict=True):
        if not (folder / name).is_file() or (folder / name).read_bytes() != file:
            (folder / name).write_bytes(file)
    for stale in set(folder.iterdir()) - {folder / name for name in names}:
        stale.unlink()
    version = ".".join(map(str, compiler().version))
    print(
        f"kernels for {', '.join(f'sm_{each}' for each in known)} by NVRTC {version}: {len(files)} files, "
        f"{sum(map(len, files))} bytes"
    )


def main(folder: Path) -> None:
    """Fills `folder`, or says why there is nothing to fill it with."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        compiler()
    except DeviceError as error:
        for stale in folder.iterdir():
            stale.unlink()
        print(f"the wheel has no machine code of kernels: {error}")
        return
    fill(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
