"""What torch and Python keep for each thread apart, taken from one thread to others."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from zeroxide.device.placement import autocast_here

__all__ = ["in_same_settings"]


def in_same_settings(act: Callable[..., None]) -> Callable[..., None]:
    """`act` for a new thread, which it finds as the caller's is now.

    Gradients and inference mode, autocast, modes of torch functions and of operations (a default device among them),
    hooks for saved tensors, the number of compute threads, and Python's context variables. How denormal numbers are
    rounded is the processor's state, which a thread has from the one that starts it.
    """
    context, cast = contextvars.copy_context(), autocast_here()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    functions = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    operations = _get_current_dispatch_mode_stack()
    saved = torch._C._autograd._top_saved_tensors_default_hooks(False)
    threads = torch.get_num_threads()

    def run(*args: Any) -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), cast():
            # A thread's stacks end with it.
            for operation in operations:
                torch._C._push_on_torch_dispatch_stack(operation)
            for function in functions:
                torch._C._push_on_torch_function_stack(function)
            if saved is not None:
                torch._C._autograd._push_saved_tensors_default_hooks(*saved)
            act(*args)

    # A context is entered by one thread at a time.
    return lambda *args: context.copy().run(run, *args)
