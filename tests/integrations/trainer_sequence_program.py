"""Hugging Face's Trainer whose two ranks share sequences through DeepSpeed's names, or in one process without it.

`trainer_sequence_program.py FOLDER`: writes the losses that it logs. Two ranks take from the loader two batches at a
time and train on each in turn; one process takes them one by one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate_sequence_program import CONFIG, SAMPLES, sample
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

FOLDER, SHARED = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
ZEROXIDE = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-5}},
}


class InOrder(Trainer):
    """Batches in the order of the samples."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def sharing() -> dict[str, Any]:
    if SHARED == 1:
        return {}
    from accelerate.utils import ParallelismConfig
    from accelerate.utils.dataclasses import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    config = ParallelismConfig(sp_backend="deepspeed", sp_size=SHARED, sp_handler=handler)
    return {"parallelism_config": config, "deepspeed": ZEROXIDE}


def main() -> None:
    args = TrainingArguments(
        output_dir=str(FOLDER / "trainer"), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3,
        adam_epsilon=1e-5, lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", max_grad_norm=1.0, disable_tqdm=True, **sharing(),
    )  # fmt: skip
    set_seed(0)
    trainer = InOrder(model=LlamaForCausalLM(CONFIG), args=args, train_dataset=[sample(at) for at in range(SAMPLES)])
    trainer.train()
    if args.process_index == 0:
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        (FOLDER / f"trainer{SHARED}.json").write_text(json.dumps(losses))


main()
