"""Each rank's samples, beside torch's sampler with `set_epoch` called by hand, and beside plain slices of a stream."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from zeroxide.config import load
from zeroxide.data.sampler import EpochSampler, ShardedIterable
from zeroxide.distributed import Group, Ranks
from zeroxide.engine.data import Loaders
from zeroxide.errors import DataError

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


class FourRanks(Ranks):
    """The last of four ranks, which all say the same."""

    def __init__(self):
        super().__init__(rank=3, world=4)

    def gather_objects(self, value):
        return [value] * 4


@pytest.mark.parametrize("data", [list(range(24)), Stream(24)], ids=["map", "stream"])
def test_the_ranks_of_the_batch_group_share_the_samples(data):
    """Of four ranks two take different samples, as with tensor parallelism over the others. Catches: shares by rank of
    the job, batches counted by its ranks."""
    config = load({"train_micro_batch_size_per_gpu": 2})
    loaders = [Loaders(config, None, FourRanks(), Group((1, 3), position)).make(data) for position in (0, 1)]
    shares = [torch.cat(list(loader)).tolist() for loader in loaders]
    assert [len(share) for share in shares] == [12, 12]
    assert sorted(shares[0] + shares[1]) == list(range(24))


def test_a_data_set_too_small_for_the_batch_group_is_counted_by_it():
    config = load({"train_micro_batch_size_per_gpu": 3, "dataloader_drop_last": True})
    with pytest.raises(DataError, match="has 2 samples for each of 2 ranks and a micro-batch takes 3"):
        Loaders(config, None, FourRanks(), Group((1, 3), 0)).make([1, 2, 3, 4])
