"""Writes down what DeepSpeed's own names take: run where DeepSpeed is installed, with this folder's names.

    DS_ACCELERATOR=cpu python tests/integrations/deepspeed_signatures.py > tests/integrations/deepspeed_signatures.json

By module and name: {"parameters": [[name, kind, [default] or null]]} of a function or class, {"methods": the same by
name} of a class whose methods scripts call, {"members": values by name} of an enum, {"value": it} of a constant. A
default is what `plain` makes of it.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["parameters_of", "plain"]

METHODS_OF = {
    "deepspeed.DeepSpeedEngine",
    "deepspeed.monitor.monitor.MonitorMaster",
    "deepspeed.ops.adam.DeepSpeedCPUAdam",
    "deepspeed.ops.adam.FusedAdam",
    "deepspeed.ops.adagrad.DeepSpeedCPUAdagrad",
    "deepspeed.ops.lion.DeepSpeedCPULion",
    "deepspeed.profiling.flops_profiler.FlopsProfiler",
    "deepspeed.runtime.lr_schedules.LRRangeTest",
    "deepspeed.runtime.lr_schedules.OneCycle",
    "deepspeed.runtime.lr_schedules.WarmupLR",
    "deepspeed.runtime.lr_schedules.WarmupDecayLR",
    "deepspeed.runtime.lr_schedules.WarmupCosineLR",
    "deepspeed.utils.RepeatingLoader",
    "deepspeed.zero.GatheredParameters",
    "deepspeed.zero.Init",
}
"""Classes whose methods scripts call."""


def plain(value: Any) -> Any:
    """`value` as JSON has it: enums by their values, sequences as lists, what else there is by its type or text."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    return type(value).__name__ if callable(value) else str(value)


def _undecorated(named: Any) -> Any:
    """What a decorator without `functools.wraps` hides, as those that time DeepSpeed's functions."""
    while inspect.isfunction(named) and list(inspect.signature(named).parameters) == ["args", "kwargs"]:
        inner = [each.cell_contents for each in named.__closure__ or () if inspect.isfunction(each.cell_contents)]
        if len(inner) != 1:
            break
        named = inner[0]
    return named


def parameters_of(named: Any) -> list[list[Any]] | None:
    """[name, kind, [default] or None] of each parameter but `self`; None where Python knows no signature."""
    try:
        found = inspect.signature(_undecorated(named)).parameters.values()
    except (TypeError, ValueError):
        return None
    return [
        [each.name, each.kind.name, None if each.default is inspect.Parameter.empty else [plain(each.default)]]
        for each in found
        if each.name != "self"
    ]


def describe(full: str, found: Any) -> dict[str, Any]:
    """What is written down of one name."""
    if inspect.ismodule(found):
        return {}
    if inspect.isclass(found) and issubclass(found, enum.Enum):
        return {"members": {each.name: plain(each.value) for each in found}}
    if not callable(found):
        return {"value": plain(found)} if isinstance(found, str | list | tuple) else {}
    described: dict[str, Any] = {}
    if (parameters := parameters_of(found)) is not None:
        described["parameters"] = parameters
    if full in METHODS_OF:
        described["methods"] = methods_of(found)
    return described


def methods_of(kind: type) -> dict[str, Any]:
    """Parameters of every public method that `kind` does not have from torch; None for a property."""
    from torch import nn, optim
    from torch.utils.data import DataLoader

    known = {name for base in (nn.Module, optim.Optimizer, DataLoader, object) for name in dir(base)}
    known -= {"step", "zero_grad", "state_dict", "load_state_dict", "train", "eval", "compile", "forward", "__iter__"}
    found = {}
    for name in dir(kind):
        if (name.startswith("_") and name != "__iter__") or name in known:
            continue
        value = getattr(kind, name)
        found[name] = parameters_of(value) if callable(value) else None
    return found


def surface() -> dict[str, list[str]]:
    """The names that zeroxide answers for, read from its table without importing zeroxide."""
    path = Path(__file__).parents[2] / "python" / "zeroxide" / "integrations" / "deepspeed" / "surface.py"
    spec = importlib.util.spec_from_file_location("surface", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["surface"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {home: list(names) for home, names in module.SURFACE.items()}


def main() -> None:
    """Prints the table, a line a name."""
    sys.path.insert(0, str(Path(__file__).parent))
    import deepspeed
    from deepspeed_names import USED

    asked = surface()
    for module, names in USED.items():
        asked[module] = sorted({*asked.get(module, ()), *names.split()})
    table: dict[str, Any] = {}
    for module, listed in asked.items():
        try:
            home = importlib.import_module(module)
        except ModuleNotFoundError:
            # `deepspeed.zero` and the like are attributes of the package, not modules below it.
            home = deepspeed
            for part in module.split(".")[1:]:
                home = getattr(home, part, None)
        for name in listed:
            if hasattr(home, name):
                table[f"{module}.{name}"] = describe(f"{module}.{name}", getattr(home, name))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(table[name], sort_keys=True)}" for name in sorted(table))
    print(f'{{"version": {json.dumps(deepspeed.__version__)}, "names": {{\n{lines}\n}}}}')


if __name__ == "__main__":
    main()
