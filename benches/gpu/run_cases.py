"""Runs every kernel once on small inputs, under a tool that watches what kernels do."""

from __future__ import annotations

import torch

import zeroxide.kernels
from zeroxide.kernels.launch import CudaLauncher

SIZES = (33, 4099)


def main() -> None:
    launcher = CudaLauncher()
    for case in zeroxide.kernels.ALL:
        for n in SIZES:
            case.run(launcher, case.make(n, launcher.device))
    torch.cuda.synchronize()
    print(f"{len(zeroxide.kernels.ALL)} kernels at {SIZES} elements")


main()
