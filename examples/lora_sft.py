"""Fine-tunes a language model with TRL's SFTTrainer and a LoRA adapter of PEFT's: from a function's heading to what it
does, in the words of its docstring.

    zeroxide run examples/lora_sft.py --model runs/pretrain/model --deepspeed examples/ds_config_zero3_cpu.json
    zeroxide run --ranks 2 examples/lora_sft.py --model runs/pretrain/model --deepspeed ...

OUT/adapter is the adapter alone; it names the folder of its model, and examples/generate.py and serve.py put the two
together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from texts import PACKAGES, documented, first_sentence
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/pretrain/model", help="a folder, or a name of the hub's")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="packages of the standard library")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/lora_sft"))
    args = parser.parse_args()
    set_seed(0)
    # Before the model: with a config of stage 3, `from_pretrained` then gives each rank its part of the weights only.
    arguments = SFTConfig(
        str(args.out),
        deepspeed=args.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.bf16,
        max_length=args.length,
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=args.rate,
        lr_scheduler_type="cosine",
        logging_steps=max(1, args.steps // 20),
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=args.steps,
        save_strategy="no",
        # Only what is asked for is learned, not the question.
        completion_only_loss=True,
        seed=0,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = {
        each.heading: f'\n    """{first_sentence(each.docstring)}"""'
        for package in args.packages
        for each in documented(package)
    }
    data = Dataset.from_dict({"prompt": list(pairs), "completion": list(pairs.values())})
    data = data.train_test_split(test_size=32, seed=0)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model(str(args.out / "adapter"))
    if trainer.is_world_process_zero():
        losses = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
        print(f"held-out loss: {losses[0]:.6f} before, {losses[-1]:.6f} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
