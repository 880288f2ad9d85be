"""Attention over sequences that ranks share: real processes over gloo, beside torch's on whole sequences.

Tolerances: in fp64 an exchange changes no bit of the output, and sums of gradients of key heads that several ranks have
are in another order: 1e-13 is 450 times the unit roundoff, for numbers of about 1. Ring attention computes in fp32 what
the oracle does in fp64: a sum of at most 16 tokens and the merging of 4 parts, each product and each weight rounded, is
within 64 u of the largest number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("sequence_attention_ranks.py")
HEADS = [[8, 8, 16], [8, 2, 16], [6, 3, 13], [6, 2, 14], [8, 1, 12], [12, 3, 17], [7, 7, 11]]


@pytest.fixture(scope="module", params=[2, 4])
def found(request) -> list[dict[str, Any]]:
    """What each rank found."""
    results = run_ranks(request.param, PROGRAM, timeout=200)
    for result in results:
        assert result.code == 0, result.err
    return [json.loads(result.out.partition("FOUND ")[2]) for result in results]


def cut(count: int, parts: int) -> list[int]:
    """Sizes that differ by one at most, the larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def heads(queries: int, keys: int, world: int) -> tuple[list[int], list[int]]:
    """Query and key heads of each rank, counted one by one."""
    group = queries // keys
    sizes = [group * each for each in cut(keys, world)] if keys >= world else cut(queries, world)
    owners = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    needed = [{head // group for head in range(queries) if owners[head] == rank} for rank in range(world)]
    return sizes, [len(each) for each in needed]


def test_attention_is_that_of_whole_sequences(found):
    """Catches: heads of another rank, tokens in another order, a key head for the wrong query heads, a gradient
    of a key head that only the last rank's adds to."""
    for rank in found:
        assert [each["case"] for each in rank["spread"]] == HEADS * 2
        for each in rank["spread"]:
            assert max(each["output"], *each["gradients"]) <= 1e-13, each


def test_bytes_are_those_of_the_formula(found):
    """Catches: key heads that are repeated before they travel, what a rank sends itself, and a message beside those of
    the exchange.

    Jacobs et al. 2023, section 3.2, for any heads and tokens: on the way there a rank receives of every other rank that
    rank's tokens of its own heads of query, key and value, and on the way back its own tokens of that rank's heads. In
    backward the same the other way round. 2 sequences, 4 numbers of 8 bytes a head and token.
    """
    world = len(found)
    for rank, said in enumerate(found):
        for each in said["spread"]:
            queries, keys, tokens = each["case"]
            own_tokens, (query, key) = cut(tokens, world), heads(queries, keys, world)
            moved = [query[at] + 2 * key[at] for at in range(world)]
            there = sum(own_tokens[at] * moved[rank] for at in range(world) if at != rank)
            back = sum(own_tokens[rank] * query[at] for at in range(world) if at != rank)
            there_again = sum(own_tokens[at] * query[rank] for at in range(world) if at != rank)
            back_again = sum(own_tokens[rank] * moved[at] for at in range(world) if at != rank)
            assert each["bytes"] == (there + back + there_again + back_again) * 2 * 4 * 8, each
            assert each["lengths"] == {str(8 * 8 * (world - 1)): 1}, each


def test_a_ring_is_attention_over_all_tokens(found):
    """Catches: parts merged by their sums alone, a causal mask by where a token is in its part, a scale left out."""
    for rank in found:
        for each in rank["ring"]:
            assert max(each["output"], *each["gradients"]) <= 64 * 2.0**-24 * each["size"], each


def test_a_loss_over_tokens_counts_every_token_alike(found):
    """Catches: a mean of means, and the gradient of a rank without tokens, which is not a number."""
    for rank in found:
        assert rank["weighted"]["loss"] <= 1e-12
        assert rank["weighted"]["gradient"] <= 1e-12
        assert rank["weighted"]["none"] == 0


def test_windows_and_documents_of_a_model_that_is_loaded_later(found):
    """Catches: a window over a rank's own tokens alone, documents that see one another, a patch that stays. One block
    of fp32 with outputs of about 1."""
    for rank in found:
        assert max(rank["windows"]["one"], rank["windows"]["packed"]) <= 1e-6
        assert rank["windows"]["one undone"]
        assert rank["windows"]["packed undone"]


def test_evaluation_may_be_left_alone_and_registering_undone(found):
    """Catches: a mask of (sequences, tokens) where a whole one is needed, and a name that is left behind."""
    for rank in found:
        assert rank["evaluating"] == {"during": True, "after": True, "names": [True, True, False]}


def test_more_ranks_than_heads_go_around(found):
    """Catches: a model with one head that is refused, and documents that the ring does not know of."""
    for rank in found:
        assert rank["around"]["distance"] <= 1e-6
        assert "neither padding, packed documents nor" in rank["around"]["packed"]


def test_a_loader_gives_every_rank_a_part_of_each_batch(found):
    """Catches: labels that are shifted within a part, batches of one rank alone, a rank that waits for one that has
    ended, and what was left of a pass in the next one."""
    world = len(found)
    for first, second in (rank["batches"]["passes"] for rank in found):
        assert first == second
        # Two of each rank: the third of rank 0 is left out.
        assert len(first) == 2 * world
    length = -(-10 // world) * world
    for number in range(2 * world):
        begin = 10 * (number // world) + 100 * (number % world)
        ids = [*range(begin, begin + 10), *[31] * (length - 10)]
        labels = [*range(begin + 1, begin + 10), *[-100] * (length - 9)]
        parts = [rank["batches"]["passes"][0][number] for rank in found]
        assert [each for part in parts for each in part["input_ids"][0]] == ids
        assert [each for part in parts for each in part["shift_labels"][0]] == labels
        assert [each for part in parts for each in part["position_ids"][0]] == list(range(length))
        assert all("labels" not in part and part["step"] == 7 for part in parts)
    assert found[0]["batches"]["length"] == 3 * world
    assert found[0]["batches"]["batch_size"] == 1


def test_the_engines_loader_gives_the_same_samples_to_those_that_share_them(found):
    """Catches: ranks that draw by themselves where no ranks take other samples, and a loader whose batches the adapter
    would train on once for each rank."""
    for rank in found:
        assert rank["loaded"]["samples"] == found[0]["loaded"]["samples"]
        assert "the same samples" in rank["loaded"]["adapter"]
    first, second = found[0]["loaded"]["samples"]
    for each in (first, second):
        assert sorted(sample for batch in each for sample in batch) == list(range(6))
    assert first != second


REFUSED = {
    "too few heads": "attention heads over {world} ranks of a sequence group leave ranks without a head",
    "ring lengths": "expected as many tokens of each in every rank",
    "groups": "a process has one sequence group",
    "does not divide": "sequence_parallel_size = 3 does not divide the {world} ranks: use one of [1, 2",
    "same samples": "the same samples, and each would be trained on that often",
    "no pad": "sequences of 15 tokens do not divide by the {world} ranks",
    "no positions": "a batch has no position_ids, labels",
    "eager": "core_attn_implementation 'eager'",
    "other core": "and the model was made with 'sdpa'",
    "no such name": "transformers finds no config there",
    "no model": "Linear is no model of transformers",
    "length": "seq_length = 15 over {world} ranks",
    "nothing shared": "{world} ranks share the sequences of a batch, and forward has exchanged nothing",
    "mpu without sequences": "object has no get_sequence_parallel_world_size",
    "mesh_param": "mesh_param = (3, 1) is 3 ranks, and there are {world}",
    "encoder and decoder": "t5 has an encoder and a decoder",
    "call without positions": "the model was called without position_ids",
    "4-D mask": "an attention mask of 4 dimensions",
    "other length": "registered for 2 of 16",
    "registered twice": "or unregister it first",
}


def test_what_cannot_be_is_refused_in_one_line_by_every_rank(found):
    """Catches: one that trains on, and a rank that waits for one that has raised."""
    for rank, said in enumerate(found):
        lines = said["refused"]
        assert set(lines) == {*REFUSED, "ranks differ", "one rank's shapes"}
        for name, words in REFUSED.items():
            assert words.format(world=len(found)) in lines[name], name
        assert all("\n" not in line for line in lines.values())
        assert lines["ranks differ"].startswith("TensorError: DistributedAttention: ranks of a sequence group have")
        expected = (
            "TensorError: DistributedAttention: key is" if rank == 0 else "ModelError: DistributedAttention: rank 0"
        )
        assert lines["one rank's shapes"].startswith(expected)
