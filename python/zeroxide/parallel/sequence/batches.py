"""Batches whose sequences are cut over ranks: `UlyssesSPDataLoaderAdapter`, and `shard_batch` for one that all have."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from zeroxide.device.placement import of_buffer
from zeroxide.errors import DataError
from zeroxide.parallel.sequence.exchange import gather_numbers

__all__ = ["UlyssesSPDataLoaderAdapter", "shard_batch"]

logger = logging.getLogger("zeroxide")

IGNORED = -100
"""What stands in labels where no loss counts."""
NEEDED = ("input_ids", "position_ids", "labels")


def shard_batch(
    batch: Mapping[str, Any], sp_rank: int, sp_world_size: int, *, pad_token_id: int | None = None
) -> dict[str, Any]:
    """Rank `sp_rank`'s part of the tokens of a batch that all ranks of a sequence group have.

    batch: tensors of (sequences, tokens), among them `input_ids`, `position_ids` and `labels`. Other entries stay.
    pad_token_id: with what sequences are filled up that do not divide by the ranks; None refuses them. What is
        filled in has positions that go on, no label, and 0 in `attention_mask`.

    Instead of `labels` there is `shift_labels`: token t has the label of token t + 1, also of the next rank's first.
    Raises DataError where something is missing or does not divide.
    """
    missing = [name for name in NEEDED if not isinstance(batch.get(name), torch.Tensor)]
    if missing:
        raise DataError(
            f"a batch has no {', '.join(missing)}: sequences that ranks share need {', '.join(NEEDED)} (positions "
            "count in the whole sequence, and begin at 0 in each of its documents)"
        )
    rows, tokens = batch["input_ids"].shape
    lacking = -tokens % sp_world_size
    if lacking and pad_token_id is None:
        raise DataError(
            f"sequences of {tokens} tokens do not divide by the {sp_world_size} ranks that share them: make them a "
            "multiple, or give pad_token_id"
        )
    part = (tokens + lacking) // sp_world_size
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            found[name] = value
            continue
        if value.shape[1] != tokens or value.dim() > 2 or value.shape[0] not in (1, rows):
            raise DataError(f"{name} of a batch is {tuple(value.shape)}: expected ({rows}, {tokens}), as input_ids")
        name, value = _shifted(value) if name == "labels" else (name, value)
        if lacking and pad_token_id is not None:
            value = torch.cat([value, _filling(name, value, lacking, pad_token_id)], 1)
        found[name] = value[:, sp_rank * part : (sp_rank + 1) * part].contiguous()
    return found


def _shifted(labels: torch.Tensor) -> tuple[str, torch.Tensor]:
    return "shift_labels", torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _filling(name: str, value: torch.Tensor, count: int, pad_token_id: int) -> torch.Tensor:
    if name == "position_ids":
        return value[:, -1:] + torch.arange(1, count + 1, device=value.device, dtype=value.dtype)
    fill = {"shift_labels": IGNORED, "input_ids": pad_token_id}.get(name, 0)
    return value.new_full((value.shape[0], count), fill)


class UlyssesSPDataLoaderAdapter:
    """A loader whose ranks share the sequences of each of them in turn.

    dl: gives every rank of the sequence group other samples. Each of its batches becomes `sp_world_size` micro-batches:
        that of rank 0 of the group, cut over all ranks, then that of rank 1, and so on. A loader that gives all ranks
        the same samples is refused where its sampler shows it; cut its batches with `shard_batch`.
    device: to which tensors go. pad_token_id: see `shard_batch`; None refuses sequences that do not divide.

    The ranks end together: when one has no more batches, what the others still had of that round is left out, and
    rank 0 of the group says how many.
    """

    def __init__(
        self,
        dl: Any,
        sp_rank: int,
        sp_group: Any,
        sp_world_size: int,
        device: torch.device | str,
        *,
        pad_token_id: int | None = None,
    ) -> None:
        self.dl = dl
        self.sp_rank, self.sp_group, self.sp_world_size = sp_rank, sp_group, sp_world_size
        self.device = device
        self.pad_token_id = pad_token_id
        self.iter: Iterator[Any] | None = None
        self.micro_batches: deque[dict[str, Any]] = deque()
        sampler = getattr(dl, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas * sp_world_size == dist.get_world_size():
            raise DataError(
                f"the loader gives the {sp_world_size} ranks that share sequences the same samples, and each would be "
                "trained on that often: cut its batches with zeroxide.parallel.sequence.shard_batch"
            )

    def __len__(self) -> int:
        """Micro-batches of a pass. Raises TypeError where the loader has no length."""
        return len(self.dl) * self.sp_world_size

    def __getattr__(self, name: str) -> Any:
        # Whatever else is asked of a loader: its data set, its batch size, the epoch.
        if name == "dl":
            raise AttributeError(name)
        return getattr(self.dl, name)

    def __iter__(self) -> UlyssesSPDataLoaderAdapter:
        self.iter = iter(self.dl)
        self.micro_batches.clear()
        return self

    def __next__(self) -> dict[str, Any]:
        if not self.micro_batches:
            self._refill()
        return self.micro_batches.popleft()

    def _refill(self) -> None:
        if self.iter is None:
            self.iter = iter(self.dl)
        batch = next(self.iter, None)
        have = gather_numbers(self.sp_group, [int(batch is not None)], self.device)
        ready = sum(each[0] for each in have)
        if ready < self.sp_world_size:
            self.iter = None
            if ready and self.sp_rank == 0:
                logger.warning(
                    "%d of the %d ranks that share sequences have no more batches: %d batches are left out",
                    *(self.sp_world_size - ready, self.sp_world_size, ready),
                )
            raise StopIteration
        for each in self._gathered(batch):
            self.micro_batches.append(
                shard_batch(each, self.sp_rank, self.sp_world_size, pad_token_id=self.pad_token_id)
            )

    def _gathered(self, batch: Any) -> list[dict[str, Any]]:
        """The batch of every rank, by rank."""
        described = [
            [name, [*value.shape], str(value.dtype).removeprefix("torch.")]
            if isinstance(value, torch.Tensor)
            else [name, value]
            for name, value in batch.items()
        ]
        try:
            text = json.dumps(described).encode()
        except TypeError as error:
            names = [name for name, value in batch.items() if not isinstance(value, torch.Tensor)]
            raise DataError(
                f"a batch has {', '.join(names)} that is neither a tensor nor JSON: ranks that share sequences "
                "exchange nothing else"
            ) from error
        tensors = [value.to(self.device).contiguous() for value in batch.values() if isinstance(value, torch.Tensor)]
        head = of_buffer(bytearray(text), torch.uint8).to(self.device)
        message = torch.cat([head, *(tensor.view(-1).view(torch.uint8) for tensor in tensors)])
        sizes = gather_numbers(self.sp_group, [head.numel(), message.numel()], self.device)
        most = max(size for _, size in sizes)
        padded = torch.zeros(most, dtype=torch.uint8, device=self.device)
        padded[: message.numel()] = message
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded, group=self.sp_group)
        return [self._read(one, *size) for one, size in zip(every, sizes, strict=True)]

    def _read(self, message: torch.Tensor, head: int, end: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        at = head
        for name, *value in json.loads(bytes(message[:head].tolist())):
            if len(value) == 1:
                found[name] = value[0]
                continue
            shape, dtype = torch.Size(value[0]), getattr(torch, value[1])
            size = shape.numel() * dtype.itemsize
            # A copy: what other dtypes are viewed as must begin at a multiple of their size.
            found[name] = message[at : at + size].clone().view(dtype).view(shape)
            at += size
        assert at == end, "a message ends where its last tensor does"
        return found
