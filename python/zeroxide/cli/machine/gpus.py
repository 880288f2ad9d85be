"""The GPUs, and what makes kernels for them."""

from __future__ import annotations

from collections.abc import Iterator

from zeroxide.cli.machine.finding import Finding, broken, fine, lost
from zeroxide.config.sizes import format_bytes
from zeroxide.distributed.collectives import first_line
from zeroxide.errors import DeviceError

__all__ = ["look"]


def look() -> Iterator[Finding]:
    """What there is of a driver, devices, machine code and a compiler."""
    import torch

    from zeroxide import _core

    probe = _core.probe_cuda()
    built_for = torch.version.cuda
    if probe.version is None:
        reason = (probe.problem or "").split(" (")[0].split(";")[0]
        yield fine("GPU", f"none: the model computes in host memory ({reason})", devices=0)
        return
    driver = ".".join(map(str, probe.version))
    yield fine("GPU driver", f"for CUDA {driver}; {probe.devices} devices", driver=driver, devices=probe.devices)
    if built_for is None:
        how = "install torch from the index of a CUDA version (https://pytorch.org/get-started)"
        yield lost("torch and the GPU", "this torch is built for the CPU", how)
        return
    if int(built_for.split(".")[0]) > probe.version[0]:
        how = f"install a driver for CUDA {built_for}, or a torch for CUDA {driver}"
        yield lost("torch and the GPU", f"torch is built for CUDA {built_for}, the driver is for {driver}", how)
        return
    for number in range(probe.devices):
        yield from _device(number, probe.version)


def _device(number: int, driver: tuple[int, int]) -> Iterator[Finding]:
    from zeroxide import _core

    what = f"GPU {number}"
    try:
        context = _core.CudaContext(number)
        free, total = context.memory()
    except DeviceError as error:
        yield broken(what, first_line(error), "look at nvidia-smi; another process may have the device to itself")
        return
    shown = f"{context.name}, sm_{context.architecture}, {format_bytes(total)}, {format_bytes(free)} of it free"
    yield fine(what, shown, name=context.name, architecture=context.architecture, total=total, free=free)
    yield _kernels(what, context.architecture, driver)


def _kernels(what: str, architecture: int, driver: tuple[int, int]) -> Finding:
    """Whether the engine's kernels are there for a device, as they come with the wheel or from NVRTC."""
    from zeroxide.kernels.compile import compiler
    from zeroxide.kernels.shipped import ARCHITECTURES, shipped

    found = shipped("norm", architecture)
    if found is not None and found.compiler[0] <= driver[0]:
        return fine(f"{what}: kernels", f"machine code comes with zeroxide ({len(ARCHITECTURES)} architectures)")
    try:
        nvrtc = compiler()
    except DeviceError as error:
        how = "pip install nvidia-cuda-nvrtc for torch's CUDA version, or a wheel that was built with it"
        return lost(f"{what}: kernels", f"none: optimizer state stays in host memory ({first_line(error)})", how)
    version = ".".join(map(str, nvrtc.version))
    return fine(f"{what}: kernels", f"NVRTC {version} makes them when they are used first")
