"""Attention over sequences that ranks share, beside torch's on whole sequences, and what is refused.

Every rank prints a line "FOUND {...}" of JSON: what came out of each check, or the line of its error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, T5Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zeroxide
from zeroxide.distributed import COMMS
from zeroxide.errors import ZeroxideError
from zeroxide.parallel.sequence import (
    DistributedAttention,
    UlyssesSPAttentionHF,
    UlyssesSPDataLoaderAdapter,
    average_over_tokens,
    initialize_sequence_parallel,
    ring_attention,
    shard_batch,
)

FOLDER = Path(os.environ["JOB_FOLDER"])
HEADS = ((8, 8, 16), (8, 2, 16), (6, 3, 13), (6, 2, 14), (8, 1, 12), (12, 3, 17), (7, 7, 11))
"""(query heads, key heads, tokens): those that divide by the ranks, and those that do not."""


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of (batch, tokens, heads, size)."""
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def made(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part, as `torch.tensor_split` has it: of any length."""
    return tensor.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


def distance(mine: torch.Tensor, whole: torch.Tensor, dim: int) -> float:
    return (mine - part(whole, dim)).abs().max().item()


def spread_attention(group: Any) -> list[dict[str, Any]]:
    """Outputs and gradients beside attention over whole sequences, both in fp64; and bytes of the exchanges."""
    found = []
    for tokens_first in (False, True):
        for queries, keys, tokens in HEADS:
            torch.manual_seed(queries * keys)
            shapes = [(2, tokens, queries, 4), (2, tokens, keys, 4), (2, tokens, keys, 4), (2, tokens, queries, 4)]
            *qkv, gradient = made(*shapes, dtype=torch.float64)
            for each in qkv:
                each.requires_grad_()
            whole = attend(*qkv)
            expected = torch.autograd.grad(whole, qkv, gradient)
            mine = [part(each.detach(), 1).clone().requires_grad_() for each in qkv]
            COMMS.reset()
            if tokens_first:
                given = [each.transpose(0, 1) for each in mine]
                local = lambda q, k, v: attend(*(each.transpose(0, 1) for each in (q, k, v))).transpose(0, 1)  # noqa: E731
                output = DistributedAttention(local, group)(*given, 1).transpose(0, 1)
            else:
                output = DistributedAttention(attend, group, 2, 1, num_kv_heads=keys)(*mine, 0)
            got = torch.autograd.grad(output, mine, part(gradient, 1))
            sizes = COMMS.records["all_to_all of sequences"]
            found.append({
                "case": [queries, keys, tokens],
                "output": distance(output, whole, 1),
                "gradients": [distance(a, b, 1) for a, b in zip(got, expected, strict=True)],
                "bytes": sum(size * record.count for size, record in sizes.items()),
                "lengths": {str(size): each.count for size, each in COMMS.records["all_gather of lengths"].items()},
            })  # fmt: skip
    return found


def ring() -> list[dict[str, Any]]:
    found = []
    for queries, keys, tokens in ((2, 1, 16), (3, 3, 8)):
        for causal in (True, False):
            torch.manual_seed(queries)
            shapes = [(2, queries, tokens, 8), (2, keys, tokens, 8), (2, keys, tokens, 8), (2, queries, tokens, 8)]
            *qkv, gradient = made(*shapes, dtype=torch.float32)
            wide = [each.double().requires_grad_() for each in qkv]
            q, k, v = wide[0], *(each.repeat_interleave(queries // keys, 1) for each in wide[1:])
            whole = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
            expected = torch.autograd.grad(whole, wide, gradient.double())
            mine = [part(each, 2).clone().requires_grad_() for each in qkv]
            output = ring_attention(*mine, is_causal=causal, scale=0.3)
            got = torch.autograd.grad(output, mine, part(gradient, 2))
            found.append({
                "output": distance(output, whole, 2),
                "gradients": [distance(a, b, 2) for a, b in zip(got, expected, strict=True)],
                "size": max(each.abs().max().item() for each in (whole, *expected)),
            })  # fmt: skip
    return found


def weighted(group: Any) -> dict[str, Any]:
    """A mean over tokens of which ranks have differently many, and its gradient after averaging over ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = [0, 3, 1, 7][:world]
    torch.manual_seed(0)
    tokens = torch.randn(sum(counts), dtype=torch.float64)
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    mine = tokens[sum(counts[:rank]) : sum(counts[: rank + 1])]
    loss = average_over_tokens((weight * mine).square().mean(), mine.numel(), group)
    (loss * 3).backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    expected = (2.0 * tokens).square().mean()
    none = average_over_tokens(torch.tensor(float("nan")), 0, group)
    return {
        "loss": abs(loss.item() - expected.item()),
        # d/dw of 3 w^2 mean(t^2) at w = 2.
        "gradient": abs(weight.grad.item() / world - 3 * 4 * tokens.square().mean().item()),
        "none": none.item(),
    }


def tiny(kind: type = LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    return kind((LlamaConfig if kind is LlamaForCausalLM else MistralConfig)(**(settings | more)))


def whole_batch(tokens: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * tokens).view(2, tokens) * 7 % 32
    return {"input_ids": ids, "position_ids": torch.arange(tokens).expand(2, -1).clone(), "labels": ids}


def own_part(tokens: int = 16) -> dict[str, torch.Tensor]:
    found = shard_batch(whole_batch(tokens), dist.get_rank(), dist.get_world_size())
    found.pop("shift_labels")
    return found


def windows() -> dict[str, Any]:
    """Sliding windows, by a model that is loaded by a name after it was registered; and undone after."""
    world = dist.get_world_size()
    folder = FOLDER / "mistral"
    plain = tiny(MistralForCausalLM, sliding_window=5)
    # Rank 0 saves.
    plain.save_pretrained(folder)
    dist.barrier()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    found = {}
    for kind in ("one", "packed"):
        batch = whole_batch()
        if kind == "packed":
            batch["position_ids"][:, 7:] = torch.arange(9)
        expected = plain(**{**batch, "labels": None}, use_cache=False).logits
        mpu = UlyssesSPAttentionHF.register_with_transformers(str(folder), "sdpa", world)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        model = MistralForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        mine = shard_batch(batch, dist.get_rank(), world)
        mine.pop("shift_labels")
        found[kind] = distance(model(**mine, use_cache=False).logits, expected, 1)
        mpu.unregister()
        mpu.unregister()
        found[f"{kind} undone"] = ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    return found


def evaluating() -> dict[str, Any]:
    """With `disable_in_eval` a rank computes whole sequences alone; and a model that is undone computes as before."""
    model = tiny().eval()
    batch = {name: value for name, value in whole_batch().items() if name != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -3:] = 0
    expected = model(**batch).logits
    with UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", dist.get_world_size(), disable_in_eval=True):
        during = model(**batch).logits
        shared = model.config._attn_implementation
    name = model.config._attn_implementation
    after = model(**batch).logits
    return {
        "during": torch.equal(during, expected),
        "after": torch.equal(after, expected),
        "names": [shared != "sdpa", name == "sdpa", shared in ALL_ATTENTION_FUNCTIONS],
    }


def around() -> dict[str, Any]:
    """More ranks than heads: the ring, through a model."""
    model = tiny(num_attention_heads=1, num_key_value_heads=1)
    batch = {name: value for name, value in whole_batch().items() if name != "labels"}
    expected = model(**batch, use_cache=False).logits
    with UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", dist.get_world_size()):
        return {
            "distance": distance(model(**own_part(), use_cache=False).logits, expected, 1),
            "packed": said(lambda: model(**{**own_part(), "position_ids": own_part()["position_ids"] % 5})),
        }


class Uneven(torch.utils.data.Dataset):
    """Rank 0 has a batch more than the others."""

    def __init__(self, more: int) -> None:
        self.count = 2 + more

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> dict[str, Any]:
        if at >= self.count:
            raise IndexError
        ids = torch.arange(10) + 10 * at + 100 * dist.get_rank()
        return {"input_ids": ids, "position_ids": torch.arange(10), "labels": ids}


def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**torch.utils.data.default_collate(rows), "step": 7}


def batches(group: Any) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    loader = DataLoader(Uneven(int(rank == 0)), collate_fn=collated)
    adapter = UlyssesSPDataLoaderAdapter(loader, rank, group, world, "cpu", pad_token_id=31)
    passes = [[{name: value if name == "step" else value.tolist() for name, value in each.items()} for each in adapter]
              for _ in range(2)]  # fmt: skip
    return {"passes": passes, "length": len(adapter), "batch_size": adapter.batch_size}


class Numbered(torch.utils.data.Dataset):
    """The same on every rank."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {name: value[0] + (at if name == "input_ids" else 0) for name, value in whole_batch(8).items()}


def loaded(group: Any) -> dict[str, Any]:
    """The loader of an engine gives those that share sequences the same samples; the first token tells which."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine, *_ = zeroxide.initialize(
        model=tiny(),
        mesh_param=(1, world),
        training_data=Numbered(),
        config={
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "train_micro_batch_size_per_gpu": 2,
            "zeroxide": {"threads": 1},
        },
    )
    loader = engine.training_dataloader
    try:
        return {
            "samples": [[batch["input_ids"][:, 0].tolist() for batch in loader] for _ in range(2)],
            "adapter": said(lambda: UlyssesSPDataLoaderAdapter(loader, rank, group, world, "cpu")),
        }
    finally:
        dist.barrier()
        engine.destroy()


