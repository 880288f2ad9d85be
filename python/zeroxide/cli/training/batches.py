"""Which tokens make up which batch: a function of the seed and of how many batches came before, and of nothing else.

The training stream is cut into windows of `seq_len` tokens. One pass over them (an epoch) visits each exactly once, in
an order given by a keyed permutation that is computed position by position: there is no list of indices to keep in
memory or in a checkpoint, and the state of the data is one number, the count of batches taken.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from zeroxide.cli.training.dataset import TokenFile
from zeroxide.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["HeldOutBatches", "Permutation", "TrainingBatches"]

_ROUNDS = 4


@dataclass(frozen=True)
class Permutation:
    """A permutation of range(`count`) chosen by `key`, evaluated one position at a time in constant memory.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest power of four that holds `count`; a result
    outside the range is fed back until it falls inside (cycle walking), which keeps the map one-to-one.
    """

    count: int
    key: bytes

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a permutation needs at least one element, got {self.count}")

    def __call__(self, position: int) -> int:
        """Return the element at `position`, 0 <= position < count."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} is not in range({self.count})")
        half = max(1, ((self.count - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        value = position
        while True:
            left, right = value >> half, value & mask
            for number in range(_ROUNDS):
                message = number.to_bytes(1, "little") + right.to_bytes(8, "little")
                digest = hashlib.blake2b(message, key=self.key, digest_size=8).digest()
                left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
            value = left << half | right
            if value < self.count:
                return value


class TrainingBatches:
    """Batches of shape (batch_size, seq_len), int64, in an endless shuffled sequence that can be entered anywhere."""

    def __init__(self, tokens: TokenFile, *, batch_size: int, seq_len: int, seed: int) -> None:
        self._tokens = tokens
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._seed = seed
        self.num_windows = tokens.count // seq_len
        if self.num_windows < batch_size:
            raise DataError(
                f"too little data: one batch of {batch_size} x {seq_len} needs {batch_size * seq_len:,} tokens, "
                f"the corpus has {tokens.count:,}; lower --batch-size or --seq-len, or give more --data",
                path=tokens.path,
            )
        self._epoch = -1
        self._order = self._permutation(0)

    def windows(self, number: int) -> list[int]:
        """Return the indices of the windows in batch `number`, counted from 0."""
        indices = []
        for sample in range(number * self._batch_size, (number + 1) * self._batch_size):
            epoch, position = divmod(sample, self.num_windows)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
            indices.append(self._order(position))
        return indices

    def batch(self, number: int) -> torch.Tensor:
        """Return batch `number`, counted from 0 over the whole run."""
        return _stack(self._tokens, [index * self._seq_len for index in self.windows(number)], self._seq_len)

    def _permutation(self, epoch: int) -> Permutation:
        key = hashlib.blake2b(f"data order {self._seed} {epoch}".encode(), digest_size=32).digest()
        return Permutation(self.num_windows, key)


class HeldOutBatches:
    """The batches of a held-out loss: at most `limit` of them, spread evenly over the held-out stream."""

    def __init__(self, tokens: TokenFile, *, batch_size: int, seq_len: int, limit: int) -> None:
        self._tokens = tokens
        # A short held-out text makes one short window rather than none.
        self._length = min(seq_len, tokens.count)
        num_windows = tokens.count // self._length if self._length >= 2 else 0
        taken = min(num_windows, batch_size * limit)
        self._starts = [index * num_windows // taken * self._length for index in range(taken)]
        self._batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches; 0 where the held-out text is shorter than two tokens."""
        return (len(self._starts) + self._batch_size - 1) // self._batch_size

    def batch(self, number: int) -> torch.Tensor:
        """Return batch `number` of shape (rows, length), int64; the last may have fewer rows."""
        starts = self._starts[number * self._batch_size : (number + 1) * self._batch_size]
        return _stack(self._tokens, starts, self._length)


def _stack(tokens: TokenFile, starts: list[int], length: int) -> torch.Tensor:
    import torch

    return torch.from_numpy(numpy.stack([tokens.read(start, length) for start in starts]))
