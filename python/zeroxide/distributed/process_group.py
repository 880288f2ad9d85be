"""Makes `Ranks`: over the process group that exists, else one that the environment asks for, else a single rank."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from zeroxide.distributed.collectives import Ranks, first_line
from zeroxide.distributed.host import host_identity
from zeroxide.distributed.launch import LaunchInfo, read_environment
from zeroxide.errors import RanksError

__all__ = ["default_backend", "init_distributed", "split", "start"]

DEFAULT_TIMEOUT_SECONDS = 1800.0
"""How long a collective may take; torch's default. A lost rank is noticed by the watch long before."""


LAST_COLLECTIVE_SECONDS = 0.05
"""How long the end of a process leaves the interpreter lock to threads of torch; they need microseconds."""


def _at_exit() -> None:
    # Once, and before anything that is registered later and runs earlier.
    atexit.unregister(_let_threads_finish)
    atexit.register(_let_threads_finish)


def _let_threads_finish() -> None:
    # gloo's thread drops a collective's tensors after it has woken whoever waited for them, and needs the interpreter
    # lock for that. If the interpreter has begun to end meanwhile, Python ends that thread by force, inside a
    # destructor, and the process aborts ("terminate called without an active exception"). Sleeping leaves it the lock.
    time.sleep(LAST_COLLECTIVE_SECONDS)


def default_backend() -> str:
    """gloo for tensors in host memory, and NCCL for those on a GPU where there is one."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def start(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, port: int | None = None) -> Ranks:
    """The ranks of this job; called by all of them.

    A default process group that exists already is used and never destroyed, whatever its size. Otherwise the
    environment tells (`read_environment`), and several ranks get a group that `Ranks.close` destroys. With neither,
    this is a single rank, and torch.distributed is not touched.

    timeout_seconds: how long rank 0 is waited for at start, and how long one collective may take.
    port: where rank 0 listens if MASTER_PORT is not set.

    Raises RanksError when the environment contradicts itself or not all ranks arrive.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        _at_exit()
        return _over_default_group(owned=False, launch=None)
    launch = read_environment(os.environ, port)
    if launch.world == 1:
        return Ranks()
    _at_exit()
    _make_group(launch, default_backend(), timedelta(seconds=timeout_seconds), None)
    try:
        ranks = _over_default_group(owned=True, launch=launch)
    except BaseException:
        dist.destroy_process_group()
        raise
    # Destroying the group joins gloo's threads; see `_let_threads_finish`.
    atexit.register(ranks.close)
    return ranks


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | float | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Makes torch's default process group, unless there is one; the signature of `deepspeed.init_distributed`.

    The group belongs to the caller: `zeroxide.initialize` uses it and does not destroy it.

    dist_backend: torch's name for the backend; None is gloo in host memory and NCCL on GPUs.
    auto_mpi_discovery: whether the variables of MPI and SLURM are read where torchrun's are missing.
    distributed_port: where rank 0 listens if MASTER_PORT is not set.
    verbose: whether rank 0 logs what was started.
    timeout: of the start and of every collective, as a timedelta or in seconds; if None as many minutes
        as DEEPSPEED_TIMEOUT says, or 10, as with DeepSpeed.
    init_method: a URL as torch takes it ("tcp://host:port", "file:///path"), instead of the environment's address.
    dist_init_required: False leaves everything as it is.
    config: accepted for the signature's sake; it holds DeepSpeed's communication log, which zeroxide does not keep.
    rank, world_size: instead of the environment's where both are given.

    Raises RanksError when the environment contradicts itself or not all ranks arrive.
    """
    import torch.distributed as dist

    if dist_init_required is False or dist.is_initialized():
        return
    if (rank >= 0) != (world_size >= 0):
        raise RanksError(f"rank, world_size: expected both or neither, got {rank} and {world_size}")
    if rank >= 0:
        if rank >= world_size:
            raise RanksError(f"rank: expected 0 to {world_size - 1}, since world_size is {world_size}, got {rank}")
        given = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        kept = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        if init_method is not None:
            kept.setdefault("MASTER_ADDR", "127.0.0.1")  # not used: the URL says where
        launch = read_environment({**kept, **given}, distributed_port)
    else:
        launch = read_environment(os.environ, distributed_port, other_launchers=auto_mpi_discovery)
    if not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=_deepspeeds_seconds(os.environ) if timeout is None else timeout)
    backend = dist_backend or default_backend()
    _make_group(launch, backend, timeout, init_method)
    if verbose and launch.rank == 0:
        logging.getLogger("zeroxide").info("%d ranks over %s, told by %s", launch.world, backend, launch.launcher)


def _deepspeeds_seconds(environment: Mapping[str, str]) -> float:
    """DeepSpeed's default (deepspeed/constants.py:19 of 0.19.8). Raises RanksError for a variable that is no number."""
    text = environment.get("DEEPSPEED_TIMEOUT", "10").strip()
    if not re.fullmatch(r"[1-9][0-9]{0,6}", text):
        raise RanksError(f"DEEPSPEED_TIMEOUT: expected a whole number of minutes from 1 on, got {text!r}")
    return 60.0 * int(text)