def said(act: Callable[[], Any]) -> str:
    """The line of the error that it raises."""
    try:
        act()
    except ZeroxideError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(group: Any) -> dict[str, str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    q = torch.randn(2, 4 + (rank == 0), 4, 4)
    odd = torch.randn(2 + (rank == 1), 4, 4, 4)
    share = DistributedAttention(attend, group, 2, 1)
    loader = DataLoader(Uneven(0), sampler=DistributedSampler(Uneven(0), num_replicas=1, rank=0))
    model = tiny()
    register = UlyssesSPAttentionHF.register_with_transformers
    lines = {
        "ranks differ": lambda: share(odd, odd, odd),
        "one rank's shapes": lambda: share(q, q[:, : 4 if rank == 0 else None], q),
        "too few heads": lambda: share(*[torch.randn(2, 4, 1, 4)] * 3),
        "ring lengths": lambda: ring_attention(*[torch.randn(1, 1, 4 + rank, 4)] * 3),
        "groups": lambda: initialize_sequence_parallel(1),
        "does not divide": lambda: initialize_sequence_parallel(3),
        "same samples": lambda: UlyssesSPDataLoaderAdapter(loader, rank, group, world, "cpu"),
        "no pad": lambda: shard_batch(whole_batch(15), rank, world),
        "no positions": lambda: shard_batch({"input_ids": q}, rank, world),
        "eager": lambda: register(model, "eager", world),
        "other core": lambda: register(model, "flash_attention_2", world),
        "no such name": lambda: register(str(FOLDER / "nothing"), "sdpa", world),
        "no model": lambda: register(torch.nn.Linear(1, 1), "sdpa", world),
        "length": lambda: register(model, "sdpa", world, 2, 15, seq_length_is_variable=False),
        "nothing shared": lambda: unused(),
        "mpu without sequences": lambda: zeroxide.initialize(model=tiny(), mpu=object(), config={}),
        "mesh_param": lambda: zeroxide.initialize(model=tiny(), mesh_param=(3, 1), config={}),
        "encoder and decoder": lambda: register(_Encoder(), "sdpa", world),
    }
    found = {name: said(act) for name, act in lines.items()}
    with register(model, "sdpa", world, 2, 16, seq_length_is_variable=False):
        mine = own_part()
        calls = {
            "call without positions": {"input_ids": mine["input_ids"]},
            "4-D mask": {**mine, "attention_mask": torch.ones(2, 1, 16 // world, 16 // world)},
            "other length": own_part(32),
            "registered twice": None,
        }
        for name, given in calls.items():
            act = (lambda: register(model, "sdpa", world)) if given is None else lambda given=given: model(**given)
            found[name] = said(act)
    return found


class _Encoder(torch.nn.Module):
    config = T5Config(num_layers=1)
    set_attn_implementation = None


def unused() -> None:
    """An engine whose model takes parts of sequences for whole ones."""
    engine, *_ = zeroxide.initialize(
        model=tiny(),
        config={
            "sequence_parallel_size": dist.get_world_size(),
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "train_micro_batch_size_per_gpu": 2,
            "zeroxide": {"threads": 1},
        },
    )
    try:
        engine(**own_part())
    finally:
        dist.barrier()
        engine.destroy()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state = initialize_sequence_parallel(dist.get_world_size())
    group = state.sequence_group
    COMMS.enabled = True
    found = {"spread": spread_attention(group)}
    COMMS.enabled = False
    found |= {
        "ring": ring(),
        "weighted": weighted(group),
        "windows": windows(),
        "evaluating": evaluating(),
        "around": around(),
        "batches": batches(group),
        "loaded": loaded(group),
        "refused": refused(group),
    }
    print("FOUND", json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
