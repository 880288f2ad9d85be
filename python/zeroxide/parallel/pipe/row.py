"""What a model with a row of blocks does around them: found by rehearsing one forward with shapes alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zeroxide.device.placement import HOST
from zeroxide.errors import ModelError
from zeroxide.profiling.outline import become_outline

__all__ = ["Row", "call_of", "example_for", "find_row", "hidden_in", "without_values"]

BEFORE, AFTER, AROUND = "before", "after", "around"


@dataclass(frozen=True)
class Row:
    """The blocks of a model, and where everything else with parameters runs."""

    name: str
    """Of the module list."""
    count: int
    gives: int | None
    """Items of the tuple that a block gives, of which the first goes on; None for a tensor."""
    keyword: str | None
    """As what a block takes it; None for its first argument."""
    runs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Of each module outside of the blocks with parameters of its own: before them, after them, around them."""

    def block(self, model: nn.Module, at: int) -> nn.Module:
        """One block of a model with this row."""
        return model.get_submodule(f"{self.name}.{at}")

    def wrapped(self, hidden: Any) -> Any:
        """What a block that gives `hidden` returns."""
        return hidden if self.gives is None else (hidden, *[None] * (self.gives - 1))


def find_row(model: nn.Module, example: Any) -> Row:
    """Rehearses a forward of `model`, which keeps its values and is not run.

    example: a micro-batch, as the model takes it; None for a Hugging Face model, whose input is known. Raises
    ModelError for a model without a row, and for one whose blocks cannot be run apart.
    """
    name, count = _longest_list(model)
    form = without_values(model)
    for param in form.parameters():
        # What depends on a parameter in any way is found by that.
        param.requires_grad_(param.is_floating_point())
    become_outline(form)
    seen = _Rehearsal(form, name, count)
    args, kwargs = call_of(model, example_for(model, example))
    with seen:
        try:
            seen.check_output(form(*args, **kwargs))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} could not be rehearsed to be cut: {type(error).__name__}: {error}; "
                "give example, a micro-batch as the model takes it, to PipelineModule.from_model"
            ) from error
    return seen.row()


def call_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a batch: a mapping by its names, a tuple or list in its order, anything else alone.

    Models of Hugging Face keep no cache then, of which training has no use.
    """
    if not isinstance(batch, Mapping):
        return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}
    named = dict(batch)
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        named.setdefault("use_cache", False)
    return (), named


def hidden_in(keyword: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block is given to go on with."""
    return args[0] if keyword is None else kwargs[keyword]


def without_values(module: nn.Module) -> nn.Module:
    """A copy on the meta device, tied as the original is; buffers of integers keep their values."""
    memo: dict[int, Any] = {}
    for param in module.parameters():
        memo[id(param)] = nn.Parameter(
            torch.empty_like(param, device="meta"), requires_grad=param.requires_grad and param.is_floating_point()
        )
    for buffer in module.buffers():
        if buffer.is_floating_point() or buffer.is_complex():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def example_for(model: nn.Module, example: Any) -> Any:
    """A micro-batch: the one given, or one for a model of Hugging Face's that takes `input_ids`. Raises ModelError."""
    if example is not None:
        return example
    name = getattr(model, "main_input_name", None)
    if name != "input_ids":
        raise ModelError(
            f"{type(model).__name__}: what it takes is not known: give example, a micro-batch as it takes it, to "
            "PipelineModule.from_model"
        )
    return {"input_ids": torch.zeros(1, 8, dtype=torch.int64, device=HOST)}


def _longest_list(model: nn.Module) -> tuple[str, int]:
    """The outermost module list with the most parameters."""
    found = [(sum(param.numel() for param in each.parameters()), name, len(each)) for name, each in _lists(model)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no nn.ModuleList of two blocks or more to be cut into stages: describe "
            "it as layers of a PipelineModule"
        )
    _, name, count = max(found)
    return name, count


def _lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList) and len(child) >= 2:
            yield path, child
        else:
            yield from _lists(child, path)


