"""Which rank this process is, read from the variables that its launcher set.

torchrun's variables come first. Where they are missing, those of an MPI launcher are read and then SLURM's: a program
that `mpirun` starts inside a SLURM job inherits the variables of the task that called `mpirun`, so SLURM's describe
another process than this one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from zeroxide.errors import RanksError

__all__ = ["DEFAULT_PORT", "LaunchInfo", "read_environment", "split_nodes"]

DEFAULT_PORT = 29500
"""Where rank 0 is met when no variable and no argument says otherwise; torch's and DeepSpeed's default."""

_MOST_RANKS = 1 << 24

# Launchers after torchrun, in the order in which they are asked: name, then the variables for rank, ranks, rank on
# this host and ranks on this host. Of several variables the first that is set counts.
_Launcher = tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
_LAUNCHERS: tuple[_Launcher, ...] = (
    (
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    (
        "MVAPICH2",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    ("PMI", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
    ("PMIx", ("PMIX_RANK",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ()),
    ("SLURM", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",), ()),
)


@dataclass(frozen=True, slots=True)
class LaunchInfo:
    """One process's place among the ranks; `launcher` says whose variables told.

    `local_rank` and `local_world` count the ranks of this host; they are None where no variable tells, and are then
    found by asking the other ranks. `address` is None only for a single rank.
    """

    rank: int = 0
    world: int = 1
    local_rank: int | None = 0
    local_world: int | None = 1
    address: str | None = None
    port: int = DEFAULT_PORT
    launcher: str = "none"


def read_environment(
    environment: Mapping[str, str], port: int | None = None, *, other_launchers: bool = True
) -> LaunchInfo:
    """The place that `environment` describes; a single rank when it describes none.

    port: used where MASTER_PORT is not set.
    other_launchers: whether MPI's and SLURM's variables are read where torchrun's are missing.

    Raises RanksError, naming variable, expected and got, for values that are malformed or contradict one another.
    """
    own: _Launcher = ("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
    others = [each for each in _LAUNCHERS if _given(environment, *each[1])] if other_launchers else []
    if _given(environment, "RANK", "WORLD_SIZE"):
        if others and not (_given(environment, "RANK") and _given(environment, "WORLD_SIZE")):
            # A job script that sets one of the two leaves the other to the launcher that it runs under.
            other = others[0]
            _same(environment, "WORLD_SIZE", other[2])
            _same(environment, "RANK", other[1])
            own = (other[0], own[1] + other[1], own[2] + other[2], own[3] + other[3], own[4] + other[4])
        return _checked(environment, port, *own)
    if others:
        return _checked(environment, port, *others[0])
    return LaunchInfo()


def _same(environment: Mapping[str, str], mine: str, theirs: tuple[str, ...]) -> None:
    """Raises RanksError where both are set and differ."""
    one, two = _number(environment, (mine,), 0, _MOST_RANKS), _number(environment, theirs, 0, _MOST_RANKS)
    if one is not None and two is not None and one[1] != two[1]:
        raise RanksError(f"{mine}: expected {two[1]}, since {two[0]} is {two[1]}, got {one[1]}")


def _given(environment: Mapping[str, str], *names: str) -> str | None:
    """The first of `names` that is set to something."""
    return next((name for name in names if environment.get(name, "").strip()), None)


def _number(environment: Mapping[str, str], names: tuple[str, ...], least: int, most: int) -> tuple[str, int] | None:
    name = _given(environment, *names)
    if name is None:
        return None
    text = environment[name].strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise RanksError(f"{name}: expected a whole number from {least} to {most}, got {text!r}")
    return name, int(text)


def _checked(
    environment: Mapping[str, str],
    port: int | None,
    launcher: str,
    rank_names: tuple[str, ...],
    world_names: tuple[str, ...],
    local_rank_names: tuple[str, ...],
    local_world_names: tuple[str, ...],
) -> LaunchInfo:
    found_world = _number(environment, world_names, 1, _MOST_RANKS)
    if found_world is None:
        raise RanksError(
            f"{world_names[-1]}: expected the number of ranks, since {rank_names[0]} is set, got nothing; set both or "
            "neither"
        )
    world_name, world = found_world
    found_rank = _number(environment, rank_names, 0, _MOST_RANKS)
    if found_rank is None:
        raise RanksError(
            f"{rank_names[0]}: expected this process's rank, since {world_name} is set, got nothing; "
            "set both or neither"
        )
    rank_name, rank = found_rank
    if rank >= world:
        raise RanksError(f"{rank_name}: expected 0 to {world - 1}, since {world_name} is {world}, got {rank}")
    local_rank, local_world = _local(environment, launcher, world_name, world, local_rank_names, local_world_names)
    if local_rank is not None and local_rank > rank:
        name = _given(environment, *local_rank_names)
        raise RanksError(f"{name}: expected 0 to {rank}, since {rank_name} is {rank}, got {local_rank}")
    if world == 1:
        local_rank, local_world = 0, 1
    chosen = _number(environment, ("MASTER_PORT",), 1, 65535)
    return LaunchInfo(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        address=_address(environment, world, local_world) if world > 1 else None,
        port=chosen[1] if chosen is not None else DEFAULT_PORT if port is None else port,
        launcher=launcher,
    )


def _local(
    environment: Mapping[str, str],
    launcher: str,
    world_name: str,
    world: int,
    rank_names: tuple[str, ...],
    world_names: tuple[str, ...],
) -> tuple[int | None, int | None]:
    """Rank and ranks on this host, each None where unknown."""
    found = _number(environment, world_names, 1, _MOST_RANKS)
    local_world = None if found is None else found[1]
    if found is None and launcher in ("SLURM", "PMIx"):
        local_world = _slurm_tasks_here(environment)
    if local_world is not None and local_world > world:
        name = found[0] if found is not None else "SLURM_STEP_TASKS_PER_NODE"
        raise RanksError(f"{name}: expected 1 to {world}, since {world_name} is {world}, got {local_world}")
    below = _number(environment, rank_names, 0, _MOST_RANKS)
    if below is None:
        return None, local_world
    name, local_rank = below
    if local_rank >= (local_world or world):
        why = world_name if local_world is None else (found[0] if found is not None else "SLURM_STEP_TASKS_PER_NODE")
        most = local_world or world
        raise RanksError(f"{name}: expected 0 to {most - 1}, since {why} is {most}, got {local_rank}")
    return local_rank, local_world


def _slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
    """How many tasks of the step run on this node; SLURM writes "2(x3),1" for 2, 2, 2, 1 by node."""
    name = _given(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    node = _number(environment, ("SLURM_NODEID",), 0, _MOST_RANKS)
    if name is None or node is None:
        return None
    counts: list[int] = []
    for part in environment[name].split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:\(x([0-9]{1,6})\))?\s*", part)
        if match is None:
            raise RanksError(f'{name}: expected counts such as "2(x3),1", got {environment[name]!r}')
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node[1]] if node[1] < len(counts) else None


def _address(environment: Mapping[str, str], world: int, local_world: int | None) -> str:
    """Where rank 0 can be reached: MASTER_ADDR, else SLURM's first node, else this host if all ranks are on it."""
    name = _given(environment, "MASTER_ADDR")
    if name is not None:
        return environment[name].strip()
    if local_world == world:
        return "127.0.0.1"
    name = _given(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if name is not None:
        return split_nodes(environment[name], name)[0]
    raise RanksError(
        f"MASTER_ADDR: expected the name of rank 0's host, since there are {world} ranks on more than one host, got "
        "nothing; set it to the same name on every rank"
    )


def split_nodes(text: str, name: str = "SLURM_NODELIST") -> list[str]:
    """The nodes of a SLURM list in order: "n[01-03,07],m2" is n01, n02, n03, n07, m2.

    Raises RanksError, naming the variable `name`, when the text is no such list.
    """
    wrong = RanksError(f'{name}: expected nodes such as "n[01-03,07],m2", got {text!r}')
    nodes: list[str] = []
    # Commas inside brackets separate ranges, those outside separate nodes.
    for item in re.split(r",(?![^\[]*\])", text.strip()):
        parts = re.split(r"\[([^\[\]]*)\]", item.strip())
        if not item.strip() or any(re.search(r"[\[\]\s]", each) for each in parts[::2]):
            raise wrong
        choices = [
            [each] if even else _numbers(each)
            for each, even in zip(parts, itertools.cycle((True, False)), strict=False)
        ]
        if not all(choices):
            raise wrong
        nodes += ["".join(each) for each in itertools.product(*choices)]
    return nodes


def _numbers(ranges: str) -> list[str]:
    """The numbers of "01-03,07" with their leading zeros; empty when it is no list of ranges."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if match is None:
            return []
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + _MOST_RANKS:
            return []
        numbers += [str(each).zfill(len(first)) for each in range(int(first), int(last) + 1)]
    return numbers
