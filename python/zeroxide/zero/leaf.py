"""Leaf modules: gathered whole, with everything below them, as one unit.

For modules whose forward decides by its data which of its children run, such as experts: ranks may decide differently,
and all must take part in gathering. The mark is an attribute of the module, which the plan reads, so modules are marked
before `zeroxide.initialize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.errors import ModelError
from zeroxide.plan.discover import LEAF
from zeroxide.plan.plan import is_leaf
from zeroxide.zero.param import sharded_param_of

__all__ = [
    "get_z3_leaf_modules",
    "mark_leaf_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "unset_z3_leaf_modules_by_name",
    "unset_z3_leaf_modules_by_suffix",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether the module is marked."""
    return is_leaf(model)


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether the parameter, which DeepSpeed calls `model`, was in a module or below it when that was marked."""
    return hasattr(model, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules of `model`, itself included."""
    return [module for module in model.modules() if is_leaf(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Marks the module, or takes the mark away.

    Raises ModelError when the module's parameters already have units, in which the mark would change nothing.
    """
    _mark([("", model)], flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Marks the modules of these classes, given as classes or as "Name" or "module.path.Name". Returns them.

    Raises ModelError for a class that no module of `model` has, unless `raise_if_not_found` is False, and where the
    model has units already.
    """
    return _by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the mark from the modules of these classes. Returns them. Raises as `set_z3_leaf_modules`."""
    return _by_class(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Marks the modules of these full names, or takes the mark from them where `flag` is False.

    Returns (them, names that no module has). Raises as `set_z3_leaf_modules`.
    """
    return _by_path(model, module_names, flag, raise_if_not_found, lambda path, name: path == name)


def unset_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the mark from the modules of these full names. Returns them."""
    return _by_path(model, module_names, False, raise_if_not_found, lambda path, name: path == name)[0]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Marks the modules whose names end in one of these, or takes the mark from them where `flag` is False.

    Returns (them, suffixes that no module has). Raises as `set_z3_leaf_modules`.
    """
    return _by_path(model, module_name_suffixes, flag, raise_if_not_found, str.endswith)


def unset_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the mark from the modules whose names end in one of these. Returns them."""
    return _by_path(model, module_name_suffixes, False, raise_if_not_found, str.endswith)[0]


def mark_leaf_modules(model: nn.Module, config: Config) -> None:
    """Marks what `zero_optimization.leaf_module` names. A class that the model does not have is passed over, since
    one config may serve several models; a name that it does not have raises ModelError.
    """
    set_z3_leaf_modules(model, config.zero.leaf_classes, raise_if_not_found=False)
    set_z3_leaf_modules_by_name(model, config.zero.leaf_names)
    set_z3_leaf_modules_by_suffix(model, config.zero.leaf_suffixes)


def _by_class(model: nn.Module, classes: Iterable[type | str], flag: bool, required: bool) -> list[nn.Module]:
    def has(module: nn.Module, wanted: type | str) -> bool:
        if isinstance(wanted, type):
            return isinstance(module, wanted)
        kind = type(module)
        return wanted in (kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}")

    return _marked(model, list(classes), flag, required, lambda path, module, wanted: has(module, wanted))[0]


def _by_path(
    model: nn.Module, names: Iterable[str], flag: bool, required: bool, fits: Callable[[str, str], bool]
) -> tuple[list[nn.Module], list[str]]:
    found, missing = _marked(model, list(names), flag, required, lambda path, module, wanted: fits(path, str(wanted)))
    return found, [str(each) for each in missing]


def _marked(
    model: nn.Module,
    wanted: list[type | str],
    flag: bool,
    required: bool,
    fits: Callable[[str, nn.Module, type | str], bool],
) -> tuple[list[nn.Module], list[type | str]]:
    """The modules that fit, and what of `wanted` none does."""
    found: dict[int, tuple[str, nn.Module]] = {}
    missing: list[type | str] = []
    for each in wanted:
        hits = [(path, module) for path, module in model.named_modules() if fits(path, module, each)]
        if not hits and required:
            name = each.__name__ if isinstance(each, type) else repr(each)
            raise ModelError(f"leaf modules: no module of {type(model).__name__} is {name}")
        if not hits:
            missing.append(each)
        found.update({id(module): (path, module) for path, module in hits})
    _mark(list(found.values()), flag)
    return [module for _, module in found.values()], missing


def _mark(modules: list[tuple[str, nn.Module]], flag: bool) -> None:
    for path, module in modules:
        if is_leaf(module) != flag and _has_units(module.parameters()):
            raise ModelError(
                f"leaf modules: {path or type(module).__name__} belongs to an engine, whose units are made: mark "
                "modules before zeroxide.initialize",
                name=path,
            )
    for _, module in modules:
        setattr(module, LEAF, flag)
        for param in module.parameters():
            if flag:
                param.ds_z3_leaf_module = module  # type: ignore[attr-defined]
            elif getattr(param, "ds_z3_leaf_module", None) is module:
                del param.ds_z3_leaf_module  # type: ignore[attr-defined]


def _has_units(params: Iterable[torch.Tensor]) -> bool:
    return any(sharded_param_of(param) is not None for param in params)
