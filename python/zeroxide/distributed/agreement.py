"""Whether the ranks were started alike: same versions, same config, same model, same sampler.

What must agree is a fact: a name and a plain value. Every rank states its facts, they are gathered once, and the first
that differs is named on every rank.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from zeroxide.distributed.collectives import Ranks
from zeroxide.errors import RanksError

__all__ = ["Fact", "agree", "name_ranks"]

Fact = str | int | float | None | list[Any]
"""A list is exchanged as its length and hash; only where those differ do its entries travel, to name the first."""

_MISSING = "(not stated)"
_MOST_GROUPS = 4
_MOST_CHARACTERS = 100

# What to do about a fact whose name begins so.
_REMEDIES = {
    "version": "install the same version on every rank",
    "config": "start every rank with the same config",
    "model": "build the same model in the same way on every rank",
    "sampler": "give every rank's sampler the same settings over the same data",
}
_OTHERWISE = "start every rank in the same way"


def agree(ranks: Ranks, facts: Mapping[str, Fact]) -> None:
    """Raises RanksError on every rank when the facts differ: which one first, and which ranks state what.

    Called by all ranks. Facts are compared in rank 0's order, then those that rank 0 does not state. Values are equal
    when they are the same JSON, so 1 and 1.0 differ, and NaN equals itself.
    """
    if ranks.alone:
        return
    stated = ranks.gather_objects([[name, _short_form(value)] for name, value in facts.items()])
    tables: list[dict[str, str]] = [dict(each) for each in stated]
    for name in dict.fromkeys(itertools.chain.from_iterable(tables)):
        values = [table.get(name, _MISSING) for table in tables]
        if len(set(values)) == 1:
            continue
        # Every rank sees the same tables, so all of them come here for the same fact.
        where = name
        if all(value.startswith("list ") for value in values):
            where, values = _first_difference(name, ranks.gather_objects(facts[name]))
        raise RanksError(
            f"ranks do not agree on {where}: {_by_value(values)}; {_REMEDIES.get(name.partition('.')[0], _OTHERWISE)}",
            ranks=_odd_ones(values),
        )


def _short_form(value: Fact) -> str:
    text = json.dumps(value, sort_keys=True)
    if isinstance(value, list):
        return f"list {len(value)} {hashlib.sha256(text.encode()).hexdigest()}"
    return text


def _first_difference(name: str, lists: Sequence[Sequence[Any]]) -> tuple[str, list[str]]:
    """Where lists that are known to differ do so first, and what each says there."""
    for index, entries in enumerate(itertools.zip_longest(*lists, fillvalue=_MISSING)):
        texts = [each if isinstance(each, str) else json.dumps(each, sort_keys=True) for each in entries]
        if len(set(texts)) > 1:
            return f"{name}[{index}]", ["(the list ends before)" if text == _MISSING else text for text in texts]
    raise AssertionError(f"{name}: lists with different hashes are equal")


def _by_value(values: Sequence[str]) -> str:
    """ "8 on rank 0, 16 on ranks 1-3": the values in the order of the first rank that has each."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    shown = [f"{_shorten(value)} on {name_ranks(members)}" for value, members in groups.items()]
    more = len(shown) - _MOST_GROUPS
    return ", ".join(shown[:_MOST_GROUPS]) + (f", and {more} more values" if more > 0 else "")


def _odd_ones(values: Sequence[str]) -> list[int]:
    """The ranks that are not with the majority; of equal groups the one with rank 0 counts as the majority."""
    usual = max(dict.fromkeys(values), key=values.count)
    return [rank for rank, value in enumerate(values) if value != usual]


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-2, 5": ascending ranks as a person would write them, runs joined, long lists cut."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    shown = ", ".join(texts[:8]) + (", ..." if len(texts) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