def _make_group(launch: LaunchInfo, backend: str, timeout: timedelta, init_method: str | None) -> None:
    """The default process group, or RanksError in one line."""
    import torch
    import torch.distributed as dist

    if launch.world == 1 and init_method is None:
        # Nobody has to be met, so no port is opened.
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    host = f"[{launch.address}]" if launch.address and ":" in launch.address else launch.address
    where = init_method or f"tcp://{host}:{launch.port}"
    try:
        store = _fresh_store(where, launch, timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise RanksError(
            f"rank {launch.rank} of {launch.world} (told by {launch.launcher}) could not meet the others at {where} "
            f"within {timeout.total_seconds():g} s: {first_line(error)}; check that every rank was started, and that "
            "MASTER_ADDR and MASTER_PORT name a free port of rank 0's host",
            ranks=[launch.rank],
        ) from error


_stores: dict[tuple[str, int, int], tuple[Any, Iterator[int]]] = {}


def _fresh_store(where: str, launch: LaunchInfo, timeout: timedelta) -> Any:
    """Keys that no group has used, in the store at `where`.

    Ranks leave a group one after the other, and the addresses that it wrote into the store stay there: under torchrun
    the store is the agent's and outlives every group, elsewhere a rank may join the next group while rank 0's store
    of the last one still answers. So the connection stays for as long as the process, and each group has a number.
    """
    import torch
    from torch.distributed.rendezvous import rendezvous

    key = (where, launch.rank, launch.world)
    if key not in _stores:
        store, _, _ = next(rendezvous(where, launch.rank, launch.world, timeout=timeout))
        if not _stores:
            # Registered before what closes the groups, and so run after it.
            atexit.register(_stores.clear)
        _stores[key] = store, itertools.count()
    store, numbers = _stores[key]
    store.set_timeout(timeout)
    return torch._C._distributed_c10d.PrefixStore(f"zeroxide/{next(numbers)}", store)


def _over_default_group(owned: bool, launch: LaunchInfo | None) -> Ranks:
    import torch.distributed as dist

    backend = str(dist.get_backend_config())
    if dist.get_backend() == "fake":
        backend = "fake"
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), owned=owned, backend=backend)
    default = dist.group.WORLD
    assert default is not None
    if backend != "fake" and all(each.type != "cpu" for each in default._device_types):
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        ranks.group, ranks.own_group = group, True
    else:
        ranks.group = default
    here = _find_hosts(ranks)
    if launch is None or launch.local_rank is None or launch.local_world is None:
        ranks.local_rank, ranks.local_world = here.index(ranks.rank), len(here)
    else:
        ranks.local_rank, ranks.local_world = launch.local_rank, launch.local_world
    return ranks


def split(ranks: Ranks, groups: Sequence[Sequence[int]], backend: str = "gloo") -> Ranks:
    """The ranks of that one of `groups` in which this rank is, numbered from 0 in its order.

    groups: of numbers of `ranks`; every rank of them is in one, and gives the same. Called by all ranks. Where a group
    is all ranks in their order, these are `ranks` themselves; otherwise `close` destroys the group's process group.

    backend: torch's name of what carries their collectives; "gloo" for tensors in host memory.

    Raises RanksError when a rank is lost meanwhile.
    """
    mine = next(tuple(group) for group in groups if ranks.rank in group)
    if mine == tuple(range(ranks.world)):
        return ranks
    found = Ranks(
        rank=mine.index(ranks.rank),
        world=len(mine),
        local_rank=ranks.local_rank,
        local_world=ranks.local_world,
        backend=ranks.backend,
        within=ranks,
        members=mine,
    )
    if ranks.alone:
        found.group, found.same_host, found.shares_memory = ranks.group, ranks.same_host, ranks.shares_memory
        return found
    import torch.distributed as dist

    try:
        for group in groups:
            # Every rank makes every group, so that all number them alike.
            made = dist.new_group([ranks.number(each) for each in group], backend=backend) if len(group) > 1 else None
            if tuple(group) == mine and isinstance(made, dist.ProcessGroup):
                found.group, found.own_group = made, True
    except RuntimeError as error:
        raise ranks.broken("making a group", error) from error
    if found.world > 1:
        _find_hosts(found)
    return found


def _find_hosts(ranks: Ranks) -> list[int]:
    """Finds out what the ranks have in common; which of them are on this host."""
    hosts = ranks.gather_objects(host_identity())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    ranks.same_host = len(here) == ranks.world
    # The boot and the network namespace; where the latter is unknown, something equal to nobody's stands in its place.
    ranks.same_network = len({(host[1], host[-1]) for host in hosts}) == 1
    ranks.shares_memory = ranks.same_host and _shares_memory(ranks)
    return here


def _shares_memory(ranks: Ranks) -> bool:
    """Whether every rank can open a file without a name that another has made; tried, since many settings decide it."""
    descriptor = os.memfd_create("zeroxide-probe")
    try:
        # As the segments are.
        os.fchmod(descriptor, 0o600)
        handles = ranks.gather_objects([os.getpid(), descriptor])
        opened = all(_opens(f"/proc/{pid}/fd/{number}") for pid, number in handles)
        # Also keeps the descriptor open until everybody has tried it.
        return all(ranks.gather_objects(opened))
    finally:
        os.close(descriptor)


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True
