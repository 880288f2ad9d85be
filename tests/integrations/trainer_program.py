"""A script for Trainer as one would write it for DeepSpeed, and what became of each of its runs, as JSON.

`trainer_program.py FOLDER CASES`; a case is [name, stage or null, home, what else]. null is Trainer by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

FOLDER = Path(sys.argv[1])
CONFIG = GPT2Config(
    vocab_size=64,
    n_positions=16,
    n_embd=32,
    n_layer=2,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)


class Sentences(torch.utils.data.Dataset):
    """Sixteen tokens each, of which every one follows from the one before."""

    def __len__(self):
        return 48

    def __getitem__(self, at):
        tokens = (at + 7 * torch.arange(16)) % 64
        return {"input_ids": tokens, "labels": tokens}


class Generation(TrainerCallback):
    """Writes a few tokens between steps, as users do to see how training goes."""

    def __init__(self):
        self.written = []

    def on_step_end(self, args, state, control, model=None, **more):
        model.eval()
        tokens = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        self.written.append(tokens[0].tolist())
        model.train()


def deepspeed_config(stage: int, home: str) -> dict:
    """As the documentation of transformers has it, with "auto" wherever that may stand."""
    zero: dict = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    place = {"device": home, **({"nvme_path": str(FOLDER / "nvme")} if home == "nvme" else {"pin_memory": True})}
    if home != "none":
        zero["offload_optimizer"] = place
    if stage == 3:
        zero |= {
            "sub_group_size": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if home != "none":
            zero["offload_param"] = place
    return {
        "zero_optimization": zero,
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def arguments(out: Path, given: dict | None, more: list[str]) -> TrainingArguments:
    world = 2 if "two ranks" in more else 1
    return TrainingArguments(
        str(out),
        deepspeed=given,
        use_cpu=True,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-3,
        warmup_steps=2,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end="best" in more,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        bf16="bf16" in more,
        fp16="fp16" in more,
    )


def run(name: str, stage: int | None, home: str, more: list[str]) -> dict:
    given = None if stage is None else deepspeed_config(stage, home)
    if given is not None and "optimizer in the config" in more:
        given["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        }
        given["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        }
    resumed = next((each.removeprefix("resume ") for each in more if each.startswith("resume ")), None)
    out = FOLDER / (resumed or name)
    args = arguments(out, given, more)
    set_seed(0)
    if "from_pretrained" in more:
        # Under ZeRO-3 each rank has its part of the weights, from here on.
        model = GPT2LMHeadModel.from_pretrained(FOLDER / "pretrained")
        assert (model.lm_head.weight.numel() == 0) == (stage == 3)
    else:
        model = GPT2LMHeadModel(CONFIG)
    if name == "plain":
        model.save_pretrained(FOLDER / "begun-model")
    if "resized" in more:
        model.resize_token_embeddings(72, mean_resizing=False)
    callback = Generation() if "generation" in more else None
    optimizers = (None, None)
    if "deepspeed's rates" in more:
        # WarmupDecayLR by its formula: step k has the rate of iteration k - 1, after 2 of warm-up it falls until 6.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        factors = [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
        optimizers = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
    trainer = Trainer(
        optimizers=optimizers,
        model=model,
        args=args,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[callback] if callback else None,
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-3") if resumed else None)
    trainer.save_model(str(FOLDER / f"{name}-model"))
    history = trainer.state.log_history
    found = {
        "losses": [each["loss"] for each in history if "loss" in each],
        "norms": [each["grad_norm"] for each in history if "grad_norm" in each],
        "rates": [each["learning_rate"] for each in history if "learning_rate" in each],
        "evaluations": [each["eval_loss"] for each in history if "eval_loss" in each],
        "best": trainer.state.best_model_checkpoint,
        "checkpoint": sorted(each.name for each in (out / "checkpoint-6").iterdir()),
        "written": callback.written if callback else None,
        "engine": type(trainer.model_wrapped).__module__ if stage is not None else None,
    }
    if stage is not None:
        trainer.accelerator.deepspeed_engine_wrapped.engine.destroy()
        trainer.accelerator.deepspeed_engine_wrapped = None
    del trainer, model
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def main() -> None:
    assert deepspeed.__version__.endswith("+zeroxide")
    results = {}
    for name, stage, home, more in json.loads(sys.argv[2]):
        results[name] = run(name, stage, home, more)
    if deepspeed.comm.get_rank() == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))


main()
