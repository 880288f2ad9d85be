"""A loop for Accelerate whose two ranks share sequences through DeepSpeed's names, and the same loop in one process.

`accelerate_sequence_program.py FOLDER`. The losses of every step, and the weights at the end, as JSON and safetensors.
Two ranks take from the loader two batches at a time and train on each in turn; one process takes them one by one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed.nn
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import ParallelismConfig, set_seed
from accelerate.utils.dataclasses import DeepSpeedSequenceParallelConfig
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER, SHARED = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
TOKENS, SAMPLES = 16, 24
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    max_position_embeddings=TOKENS,
    attn_implementation="sdpa",
)


def sample(at: int) -> dict[str, torch.Tensor]:
    ids = (at * 5 + 7 * torch.arange(TOKENS)) % 64
    labels = torch.where(torch.arange(TOKENS) < at % 11, -100, ids)
    positions = torch.arange(TOKENS)
    if at % 3 == 0:
        positions[5:] = torch.arange(TOKENS - 5)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def plain() -> tuple[list[float], LlamaForCausalLM]:
    model = LlamaForCausalLM(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    for batch in DataLoader([sample(at) for at in range(SAMPLES)], batch_size=2):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def shared() -> tuple[list[float], int, dict[str, torch.Tensor], Accelerator]:
    PartialState(cpu=True)
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length=TOKENS, sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    config = ParallelismConfig(sp_backend="deepspeed", sp_size=SHARED, sp_handler=handler)
    accelerator = Accelerator(parallelism_config=config)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    loader = DataLoader([sample(at) for at in range(SAMPLES)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    from deepspeed.utils import groups

    group = groups._get_sequence_parallel_group()
    losses = []
    model.train()
    for batch in loader:
        targets = batch["shift_labels"]
        logits = model(**batch).logits
        loss = accelerator.unwrap_model(model).loss_function(
            logits=logits, labels=None, shift_labels=targets, vocab_size=64
        )
        # As the documentation of accelerate has it.
        every = torch.distributed.nn.functional.all_gather(loss, group=group)
        counts = torch.distributed.nn.functional.all_gather((targets != -100).sum(), group=group)
        total = sum(each * count for each, count in zip(every, counts, strict=True) if count > 0)
        loss = total / max(sum(counts), 1)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, len(loader), accelerator.get_state_dict(model), accelerator


def main() -> None:
    set_seed(0)
    if SHARED == 1:
        losses, model = plain()
        torch.save({"losses": losses, "weights": model.state_dict()}, FOLDER / "plain.pt")
        return
    losses, length, weights, accelerator = shared()
    if accelerator.is_main_process:
        (FOLDER / "results.json").write_text(json.dumps({"losses": losses, "length": length}))
        torch.save(weights, FOLDER / "weights.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
