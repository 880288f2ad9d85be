"""Run by test_sanitizers.py in a process that begins with the sanitizers' libraries: every case of some sources on
tensors that end where their memory ends."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from emulated import Emulator, close

import zeroxide.kernels

folder, *words = sys.argv[1:]
sources = {word.split("=")[0]: Path(folder) / word.split("=")[1] for word in words}
torch.set_num_threads(1)
for case in zeroxide.kernels.ALL:
    made = []

    class Watched(Emulator):
        """Leaves kernels of other sources out, and notes them."""

        def launch(self, kernel, blocks, args, made=made):
            made.append(kernel.source)
            if kernel.source in self.libraries:
                super().launch(kernel, blocks, args)

    case.run(Watched(sources), case.make(1, torch.device("cpu")))
    if made[-1] not in sources:
        continue
    for n in (1, 301):
        inputs = case.make(n, torch.device("cpu"))
        expected = case.reference(inputs)
        got = case.run(Watched(sources, n % 3), inputs)
        if not all(close(*each, case.tolerance) for each in zip(got, expected, strict=True)):
            sys.exit(f"{case.name}: {n} elements differ")
    print(case.name)
print("done")
