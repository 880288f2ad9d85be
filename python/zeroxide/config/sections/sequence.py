"""How many ranks share the sequences of a batch: keys at the top of the document, beside `zeroxide.mesh.sp`."""

from __future__ import annotations

from zeroxide.config.fields import Count, Section
from zeroxide.config.given import Given
from zeroxide.config.sections.mesh import MeshSection
from zeroxide.errors import ConfigError

__all__ = ["SequenceKeys", "shared"]

_SP = "zeroxide.mesh.sp"


class SequenceKeys(Section):
    """The keys."""

    sequence_parallel_size: Count | None = None
    """Ranks that share the sequences of a batch, as `zeroxide.mesh.sp`."""
    data_parallel_size: Count | None = None
    """Groups of ranks that take different samples: what is left of the ranks, from which the size above follows."""


def shared(section: MeshSection | None, keys: SequenceKeys, given: Given) -> MeshSection | None:
    """The section with the axis `sp` that all ways to say it come to.

    Raises ConfigError where they contradict one another, or leave other ranks than there are.
    """
    said = {
        _SP: None if section is None else section.sp,
        "sequence_parallel_size": keys.sequence_parallel_size,
        "mpu": given.sequence,
    }
    found = {name: size for name, size in said.items() if size is not None}
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{name} = {size}" for name, size in found.items())
        name = next(reversed([name for name in found if name != "mpu"]))
        raise ConfigError(
            f"{shown}: each is the number of ranks that share the sequences of a batch; give one of them",
            path=name,
            expected=str(next(iter(found.values()))),
            got=str(found[name]),
        )
    size = next(iter(found.values()), None)
    if keys.data_parallel_size is not None:
        size = _of_data(section, keys.data_parallel_size, size, given)
    if size is None or (section is not None and section.sp == size):
        return section
    return (section or MeshSection()).model_copy(update={"sp": size})


def _of_data(section: MeshSection | None, groups: int, size: int | None, given: Given) -> int:
    others = 1 if section is None else (section.pp or 1) * (section.tp or 1)
    left, rest = divmod(given.world_size, groups * others)
    if rest or (size is not None and size != left):
        shares = "" if size is None else f" * {size} ranks that share sequences"
        beside = "" if others == 1 else f" * {others} of zeroxide.mesh.pp and tp"
        raise ConfigError(
            f"data_parallel_size = {groups}{shares}{beside} does not come to the {given.world_size} ranks: leave it "
            "out, and it follows from the others",
            path="data_parallel_size",
            expected="unset" if size is None else str(given.world_size // (others * size) or 1),
            got=str(groups),
        )
    return left
