"""A job that trains models of Hugging Face on sequences that its ranks share, as the cases in the file named by its
argument say, beside plain PyTorch in one process on whole sequences.

Every rank prints a line "CASE {...}" of JSON for each case. The oracle is made of transformers and torch alone: in fp32
for losses, and in fp64 to tell how far from the truth fp32 is after as many steps.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from training import digest, whole_state
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import zeroxide
from zeroxide.distributed import COMMS
from zeroxide.parallel.sequence import UlyssesSPAttentionHF, average_over_tokens, destroy_sequence_parallel, shard_batch

VOCABULARY, IGNORED = 67, -100
RATE, EPS = 1e-3, 1e-5
"""Large enough an epsilon that gradients which are zero but for rounding move nothing."""


@dataclass(frozen=True)
class Case:
    """One run. `kind` is how sequences look: "plain", "packed", "padded" or "masked"; see `batch`."""

    name: str
    family: str = "llama"
    sp: int = 2
    kind: str = "plain"
    tokens: int = 24
    stage: int = 3
    param: str = "none"
    optimizer: str = "none"
    steps: int = 20
    accumulation: int = 2
    checkpointing: bool = False
    reentrant: bool = False
    first_part: int | None = None
    """Tokens of the first of two ranks; None for equal parts, filled up where they do not divide."""
    clip: float = 0.5
    config: dict[str, Any] = field(default_factory=dict)
    oracle: bool = True
    first: int = 0
    """The first of the steps: what was before is in the checkpoint `load`."""
    load: str | None = None
    save: str | None = None


def build(case: Case) -> nn.Module:
    torch.manual_seed(1)
    if case.family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, resid_pdrop=0,
            embd_pdrop=0, attn_implementation="sdpa",
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa",
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    return model.train()


def batch(case: Case, number: int) -> dict[str, torch.Tensor]:
    """Micro-batch `number`, whole: two sequences. Of the first most tokens have no label, so that a rank has none."""
    generator = torch.Generator().manual_seed(100 + number)
    ids = torch.randint(0, VOCABULARY, (2, case.tokens), generator=generator)
    labels = ids.clone()
    labels[0, : case.tokens * 5 // 8] = IGNORED
    if case.family != "gpt2":
        labels[:, : case.tokens // 4 + 1] = IGNORED
    positions = torch.arange(case.tokens).expand(2, -1).clone()
    found = {"input_ids": ids, "position_ids": positions, "labels": labels}
    if case.kind == "packed":
        for row, ends in enumerate(((5, 11), (case.tokens // 2, case.tokens - 1))):
            for end in ends:
                positions[row, end:] = torch.arange(case.tokens - end)
    if case.kind == "padded":
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][1, -7:] = 0
        labels[1, -7:] = IGNORED
    return found


def part_of(case: Case, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's."""
    place = dist.get_rank() % case.sp
    if case.first_part is None:
        return shard_batch(whole, place, case.sp, pad_token_id=0)
    one = shard_batch(whole, 0, 1)
    cut = slice(None, case.first_part) if place == 0 else slice(case.first_part, None)
    return {name: value[:, cut].contiguous() for name, value in one.items()}


def config_of(case: Case, folder: Path) -> dict[str, Any]:
    def home(device: str) -> dict[str, Any]:
        return {"device": device, **({"nvme_path": str(folder)} if device == "nvme" else {})}

    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage > 0:
        zero["offload_optimizer"] = home(case.optimizer)
    if case.stage == 3:
        zero["offload_param"] = home(case.param)
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "eps": EPS, "weight_decay": 0.1}},
        "zero_optimization": zero,
        "zeroxide": {"threads": 1, "tile_bytes": 16384, "staging_bytes": 1 << 20},
        "steps_per_print": None,
        "gradient_clipping": case.clip,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "sequence_parallel_size": case.sp,
        **case.config,
    }


def oracle(case: Case, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the weights at the end, of one process on whole sequences."""
    model = build(case).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPS, weight_decay=0.1, foreach=False)
    groups = dist.get_world_size() // case.sp
    losses = []
    for step in range(case.first + case.steps):
        found = []
        for number in range(case.accumulation * groups):
            loss = model(**batch(case, step * case.accumulation * groups + number), use_cache=False).loss
            (loss / (case.accumulation * groups)).backward()
            found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(found) / len(found))
    return losses[case.first :], {name: param.detach().double() for name, param in model.named_parameters()}


def train(case: Case, folder: Path) -> dict[str, Any]:
    model = build(case)
    before = model.config._attn_implementation
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.reentrant})
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", case.sp, 2, disable_in_eval=True)
    config = config_of(case, folder)
    engine, *_ = zeroxide.initialize(model=model, mpu=mpu, config=config)
    groups, group = dist.get_world_size() // case.sp, dist.get_rank() // case.sp
    losses: list[float] = []
    if case.load:
        engine.load_checkpoint(folder / case.load)
    COMMS.enabled = True
    COMMS.reset()
    try:
        for step in range(case.first, case.first + case.steps):
            found = []
            for micro in range(case.accumulation):
                number = (step * case.accumulation + micro) * groups + group
                part = part_of(case, batch(case, number))
                targets = part.pop("shift_labels")
                logits = engine(**part, use_cache=False).logits
                own = model.loss_function(
                    logits=logits, labels=None, shift_labels=targets, vocab_size=model.config.vocab_size
                )
                loss = own if mpu is None else average_over_tokens(own, (targets != IGNORED).sum())
                engine.backward(loss)
                engine.step()
                found.append(loss.item())
            mean = torch.tensor(sum(found) / len(found), dtype=torch.float64)
            dist.all_reduce(mean)
            losses.append(mean.item() / dist.get_world_size())
        if case.save:
            engine.save_checkpoint(folder / case.save)
        # What is read below is exchanged as well.
        sent = {name: {str(size): each.count for size, each in sizes.items()} for name, sizes in COMMS.records.items()}
        state = whole_state(engine)
        # The names of units are those of parameters; a tied one has the first of its names.
        weights = {name: parts["weights"] for name, parts in state.items()}
        flat = {f"{name} {part}": value for name, parts in state.items() for part, value in parts.items()}
        return {
            "losses": losses,
            "state": digest(flat),
            "weights": weights,
            "sent": sent,
            "samples": engine.global_samples,
            "train_batch": engine.train_batch_size(),
        }
    finally:
        COMMS.enabled = False
        dist.barrier()
        engine.destroy()
        if mpu is not None:
            mpu.unregister()
        assert model.config._attn_implementation == before
        destroy_sequence_parallel()


def apart(mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest distance of each parameter."""
    return {name: (mine[name].double() - others[name]).abs().max().item() for name in mine}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(os.environ["JOB_FOLDER"])
    dist.init_process_group("gloo")
    known: dict[Any, Any] = {}
    for each in json.loads(Path(sys.argv[1]).read_text()):
        case = Case(**each)
        found = train(case, folder)
        found["name"] = case.name
        weights = found.pop("weights")
        if case.oracle:
            key = (case.family, dist.get_world_size() // case.sp * case.accumulation, case.kind, case.tokens)
            key += (case.first, case.steps)
            if key not in known:
                known[key] = {dtype: oracle(case, dtype) for dtype in (torch.float32, torch.float64)}
            (plain, fp32), (_, truth) = (known[key][dtype] for dtype in (torch.float32, torch.float64))
            found |= {"plain": plain, "off": apart(weights, truth), "plain_off": apart(fp32, truth)}
            found["moved"] = apart(dict(build(case).named_parameters()), truth)
        print("CASE", json.dumps(found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
