"""A loop for Accelerate as one would write it for `accelerate launch`, and what became of it, as JSON.

`accelerate_program.py FOLDER STEPS [resume]`. Whether DeepSpeed is used, and how, is in the launcher's variables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import set_seed
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

FOLDER, STEPS = Path(sys.argv[1]), int(sys.argv[2])
CONFIG = GPT2Config(
    vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)


def asked_alone(model) -> dict:
    """What one rank finds in a state dict that the others do not ask for."""
    names = model.state_dict()
    weight, problems = names["transformer.wte.weight"], []
    for use in (weight.cpu, weight.tolist, lambda: torch.save(weight, FOLDER / "x"), lambda: weight.sum().item()):
        try:
            use()
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    halves = [list(each.shape) for each in weight.chunk(2)]
    return {"shapes": {name: list(each.shape) for name, each in names.items()}, "problems": problems, "halves": halves}


def main() -> None:
    # Without a GPU accelerate takes every rank for the only one, unless it has been told that the CPU is meant.
    PartialState(cpu=True)
    accelerator = Accelerator()
    set_seed(0)
    model = GPT2LMHeadModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 12)
    data = [{"input_ids": (at + 7 * torch.arange(16)) % 64} for at in range(48)]
    loader = torch.utils.data.DataLoader(data, batch_size=4 // accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if "resume" in sys.argv:
        accelerator.load_state(str(FOLDER / "state"))
    found: dict = {"losses": [], "norms": [], "rates": [], "ranks": accelerator.num_processes}
    found["kind"] = type(model).__module__
    for step, batch in enumerate(loader):
        if step >= STEPS:
            break
        with accelerator.accumulate(model):
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0) if accelerator.sync_gradients else None
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found["losses"].append(float(accelerator.reduce(loss.detach(), "mean")))
        found["norms"].append(None if norm is None else float(norm))
        found["rates"].append(schedule.get_last_lr()[0])
    accelerator.save_state(str(FOLDER / "state"))
    whole = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        FOLDER / "model", state_dict=whole, is_main_process=accelerator.is_main_process
    )
    if accelerator.process_index == 1 and found["kind"].startswith("zeroxide"):
        (FOLDER / "alone.json").write_text(json.dumps(asked_alone(accelerator.unwrap_model(model))))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (FOLDER / "results.json").write_text(json.dumps(found))
    accelerator.end_training()


main()
