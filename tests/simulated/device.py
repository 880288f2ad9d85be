"""A simulated GPU: `load()` makes `torch.device("sim")` and `torch.sim` (`module.py`), in this process.

Its memory faults when the host touches it. Its streams are threads, whose copies come late and poison what they will
write. A checker knows who has waited for whom, and `torch.sim.races()` names what no wait has ordered. Operators are
the host's, on the same bits. Nothing starts before the first use, so that a process may load it and fork.

A process has it for good, and autograd looks for devices once, at the first backward of a process: whoever wants it
loads it before that, in a process of its own, as `conftest.py` does for the tests beside it.
"""

from __future__ import annotations

import ctypes
import importlib
import sys

import torch


def load() -> None:
    """Builds the backend where that is needed, and registers it; a second call does nothing.

    Raises:
        RuntimeError: it does not build, or another backend has taken the place that PyTorch has for one.
    """
    if hasattr(torch, "sim"):
        return
    # This package may be `simulated` and `tests.simulated`.
    build, module = (importlib.import_module(f"{__package__}.{name}") for name in ("build", "module"))
    torch.utils.rename_privateuse1_backend("sim")
    module.attach(ctypes.CDLL(str(build.library())))
    torch._register_device_module("sim", sys.modules[module.__name__])
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
