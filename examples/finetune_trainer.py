"""Full fine-tuning of a causal language model with Hugging Face's Trainer and a DeepSpeed config.

    zeroxide run examples/finetune_trainer.py --model runs/pretrain/model --deepspeed examples/ds_config_zero3_nvme.json
    zeroxide run --ranks 2 examples/finetune_trainer.py --model runs/pretrain/model --deepspeed ...

Without --deepspeed it is Trainer alone. The text is Python's documentation, or --text FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator


def pieces_of(texts: list[str], tokenizer: AutoTokenizer, length: int) -> Dataset:
    """All texts as one row of tokens, cut into pieces of the same length."""
    ids = [token for each in texts for token in (*tokenizer(each)["input_ids"], tokenizer.eos_token_id)]
    pieces = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": pieces, "labels": pieces})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/pretrain/model", help="a folder, or a name of the hub's")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--text", type=Path, help="a text file; Python's documentation if none is given")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="pieces at a step, on each rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_trainer"))
    args = parser.parse_args()

    # Before the model: with a config of stage 3, `from_pretrained` then gives each rank its part of the weights only.
    arguments = TrainingArguments(
        str(args.out),
        deepspeed=args.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.bf16,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=args.rate,
        warmup_steps=args.steps // 10,
        lr_scheduler_type="cosine",
        logging_steps=max(1, args.steps // 20),
        # The first evaluation comes with the engine that trains: `evaluate()` before `train()` would make another one.
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 2),
        save_steps=max(1, args.steps // 2),
        save_total_limit=2,
        seed=0,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Trainer computes in fp32, or under bf16 in bf16 with exact weights beside it, whatever the file's dtype is.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    texts = [args.text.read_text()] if args.text else [topics[each] for each in sorted(topics)]
    parts = pieces_of(texts, tokenizer, args.length).train_test_split(test_size=32, seed=0)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    # Whole weights and the tokenizer, as one folder for transformers.
    trainer.save_model(str(args.out / "model"))
    if trainer.is_world_process_zero():
        losses = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
        print(f"held-out loss: {losses[0]:.6f} before, {losses[-1]:.6f} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
