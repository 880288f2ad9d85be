"""Each rank's samples, beside torch's sampler with `set_epoch` called by hand, and beside plain slices of a stream."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from zeroxide.data.sampler import EpochSampler, ShardedIterable

DATA = list(range(23))


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_pass_is_an_epoch_of_its_own(rank):
    loader = DataLoader(DATA, batch_size=4, sampler=EpochSampler(DATA, 3, rank))
    oracle = DistributedSampler(DATA, 3, rank)

    def expected(epoch):
        oracle.set_epoch(epoch)
        return list(oracle)

    passes = [[int(each) for batch in loader for each in batch] for _ in range(3)]
    assert passes == [expected(epoch) for epoch in range(3)]
    assert passes[0] != passes[1]
    loader.sampler.set_epoch(7)
    assert [[int(each) for batch in loader for each in batch] for _ in range(2)] == [expected(7), expected(8)]


@pytest.mark.parametrize("count", [0, 2, 3, 11, 12])
def test_a_stream_is_shared_and_ranks_get_equally_many(count):
    shares = [list(ShardedIterable(Stream(count), rank, 3)) for rank in range(3)]
    whole = count - count % 3
    assert shares == [list(range(count))[rank:whole:3] for rank in range(3)]
    with pytest.raises(TypeError):
        len(ShardedIterable(Stream(count), 0, 3))
    assert len(ShardedIterable(range(count), 0, 3)) == len(shares[0])
