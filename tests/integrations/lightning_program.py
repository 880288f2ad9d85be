"""A script for Lightning's Trainer as one would write it, and what became of each of its runs, as JSON.

`lightning_program.py FOLDER CASES`; a case is [name, strategy, what else]. Lightning starts its second rank itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_model import Model, loader, trainer

from zeroxide.integrations.lightning import ZeroxideStrategy

FOLDER = Path(sys.argv[1])
torch.set_num_threads(1)


def strategy_for(name: str) -> Any:
    if name == "nvme":
        return ZeroxideStrategy(stage=3, offload=f"nvme:{FOLDER / 'nvme'}", host_memory="4GiB")
    if name == "config":
        zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        return ZeroxideStrategy(config={"zero_optimization": zero, "gradient_clipping": 0.3, "train_batch_size": 16})
    return name


def run(name: str, strategy: str, more: list[str]) -> dict[str, Any]:
    ranks = 2 if "two ranks" in more else 1
    resumed = next((each.removeprefix("resume ") for each in more if each.startswith("resume ")), None)
    kept = ModelCheckpoint(FOLDER / name, filename="{epoch}", save_top_k=-1, save_last="link")
    single = ModelCheckpoint(FOLDER / name, filename="weights-{step}", save_weights_only=True, every_n_train_steps=3)
    model = Model(late="late" in more)
    run = trainer(
        strategy_for(strategy),
        devices=ranks,
        max_epochs=3,
        # Five batches an epoch: its last step is of one.
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        callbacks=[kept, single, LearningRateMonitor("step")],
        enable_checkpointing=True,
        logger=CSVLogger(FOLDER / f"{name}-log"),
    )
    run.fit(model, loader(ranks), loader(ranks), ckpt_path=str(FOLDER / resumed / "epoch=0.ckpt") if resumed else None)
    weights = run.strategy.lightning_module_state_dict()
    if run.is_global_zero:
        torch.save(weights, FOLDER / f"{name}.pt")
    found = {
        "losses": model.losses,
        "rates": model.rates,
        "steps": run.global_step,
        "validation": run.validate(model, loader(ranks), verbose=False)[0]["val"],
        "test": run.test(model, loader(ranks), ckpt_path=str(FOLDER / name / "epoch=1.ckpt"), verbose=False)[0]["test"],
        "predicted": torch.cat(run.predict(model, loader(ranks))).tolist(),
        "best": kept.best_model_path,
    }
    run.strategy.barrier()
    return found


def main() -> None:
    results = {name: run(name, strategy, more) for name, strategy, more in json.loads(sys.argv[2])}
    if torch.distributed.get_rank() == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))


main()
