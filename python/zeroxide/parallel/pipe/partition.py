"""Where a row of layers is cut into stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from zeroxide.errors import ConfigError

__all__ = ["METHODS", "balanced", "bounds_of", "cut_by", "uniform", "weights_by_type"]

METHODS = "'parameters', 'uniform', 'type:REGEX' or 'profile'"
"""What `partition_method` can be."""


def uniform(layers: int, parts: int) -> list[int]:
    """Bounds of `parts` parts of nearly the same number of layers; the first ones have one more."""
    small, more = divmod(layers, parts)
    return [part * small + min(part, more) for part in range(parts + 1)]


def balanced(weights: Sequence[float], parts: int) -> list[int]:
    """Bounds of `parts` parts in a row, none of them empty, of which the heaviest is as light as can be.

    Of the ways to do that, the one whose sum of squared weights is least, and of those the one that cuts first where
    they differ: layers that weigh nothing go where they make no stage longer than another. O(parts * layers^2).
    There must be at least as many layers as parts.
    """
    sums = [0.0, *accumulate(map(float, weights))]
    count = len(weights)
    # best[first]: (heaviest, sum of squares, end of the first part) for layers from `first` on in the parts left.
    best: list[tuple[float, float, int]] = [
        (sums[count] - sums[first], (sums[count] - sums[first]) ** 2, count) for first in range(count)
    ]
    ends = [[entry[2] for entry in best]]
    for left in range(2, parts + 1):
        best = [
            min(
                (
                    max(sums[end] - sums[first], best[end][0]),
                    (sums[end] - sums[first]) ** 2 + best[end][1],
                    end,
                )
                for end in range(first + 1, count - left + 2)
            )
            if count - first >= left
            else (float("inf"), float("inf"), count)
            for first in range(count)
        ]
        ends.append([entry[2] for entry in best])
    bounds = [0]
    for left in reversed(range(parts)):
        bounds.append(ends[left][bounds[-1]])
    return bounds


def weights_by_type(names: Sequence[str], pattern: str) -> list[float]:
    """1 for each layer whose class name has the regular expression in it, whatever the case, and 0 for others.

    Raises ConfigError for what is no regular expression, or matches no layer.
    """
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"pipeline.partition: {pattern!r} is no regular expression: {error}", path="pipeline.partition"
        ) from None
    weights = [float(bool(found.search(name))) for name in names]
    if not any(weights):
        known = ", ".join(sorted(set(names)))
        raise ConfigError(
            f"pipeline.partition: type:{pattern} matches no layer; the layers are of {known}",
            path="pipeline.partition",
        )
    return weights


def cut_by(
    method: str, names: Sequence[str], parameters: Sequence[int], parts: int, seconds: Sequence[float] | None = None
) -> list[int]:
    """Bounds of the stages: part `i` has layers `bounds[i]` to `bounds[i + 1]`, the latter not included.

    names, parameters: of each layer, its class and its number of trainable elements. seconds: what each takes, for
    "profile". Raises ConfigError for another method, and for fewer layers than parts.
    """
    if len(names) < parts:
        raise ConfigError(
            f"pipeline: {len(names)} layers cannot be cut into {parts} stages: each needs at least one",
            path="pipeline.stages",
            expected=f"at most {len(names)}",
            got=str(parts),
        )
    wanted = method.lower()
    if wanted == "uniform":
        return uniform(len(names), parts)
    if wanted in ("parameters", "best"):
        return balanced([float(count) for count in parameters], parts)
    if wanted == "profile":
        assert seconds is not None, "somebody measures before"
        return balanced(seconds, parts)
    if wanted.startswith("type:"):
        return balanced(weights_by_type(names, method[len("type:") :]), parts)
    raise ConfigError(
        f"pipeline.partition: expected {METHODS}, got {method!r}",
        path="pipeline.partition",
        expected=METHODS,
        got=repr(method),
    )


def bounds_of(bounds: Sequence[int], part: int) -> range:
    """The layers of one part."""
    return range(bounds[part], bounds[part + 1])
