"""Engines on the simulated device, and what of their memory the core touches behind the device's back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simulated.kernels import PlayedKernels
from zeroxide.device import transfers
from zeroxide.device.placement import address
from zeroxide.kernels.launchers import LAUNCHERS, launcher_of
from zeroxide.plan import discover
from zeroxide.zero.gather.weight_gather import _LocalWeights
from zeroxide.zero.param import ParameterContext
from zeroxide.zero.unit import Unit
from zeroxide.zero.unit_memory import DeviceMemory


class Registry:
    """Host memory that the simulated device may copy from in place."""

    def register(self, address: int, nbytes: int) -> str | None:
        try:
            torch.sim.register_host(address, nbytes)
        except RuntimeError as error:
            return str(error)
        return None

    def unregister(self, address: int) -> None:
        torch.sim.unregister_host(address)


def launched() -> list[str]:
    """The kernels that have been played on the current device for whoever has asked `launcher_of`, by name."""
    played = launcher_of(torch.device("sim", torch.accelerator.current_device_index()))._launcher
    assert isinstance(played, PlayedKernels)
    return played.launched


@contextmanager
def followed(unit_bytes: int = 8, *, kernels: bool = False) -> Iterator[None]:
    """Units of `unit_bytes` for engines made inside, whose windows are registered, and whose core is followed.

    The simulated device sees what torch does. The core and copies between host tensors it does not see: that they touch
    a block once that has been waited for, and windows once weights may change and when they are asked for first since,
    which ends their update, it is told here.

    kernels: whether the device has kernels, so that optimizer state can be at home there.
    """
    block, download, change = transfers._Block.wait, transfers.Download.wait, ParameterContext.before_change
    ask = _LocalWeights._gather
    size, transfers.REGISTRIES["sim"] = discover.DEFAULT_UNIT_BYTES, Registry

    def wait(self: transfers._Block) -> None:
        block(self)
        torch.sim.host_access(address(self.memory), self.memory.nbytes, True, "the host in a block")

    def read(self: transfers.Download) -> torch.Tensor:
        values = download(self)
        torch.sim.host_access(address(values), values.nbytes, False, "the core in a gradient")
        return values

    def before_change(self: ParameterContext) -> None:
        change(self)
        copies = getattr(self.gatherer.weights, "transfers", None)
        for start, nbytes in () if copies is None else copies._registered.items():
            torch.sim.host_access(start, nbytes, True, "an update")

    def gather(self: _LocalWeights, unit: Unit) -> None:
        ask(self, unit)
        if self._stays and isinstance(unit.memory, DeviceMemory) and unit.memory.nbytes:
            torch.sim.host_access(address(unit.memory.window), unit.memory.nbytes, True, "an update")

    discover.DEFAULT_UNIT_BYTES, _LocalWeights._gather = unit_bytes, gather
    transfers._Block.wait, transfers.Download.wait, ParameterContext.before_change = wait, read, before_change
    if kernels:
        LAUNCHERS["sim"] = PlayedKernels
    try:
        yield
    finally:
        transfers._Block.wait, transfers.Download.wait, ParameterContext.before_change = block, download, change
        discover.DEFAULT_UNIT_BYTES, _LocalWeights._gather = size, ask
        del transfers.REGISTRIES["sim"]
        LAUNCHERS.pop("sim", None)
        launcher_of.cache_clear()
