"""Train GPT-2 with Hugging Face's Trainer and a DeepSpeed config, or with a loop over the same engine.

The same script on both sides: `deepspeed` is DeepSpeed under the peers' interpreter, and zeroxide where
ZEROXIDE_AS_DEEPSPEED is set. One argument: a JSON object

    {"model": "124m", "rows": 1, "columns": 128, "steps": 20, "stage": 3, "offload": "nvme" | "cpu" | "none",
     "directory": scratch files, "weights": a folder of save_pretrained, "how": "trainer" | "loop" | "alone",
     "settings": "lean" | "defaults", "threads": 2}

"alone" is Trainer without a config, in bf16 by autocast, or in fp32 where "bf16" is false.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any


def settings_of(spec: dict[str, Any]) -> dict[str, Any] | None:
    """The DeepSpeed config of the run, None for Trainer alone."""
    import deepspeed_step
    import gpt2

    if spec["how"] == "alone":
        return None
    sizes = gpt2.model_config(spec["model"])
    settings = deepspeed_step.configuration(spec, largest=sizes.vocab_size * sizes.n_embd)
    settings["zero_optimization"]["stage"] = spec["stage"]
    if spec["stage"] < 3:
        settings["zero_optimization"].pop("offload_param", None)
    return settings


def loop(spec: dict[str, Any], model: Any, settings: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """Steps by hand: when each began, and the losses."""
    import deepspeed
    import gpt2

    begun, losses = [], []
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    for step in range(spec["steps"]):
        begun.append(time.perf_counter())
        loss = engine(**gpt2.batch(spec["model"], spec["rows"], spec["columns"], step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return begun, losses


def trainer(spec: dict[str, Any], model: Any, arguments: Any) -> tuple[list[float], list[float]]:
    """Trainer's steps: when each began, and the losses that it logs. A step may go on under the next forward."""
    import gpt2
    import torch
    from transformers import Trainer, TrainerCallback

    begun: list[float] = []
    losses: list[float] = []

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return spec["steps"] * spec["rows"]

        def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
            found = gpt2.batch(spec["model"], 1, spec["columns"], at)
            return {name: values[0] for name, values in found.items()}

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            begun.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    Trainer(model=model, args=arguments, train_dataset=Batches(), callbacks=[Clock()]).train()
    return begun, losses


def main() -> None:
    spec = json.loads(sys.argv[1])
    started = time.perf_counter()
    if os.environ.get("ZEROXIDE_AS_DEEPSPEED"):
        # An installed wheel sees the variable itself; here zeroxide may be no more than a folder on the path.
        import zeroxide.integrations.deepspeed  # noqa: F401

    import deepspeed_step
    import process
    import torch
    from transformers import GPT2LMHeadModel, TrainingArguments

    deepspeed_step.one_process_world()
    torch.set_num_threads(spec["threads"])
    settings = settings_of(spec)
    arguments = TrainingArguments(
        spec["directory"],
        deepspeed=settings,
        use_cpu=True,
        bf16=spec.get("bf16", True),
        per_device_train_batch_size=spec["rows"],
        max_steps=spec["steps"],
        learning_rate=1e-4,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    model = GPT2LMHeadModel.from_pretrained(spec["weights"], dtype=torch.float32)
    built = process.memory()
    begun, losses = loop(spec, model, settings) if spec["how"] == "loop" else trainer(spec, model, arguments)
    begun.append(time.perf_counter())
    process.emit(
        {
            "seconds": [after - before for before, after in itertools.pairwise(begun)],
            "first_step_after": begun[1] - started,
            "losses": losses,
            "memory": {"built": built, "end": process.memory()},
        }
    )


if __name__ == "__main__":
    main()