class _Rehearsal:
    """Looks at a forward, and refuses what stages could not do apart."""

    def __init__(self, form: nn.Module, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self._next = 0
        self._inside = False
        self._hidden: torch.Tensor | None = None
        self._gives: int | None = None
        self._keyword: str | None = None
        self._runs: dict[str, set[str]] = {}
        self._handles: list[Any] = []
        self._form = form

    def __enter__(self) -> None:
        for at, block in enumerate(self._form.get_submodule(self.name).children()):
            self._handles.append(block.register_forward_pre_hook(self._before_block(at), with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._after_block(at)))
        for path, owner in self._form.named_modules():
            if not owner._parameters or path.startswith(f"{self.name}."):
                continue
            self._runs[path] = set()
            if not path or self.name == path or self.name.startswith(f"{path}."):
                self._runs[path].add(AROUND)
            else:
                self._handles.append(owner.register_forward_pre_hook(self._before_owner(path)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def row(self) -> Row:
        """What was seen. Raises ModelError where not all blocks ran."""
        if self._next != self.count:
            raise self._refusal(f"{self.count} blocks and runs {self._next} of them")
        runs = {path: frozenset(seen) for path, seen in self._runs.items()}
        return Row(self.name, self.count, self._gives, self._keyword, runs)

    def _refusal(self, what: str) -> ModelError:
        return ModelError(
            f"the model cannot be cut into stages: {self.name} has {what}; describe it as a PipelineModule"
        )

    def _before_block(self, at: int) -> Any:
        def before(block: nn.Module, args: Any, kwargs: Any) -> None:
            if self._inside or at != self._next:
                raise self._refusal(
                    f"blocks that do not run once each in their order: number {at} after {self._next - 1}"
                )
            self._inside = True
            keyword = None
            if not (args and isinstance(args[0], torch.Tensor)):
                keyword = next((key for key, value in kwargs.items() if isinstance(value, torch.Tensor)), None)
                if keyword is None:
                    raise self._refusal(f"a block, number {at}, that takes no tensor")
            if at and keyword != self._keyword:
                raise self._refusal(f"blocks that take what they go on with in different ways: number {at}")
            self._keyword = keyword
            hidden = hidden_in(keyword, args, kwargs)
            if at and hidden is not self._hidden:
                raise self._refusal(f"a block, number {at}, that is not given what the one before gave")
            self._check_others(at, hidden, args, kwargs)

        return before

    def _check_others(self, at: int, hidden: Any, args: Any, kwargs: Any) -> None:
        names = [(f"argument {number}", value) for number, value in enumerate(args)]
        for name, value in (*names, *kwargs.items()):
            for each in _tensors(value):
                if each is not hidden and each.requires_grad:
                    raise self._refusal(
                        f"a block, number {at}, whose {name} is made of parameters, which each stage would need"
                    )

    def _after_block(self, at: int) -> Any:
        def after(block: nn.Module, args: Any, output: Any) -> Any:
            self._inside = False
            self._next += 1
            gives = len(output) if isinstance(output, tuple) else None
            hidden = output if gives is None else output[0]
            if not isinstance(hidden, torch.Tensor) or (at and gives != self._gives):
                raise self._refusal(
                    f"a block, number {at}, that gives neither a tensor nor a tuple that begins with one"
                )
            # What comes after knows the block by this tensor alone.
            self._gives, self._hidden = gives, hidden.detach().requires_grad_(hidden.is_floating_point())
            return self._hidden if gives is None else (self._hidden, *output[1:])

        return after

    def check_output(self, output: Any) -> None:
        """Raises ModelError where what the model gives depends on parameters of earlier blocks, or of what runs before
        them, otherwise than through the last block, as an auxiliary loss of experts does."""
        last = f"{self.name}.{self.count - 1}"
        names: dict[int, str] = {}
        allowed: set[int] = set()
        for path, owner in self._form.named_modules():
            in_blocks = path.startswith(f"{self.name}.")
            here = path == last or path.startswith(f"{last}.") if in_blocks else self._runs.get(path, set()) != {BEFORE}
            for key, param in owner._parameters.items():
                if param is not None:
                    names.setdefault(id(param), f"{path}.{key}" if path else key)
                    allowed.update([id(param)] if here else ())
        wrong = [names[each] for each in _parameters_behind(_tensors(output)) if each in names and each not in allowed]
        if wrong:
            raise self._refusal(
                f"results that depend on {min(wrong)} otherwise than through its last block, where another stage has it"
            )

    def _before_owner(self, path: str) -> Any:
        def before(owner: nn.Module, args: Any) -> None:
            if not self._inside and 0 < self._next < self.count:
                raise self._refusal(f"{path} between its blocks, with parameters that every stage would need")
            self._runs[path].add(AROUND if self._inside else BEFORE if self._next == 0 else AFTER)
            if len(self._runs[path]) > 1:
                raise self._refusal(f"{path}, with parameters, in several places: before its blocks, in or after them")

        return before


def _parameters_behind(tensors: Iterator[torch.Tensor]) -> set[int]:
    """The ids of leaves from which tensors were computed."""
    found: set[int] = set()
    seen: set[Any] = set()
    left = [each.grad_fn for each in tensors if each.grad_fn is not None]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        left.extend(each for each, _ in node.next_functions if each is not None)
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
