"""What was measured of a model, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from torch import nn

from zeroxide.profiling.numbers import (
    duration_to_string,
    flops_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)

__all__ = ["aggregated", "profile", "show"]


class Cost(Protocol):
    """See `ModuleCost`."""

    params: int
    flops: int
    seconds: float


CostOf = Callable[[nn.Module], Cost]


def profile(
    model: nn.Module,
    cost_of: CostOf,
    *,
    step: int,
    depth: int,
    top: int,
    detailed: bool,
    backward_factor: float,
    seconds: Mapping[str, float],
    facts: Mapping[str, object],
    unsupported: Mapping[str, int],
) -> str:
    """The whole report; the arguments are those of `FlopsProfiler.print_model_profile`.

    backward_factor: FLOPs of backward over those of forward.
    """
    lines = [f"---- FLOPs profile at step {step} ----"]
    lines += _table([(name, str(value)) for name, value in facts.items()])
    lines += _table(_summary(cost_of(model), backward_factor, seconds))
    if unsupported:
        lines.append("not counted: " + ", ".join(f"{name} ({count} calls)" for name, count in unsupported.items()))
    lines += ["", *aggregated(model, cost_of, depth, top)]
    if detailed:
        lines += ["", "every module, with all that is in it:", *_tree(model, cost_of, depth)]
    return "\n".join(lines)


def show(text: str) -> None:
    """Prints a report."""
    print(text, flush=True)


def _summary(cost: Cost, factor: float, seconds: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield "params", params_to_string(cost.params)
    yield "fwd MACs", macs_to_string(cost.flops // 2)
    yield "fwd flops", number_to_string(cost.flops)
    yield "fwd latency", duration_to_string(cost.seconds)
    yield "fwd FLOPS = fwd flops / fwd latency", _rate(cost.flops, cost.seconds)
    if "backward" in seconds:
        backward = seconds["backward"]
        yield "bwd latency", duration_to_string(backward)
        yield f"bwd FLOPS = {factor:g} * fwd flops / bwd latency", _rate(factor * cost.flops, backward)
        both = (factor + 1) * cost.flops
        rate = _rate(both, cost.seconds + backward)
        yield f"fwd+bwd FLOPS = {factor + 1:g} * fwd flops / (fwd latency + bwd latency)", rate
    if "step" in seconds:
        yield "step latency", duration_to_string(seconds["step"])
    if "iteration" in seconds:
        yield "time of the optimizer step, all micro-batches", duration_to_string(seconds["iteration"])


def _rate(flops: float, seconds: float) -> str:
    return flops_to_string(flops / seconds) if seconds > 0 else "-"


def aggregated(model: nn.Module, cost_of: CostOf, depth: int, top: int) -> list[str]:
    """For each depth, the `top` classes of modules with the most parameters, MACs and time, summed over modules."""
    sums: dict[int, dict[str, list[float]]] = {}
    for at, _, module in _walk(model, depth):
        cost = cost_of(module)
        total = sums.setdefault(at, {}).setdefault(type(module).__name__, [0, 0, 0.0])
        for index, value in enumerate((cost.params, cost.flops // 2, cost.seconds)):
            total[index] += value
    words = (("params", params_to_string), ("MACs", macs_to_string), ("fwd latency", duration_to_string))
    lines = [f"top {top} kinds of modules by depth:"]
    for at, kinds in sums.items():
        lines.append(f"depth {at}:")
        for index, (name, say) in enumerate(words):
            largest = sorted(kinds.items(), key=lambda item: -item[1][index])[:top]
            lines.append(f"    {name:<11} - " + ", ".join(f"{kind}: {say(found[index])}" for kind, found in largest))
    return lines


def _tree(model: nn.Module, cost_of: CostOf, depth: int) -> list[str]:
    whole = cost_of(model)
    rows = [("module", "params", "", "MACs", "", "fwd latency", "", "fwd FLOPS")]
    for at, name, module in _walk(model, depth):
        cost = cost_of(module)
        rows.append(
            (
                f"{'  ' * at}{name or 'model'} ({type(module).__name__})",
                params_to_string(cost.params),
                _share(cost.params, whole.params),
                macs_to_string(cost.flops // 2),
                _share(cost.flops, whole.flops),
                duration_to_string(cost.seconds),
                _share(cost.seconds, whole.seconds),
                _rate(cost.flops, cost.seconds),
            )
        )
    return _table(rows)


def _walk(model: nn.Module, depth: int) -> Iterator[tuple[int, str, nn.Module]]:
    """(depth, name, module) from the model down, as far as `depth` says; a module with two names has its first."""
    seen = set()

    def below(module: nn.Module, name: str, at: int) -> Iterator[tuple[int, str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield at, name, module
        if depth < 0 or at < depth:
            for child_name, child in module.named_children():
                yield from below(child, child_name, at + 1)

    yield from below(model, "", 0)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [tuple(row) for row in rows]
    widths = [max((len(row[at]) for row in cells), default=0) for at in range(len(cells[0]) if cells else 0)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
