"""`zeroxide`: what DeepSpeed has no key for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import (
    ByteSize,
    Count,
    Directory,
    File,
    Flag,
    MemorySize,
    Seconds,
    Section,
    WholeNumber,
    choice,
    expecting,
)
from zeroxide.config.given import Given, agree
from zeroxide.config.sections.mesh import MeshSection
from zeroxide.config.state_formats import FORMATS, Format
from zeroxide.errors import ConfigError

__all__ = ["Zeroxide", "ZeroxideSection", "resolve"]


RECOMPUTE = (
    '"none", "all" or how many of the first blocks; "auto" is for zeroxide plan and zeroxide train --recompute, which '
    "know the size of a batch"
)
"""What `recompute` may be, in a sentence."""


class ZeroxideSection(Section):
    """`zeroxide`. `format` and `rounding_seed` are resolved with precision, what begins with `checkpoint_` with
    `checkpoint`, `recompute` and what begins with `activation` with `activations`.
    """

    keeps_auto: ClassVar[frozenset[str]] = frozenset({"recompute"})

    device: Annotated[str, Field(pattern=r"^[a-z]+(:[0-9]+)?$"), expecting('"cpu", "cuda" or "cuda:N"')] | None = None
    """Where the model computes; without it, where its weights are, else a GPU if there is one."""
    host_memory: MemorySize | None = None
    """Most resident memory of a process, as the operating system counts it; without it there is no limit."""
    device_memory: MemorySize | None = None
    """Most memory of the device for weights, optimizer state and gradients; without it half is left to activations."""
    format: Annotated[Format | None, choice(*FORMATS)] = None
    """How optimizer state is kept: "split" (with bf16, the default there) and "fp32" exactly, others in fewer bytes."""
    rounding_seed: WholeNumber = 0
    """What the random bits are made of that "split-bf16" and "compact" round with."""
    io_engine: Annotated[Literal["auto", "io_uring", "threads"], choice("auto", "io_uring", "threads")] = "auto"
    """What moves bytes between memory and disk."""
    threads: Annotated[Count, Field(le=4096), expecting("an integer from 1 to 4096")] | None = None
    """Optimizer threads; without it one for each CPU that the process may use."""
    unit_bytes: MemorySize | None = None
    """Largest flat buffer of weights that is gathered in one piece."""
    row_bytes: ByteSize | None = None
    """Largest block of rows of a vocabulary's matrix: embeddings and output projections that take more are cut by rows
    and gathered a block at a time; without it they stay in one piece."""
    tile_bytes: ByteSize | None = None
    """Size of one disk request and of one optimizer task."""
    staging_bytes: MemorySize | None = None
    """Size of the ring through which all disk traffic goes."""
    disks: list[Directory] | None = None
    """Directories on further disks: what is on disk is dealt out over them and `nvme_path`, by measured
    speed of each disk; directories of one disk get equal parts."""
    state_in_memory: ByteSize | None = None
    """How much optimizer state stays in host memory where its home is a disk, in whole units; without it, none."""
    prefetch: Annotated[WholeNumber, Field(le=1024), expecting("an integer from 0 to 1024")] | None = None
    """How many units are read ahead of the one in use."""
    accumulation_order: Annotated[Literal["batches", "layers"], choice("batches", "layers")] = "batches"
    """How `train_batch` accumulates: one micro-batch after the other, or all of them layer by layer."""
    unrouted_experts: Annotated[Literal["update", "skip", "lazy"], choice("update", "skip", "lazy")] = "update"
    """What a step does with experts of `moe.MoE` that no token went to: "update" runs, reads and updates them, "skip"
    leaves them out, and "lazy" leaves them out and makes up for it when they are next used, with the same bits."""
    micro_batch_seeds: Flag = False
    """Whether `train_batch` gives each micro-batch random numbers of its own, the same in both orders."""
    gradients: Annotated[Literal["auto", "host", "disk"], choice("auto", "host", "disk")] = "auto"
    """Where gradients wait for the step if the optimizer state is on disk: "auto" keeps few in host memory that fit."""
    update_in_backward: Annotated[Flag | Literal["adaptive"], expecting('true, false or "adaptive"')] = False
    """Whether backward updates each unit as soon as its gradients are complete; "adaptive" while that saves bytes."""
    activations: Annotated[Literal["auto", "memory", "disk"], choice("auto", "memory", "disk")] = "auto"
    """Where activations wait for backward: "auto" sends to activation_path, if given, what host_memory cannot hold."""
    activation_path: Directory | None = None
    """Directory of the file for activations on disk; with "disk" and without it that of the optimizer state."""
    activation_disk: MemorySize | None = None
    """Bytes of disk reserved for activations at the start; without it as much as a pass needs."""
    activation_buffers: ByteSize | None = None
    """Memory that activations pass through on their way to the disk and back; without it 64 MiB."""
    recompute: Annotated[Literal["none", "all"] | WholeNumber, expecting(RECOMPUTE)] = "none"
    """Blocks of the model whose activations are computed again in backward: the first ones of its module lists."""
    trim_libraries: Flag = True
    """Whether pages of shared libraries that were touched only while importing leave the resident set."""
    transport: Annotated[
        Literal["auto", "shared_memory", "collective"], choice("auto", "shared_memory", "collective")
    ] = "auto"
    """What carries weights and gradients between ranks: shared memory where all are on one host, if it is "auto"."""
    checkpoint_background: Flag | None = None
    """Whether training goes on while a checkpoint is written."""
    checkpoint_memory: MemorySize | None = None
    """Most memory in which state waits to be written; without it half of what is free, within host_memory."""
    durable_every: WholeNumber = 0
    """Optimizer steps between commits of all state on disk, from which a killed run goes on; 0 is none."""
    durable_name: (
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"), expecting("a name of a directory")] | None
    ) = None
    """Name by which a run finds its commits again; without it "run"."""
    rank_timeout: Seconds | None = None
    """Seconds in which a rank gives no sign of life, or all wait for different things, until the others end."""
    log: File | None = None
    """File to which rank 0 adds a line of JSON for each optimizer step; without it there is none."""
    mesh: MeshSection | None = None


@dataclass(frozen=True)
class Zeroxide(Resolved):
    """Budgets, sizes and threads. Sizes are bytes."""

    key: ClassVar[str] = "zeroxide"

    device: str = field(default="auto", metadata=may_differ("each rank of a host has its own device"))
    """Where the model computes: "auto", "cpu", or a device as torch names it, without a number the rank's own."""
    host_memory: int | None = field(default=None, metadata=may_differ("hosts may have different amounts of memory"))
    """Budget for the whole process's resident memory; `None` sets no limit."""
    device_memory: int | None = field(default=None, metadata=may_differ("each rank has its own device"))
    """Budget for weights, optimizer state and gradients on the device that computes; `None` takes what leaves half of
    it to activations."""
    unit_bytes: int | None = None
    """Largest flat buffer of weights that is gathered in one piece."""
    row_bytes: int | None = None
    """Largest block of rows of an embedding or output projection, at the compute dtype; `None` cuts none."""
    staging_bytes: int | None = field(
        default=None, metadata=may_differ("the size of disk requests in flight changes no number")
    )
    """Size of the ring through which all disk traffic goes."""
    tile_bytes: int | None = field(default=None, metadata=may_differ("the size of a disk request changes no number"))
    """Size of one disk request and of one optimizer task."""
    disks: tuple[Path, ...] = field(default=(), metadata=may_differ("hosts may have different disks"))
    """Directories over which what is on disk is dealt out, beside `nvme_path`."""
    state_in_memory: int | None = None
    """Most bytes of optimizer state that stay in host memory where its home is a disk; `None` is none."""
    prefetch: int = 1
    """How many units are read ahead of the one in use."""
    accumulation_order: Literal["batches", "layers"] = "batches"
    """How `train_batch` accumulates: one micro-batch after the other, or all of them layer by layer."""
    unrouted_experts: Literal["update", "skip", "lazy"] = "update"
    """What a step does with experts that no token went to."""
    micro_batch_seeds: bool = False
    """Whether `train_batch` gives each micro-batch random numbers of its own, the same in both orders."""
    io_engine: Literal["auto", "io_uring", "threads"] = field(
        default="auto", metadata=may_differ("a kernel may have io_uring and another not")
    )
    threads: int | None = field(
        default=None, metadata=may_differ("it fits the host's processors; results do not depend on it")
    )
    """Optimizer threads; `None` is one for each CPU that the process may use."""
    gradients: Literal["auto", "host", "disk"] = field(
        default="auto", metadata=may_differ("hosts may have different amounts of memory; it changes no number")
    )
    """Where gradients wait for the step if the optimizer state is on disk: "auto" keeps few in host memory that fit."""
    update_in_backward: bool | Literal["adaptive"] = False
    """Whether backward updates each unit as soon as its gradients are complete; "adaptive" while that saves bytes."""
    trim_libraries: bool = field(default=True, metadata=may_differ("it concerns one process's memory"))
    """Whether pages of shared libraries that were touched only while importing are dropped from the resident set."""
    transport: Literal["auto", "shared_memory", "collective"] = "auto"
    """What carries weights and gradients between ranks: shared memory where all are on one host, if it is "auto"."""
    durable_every: int = 0
    """Optimizer steps between commits of all state on disk, from which a killed run goes on; 0 is none."""
    durable_name: str | None = None
    """Name by which a run finds its commits again; `None` where there are none."""
    rank_timeout: float = field(
        default=10.0, metadata=may_differ("rank 0's counts for all but itself; it changes no number")
    )
    """Seconds in which a rank gives no sign of life, or all wait for different things, until the others end."""
    log: Path | None = field(default=None, metadata=may_differ("rank 0 alone writes, and no number depends on it"))
    """File to which rank 0 adds a line of JSON for each optimizer step; `None` is none."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        values = dataclasses.asdict(self) | {"disks": [*map(str, self.disks)]}
        return {f"{self.key}.{name}": value for name, value in values.items()}


def resolve(section: ZeroxideSection, given: Given) -> Zeroxide:
    """Budgets and sizes. Raises ConfigError where one leaves no room for another, or a shortcut contradicts one."""
    host_memory = agree("host_memory", given.shortcuts.host_memory, "zeroxide.host_memory", section.host_memory)
    return Zeroxide(
        device=section.device or Zeroxide.device,
        host_memory=host_memory,
        device_memory=section.device_memory,
        unit_bytes=section.unit_bytes,
        row_bytes=section.row_bytes,
        staging_bytes=_staging(section, host_memory),
        tile_bytes=section.tile_bytes,
        disks=tuple(section.disks or ()),
        state_in_memory=section.state_in_memory,
        prefetch=Zeroxide.prefetch if section.prefetch is None else section.prefetch,
        accumulation_order=section.accumulation_order,
        unrouted_experts=section.unrouted_experts,
        micro_batch_seeds=section.micro_batch_seeds,
        io_engine=section.io_engine,
        threads=section.threads,
        gradients=section.gradients,
        update_in_backward=section.update_in_backward,
        trim_libraries=section.trim_libraries,
        transport=section.transport,
        durable_every=section.durable_every,
        durable_name=_durable_name(section),
        rank_timeout=Zeroxide.rank_timeout if section.rank_timeout is None else section.rank_timeout,
        log=section.log,
    )


def _durable_name(section: ZeroxideSection) -> str | None:
    if section.durable_every:
        return section.durable_name or "run"
    if section.durable_name is not None:
        raise ConfigError(
            "zeroxide.durable_name names the commits of a run, and zeroxide.durable_every = 0 makes none: give both",
            path="zeroxide.durable_name",
        )
    return None


def _staging(section: ZeroxideSection, host_memory: int | None) -> int | None:
    if section.staging_bytes is None:
        return None
    if section.tile_bytes is not None and section.tile_bytes > section.staging_bytes:
        raise ConfigError(
            f"zeroxide.tile_bytes = {section.tile_bytes} is larger than "
            f"zeroxide.staging_bytes = {section.staging_bytes}, the ring that has to hold several tiles",
            path="zeroxide.tile_bytes",
        )
    if host_memory is not None and section.staging_bytes >= host_memory:
        raise ConfigError(
            f"zeroxide.staging_bytes = {section.staging_bytes} leaves nothing of host_memory = {host_memory}",
            path="zeroxide.staging_bytes",
        )
    return section.staging_bytes
