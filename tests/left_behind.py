"""What a process and a model have, to compare before and after something that must leave nothing."""

from __future__ import annotations

import gc
import os
import threading

import torch
import torch.distributed as dist

PARAM_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def hooks_of(model):
    """Every hook and every attribute of every module and parameter."""
    found = []
    for name, module in model.named_modules():
        tables = {key: list(value) for key, value in module.__dict__.items() if key.endswith("_hooks") and value}
        found.append((name, type(module), sorted(module.__dict__), tables))
    for name, param in model.named_parameters():
        tables = [getattr(param, each) for each in PARAM_HOOKS]
        found.append((name, type(param), sorted(param.__dict__), [each and dict(each) for each in tables]))
    return found


def resources():
    """Descriptors (by what they are open on), threads and mappings of shared memory of this process."""
    gc.collect()
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}").split(":")[0])
        except FileNotFoundError:
            continue
    with open("/proc/self/maps") as file:
        shared = sum("memfd:zeroxide" in line for line in file)
    return sorted(links), sorted(each.name for each in threading.enumerate()), shared


def group():
    """torch's process group."""
    return id(dist.group.WORLD) if dist.is_initialized() else None


def identities(model):
    """Which parameter is where, what it is, and whether it takes a gradient."""
    return [
        (name, id(param), type(param), param.requires_grad, param.device.type, tuple(param.shape))
        for name, param in model.named_parameters(remove_duplicate=False)
    ]


def values(model):
    """Copies of all parameters, buffers and gradients."""
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    grads = {f"{name}.grad": param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    return found | grads


def differences(before, after):
    """Names of values that are not the same, bit by bit."""
    same = {
        name
        for name in before.keys() & after.keys()
        if before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
    }
    return sorted((before.keys() | after.keys()) - same)
