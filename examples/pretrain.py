"""Pretrains a small Llama or GPT-2 on text files, from random weights and with a tokenizer of its own.

    python examples/pretrain.py
    torchrun --nproc-per-node 2 examples/pretrain.py --offload nvme:/scratch

Started again it goes on from its last checkpoint, at any number of ranks. OUT/model is a folder for transformers:
examples/finetune_trainer.py, lora_sft.py, generate.py and serve.py take it from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from own_models import config_of
from texts import LIBRARY, files
from tokens import make_tokenizer
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import zeroxide


class Pieces(Dataset):
    """Pieces of one long row of tokens."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> torch.Tensor:
        return self.rows[at]


def order_of(step: int, pieces: Pieces, batch: int, rank: int, ranks: int) -> list[int]:
    """Which pieces are this rank's at a step. They depend on the step alone, so that a run that goes on sees what it
    would have seen."""
    each_pass = len(pieces) // (batch * ranks)
    if each_pass == 0:
        raise SystemExit(f"the text has {len(pieces)} pieces, and a step takes {batch * ranks}")
    turn, at = divmod(step, each_pass)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(turn))
    return order[(at * ranks + rank) * batch :][:batch].tolist()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, default=LIBRARY, help="a folder of texts; Python's standard library")
    parser.add_argument("--ending", default=".py", help="how the names of the text files end")
    parser.add_argument("--family", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="pieces at a step, on each rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--offload", default="cpu", help='"none", "cpu" or "nvme:DIRECTORY"')
    parser.add_argument("--host-memory", help='a budget for the whole process, such as "4GiB"')
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.manual_seed(0)
    zeroxide.init_distributed()
    texts = files(args.text, args.ending)
    if torch.distributed.get_rank() == 0 and not (args.out / "model/tokenizer.json").exists():
        make_tokenizer(texts, args.vocabulary, "gpt").save_pretrained(args.out / "model")
    torch.distributed.barrier()
    tokenizer = AutoTokenizer.from_pretrained(args.out / "model")
    rows = [torch.tensor([*tokenizer(each)["input_ids"], tokenizer.eos_token_id]) for each in texts]
    pieces = Pieces(torch.cat(rows), args.length)

    # Inside Init the model is never whole in memory, so that it may be larger than that.
    with zeroxide.zero.Init():
        config = config_of(args.family, tokenizer, args.width, args.layers, args.length)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    engine, *_ = zeroxide.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": args.batch,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"lr": args.rate, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"warmup_num_steps": max(2, args.steps // 20), "total_num_steps": args.steps},
            },
        },
        offload=args.offload,
        host_memory=args.host_memory,
    )
    engine.load_checkpoint(args.out / "checkpoints")
    rank, ranks = engine.global_rank, engine.world_size
    for step in range(engine.global_steps, args.steps):
        chosen = order_of(step, pieces, args.batch, rank, ranks)
        batch = torch.stack([pieces[at] for at in chosen]).to(engine.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        if rank == 0:
            print(f"step {engine.global_steps} loss {loss.item():.6f}", flush=True)
        if engine.global_steps % args.save_every == 0 or engine.global_steps == args.steps:
            engine.save_checkpoint(args.out / "checkpoints")
    engine.save_16bit_model(args.out / "model")
    if rank == 0:
        model.config.save_pretrained(args.out / "model")
    engine.destroy()


if __name__ == "__main__":
    main()
