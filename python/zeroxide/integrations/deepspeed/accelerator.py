"""`deepspeed.get_accelerator()`: the device of this process, by torch's own words."""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["Accelerator", "get_accelerator"]


class Accelerator:
    """What torch says of the accelerator, or of the CPU where there is none. Nothing is touched until it is asked."""

    _communication_backend_name = property(lambda self: self.communication_backend_name())

    def is_available(self) -> bool:
        """Whether the device can be used; the CPU always can."""
        return True

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda" or "cuda:N"; "cpu" has no number."""
        kind = self._kind()
        return kind if device_index is None or kind == "cpu" else f"{kind}:{device_index}"

    def current_device(self) -> int | str:
        """The number of the current device; "cpu" has none."""
        return "cpu" if self._kind() == "cpu" else torch.accelerator.current_device_index()

    def current_device_name(self) -> str:
        """The current device, as torch takes it."""
        kind = self._kind()
        return kind if kind == "cpu" else f"{kind}:{torch.accelerator.current_device_index()}"

    def device_count(self) -> int:
        """Devices that this process sees; one for the CPU."""
        return max(1, torch.accelerator.device_count())

    def set_device(self, device_index: int) -> None:
        """Makes a device the current one."""
        if self._kind() != "cpu":
            torch.accelerator.set_device_index(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        """Waits for all that the device has been given."""
        if self._kind() != "cpu":
            torch.accelerator.synchronize(device_index)

    def empty_cache(self) -> None:
        """Gives memory that torch keeps for later back to the device."""
        if self._kind() != "cpu":
            torch.accelerator.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes of tensors on the device; 0 for the CPU."""
        return 0 if self._kind() == "cpu" else torch.accelerator.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most that it was."""
        return 0 if self._kind() == "cpu" else torch.accelerator.max_memory_allocated(device_index)

    def communication_backend_name(self) -> str:
        """The backend of torch.distributed for tensors on the device."""
        return "nccl" if self._kind() == "cuda" else "gloo"

    def is_bf16_supported(self) -> bool:
        """Whether models compute in bf16."""
        return self._kind() != "cuda" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """Whether models compute in fp16."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Dtypes that models compute in."""
        half = [torch.bfloat16] if self.is_bf16_supported() else []
        return [torch.float32, torch.float16, *half]

    def _kind(self) -> str:
        current = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if current is None else current.type


@functools.cache
def get_accelerator() -> Any:
    """The one of this process."""
    return Accelerator()
