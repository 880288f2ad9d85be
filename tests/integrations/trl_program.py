"""Scripts for TRL as one would write them for DeepSpeed, and what became of each of their runs, as JSON.

`trl_program.py FOLDER CASES`; a case is [name, trainer, stage or null, home, what else]. null is TRL by itself: those
cases come first, as accelerate keeps in the environment that DeepSpeed was asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

FOLDER = Path(sys.argv[1])
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
KINDS = {
    "sft": (SFTTrainer, SFTConfig, {"max_length": 16}),
    "dpo": (DPOTrainer, DPOConfig, {"max_length": 32}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 4, "max_completion_length": 6, "beta": 0.04}),
}
SEEN = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "reward", "kl", "completions/mean_length")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


def sentence(first: int, words: int) -> str:
    return " ".join(f"w{(first + 7 * at) % 60}" for at in range(words))


def data(kind: str) -> Dataset:
    if kind == "sft":
        return Dataset.from_dict({"text": [sentence(at, 8) for at in range(64)]})
    prompts = {"prompt": [sentence(at, 4) for at in range(64)]}
    if kind == "dpo":
        prompts["chosen"] = [" " + sentence(at + 28, 4) for at in range(64)]
        prompts["rejected"] = [" " + sentence(at + 3, 4) for at in range(64)]
    return Dataset.from_dict(prompts)


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def deepspeed_config(stage: int, home: str) -> dict:
    zero: dict = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    place = {"device": home, **({"nvme_path": str(FOLDER / "nvme")} if home == "nvme" else {})}
    if home != "none":
        zero["offload_optimizer"] = place
        if stage == 3:
            zero["offload_param"] = place
    return {
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }


def run(name: str, kind: str, stage: int | None, home: str, more: list[str]) -> dict:
    trainer_class, config_class, options = KINDS[kind]
    world = 2 if "two ranks" in more else 1
    args = config_class(
        output_dir=str(FOLDER / name),
        deepspeed=None if stage is None else deepspeed_config(stage, home),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        gradient_checkpointing="checkpointing" in more,
        **options,
    )
    peft = None
    if "lora" in more:
        kept = ["lm_head"] if "modules_to_save" in more else None
        peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=kept)
    set_seed(0)
    trainer = trainer_class(
        model=LlamaForCausalLM.from_pretrained(FOLDER / "begun", dtype="float32"),
        args=args,
        train_dataset=data(kind),
        processing_class=tokenizer(),
        peft_config=peft,
        **({"reward_funcs": reward} if kind == "grpo" else {}),
    )
    trainer.train()
    trainer.save_model(str(FOLDER / f"{name}-model"))
    trainer.accelerator.wait_for_everyone()
    history = trainer.state.log_history
    found: dict = {key: values for key in SEEN if (values := [each[key] for each in history if key in each])}
    found["checkpoint"] = sorted(each.name for each in (FOLDER / name / "checkpoint-4").iterdir())
    if stage is not None:
        found["engine"] = type(trainer.model_wrapped).__module__
        trainer.accelerator.deepspeed_engine_wrapped.engine.destroy()
        trainer.accelerator.deepspeed_engine_wrapped = None
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def main() -> None:
    assert deepspeed.__version__.endswith("+zeroxide")
    results = {name: run(name, kind, stage, home, more) for name, kind, stage, home, more in json.loads(sys.argv[2])}
    if deepspeed.comm.get_rank() == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))


main()
