"""Lightning's own strategy for DeepSpeed, over zeroxide under that name, and what became of each of its runs, as JSON.

`lightning_deepspeed_program.py FOLDER CASES`; a case is [name, arguments of the strategy or null, what else]. The
strategy refuses to run without a GPU: that one check is left out here, and nothing else of it is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from lightning_model import Model, loader, trainer

FOLDER = Path(sys.argv[1])
torch.set_num_threads(1)


class OnCpu(DeepSpeedStrategy):
    """As it is, without the check for a GPU."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        # What it checks first is the numbers of GPUs.
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def run(name: str, asked: dict[str, Any] | None, more: list[str]) -> dict[str, Any]:
    ranks = 2 if "two ranks" in more else 1
    resumed = next((each.removeprefix("resume ") for each in more if each.startswith("resume ")), None)
    kept = ModelCheckpoint(FOLDER / name, filename="{epoch}", save_top_k=-1, monitor="val")
    model = Model(late="late" in more)
    run = trainer(
        "ddp" if asked is None else OnCpu(**asked),
        devices=ranks,
        max_epochs=2,
        gradient_clip_val=0.3,
        callbacks=[kept, LearningRateMonitor("step")],
        enable_checkpointing=True,
        logger=CSVLogger(FOLDER / f"{name}-log"),
    )
    run.fit(model, loader(ranks), loader(ranks), ckpt_path=str(FOLDER / resumed / "epoch=0.ckpt") if resumed else None)
    found: dict[str, Any] = {
        "losses": model.losses,
        "rates": model.rates,
        "steps": run.global_step,
        "engine": None if asked is None else type(run.strategy.deepspeed_engine).__module__,
    }
    if asked is None:
        torch.save(model.state_dict(), FOLDER / f"{name}.pt")
    elif run.is_global_zero:
        convert_zero_checkpoint_to_fp32_state_dict(FOLDER / name / "epoch=1.ckpt", FOLDER / f"{name}.ckpt")
    run.strategy.barrier()
    found["score"] = kept.best_model_score.item()
    # Another engine takes the model over.
    found["validation"] = run.validate(model, loader(ranks), verbose=False)[0]["val"]
    return found


def main() -> None:
    assert deepspeed.__version__.endswith("+zeroxide")
    results = {name: run(name, asked, more) for name, asked, more in json.loads(sys.argv[2])}
    if torch.distributed.get_rank() == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))


main()
