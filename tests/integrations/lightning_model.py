"""A LightningModule as one would write it, and data for it; and quiet Trainers. All deterministic."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def network() -> nn.Module:
    """A language model of one block whose head is its embedding."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 32, bias=False))
    body[3].weight = nn.Parameter(body[3].weight.detach().clone())
    return body


class Model(pl.LightningModule):
    """late: whether the network is built in `configure_model`, as large ones are."""

    def __init__(self, late: bool = False, rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = None if late else network()
        self.losses: list[float] = []
        self.rates: list[float] = []

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()

    def loss(self, batch: Any) -> torch.Tensor:
        (tokens,) = batch
        return cross_entropy(self.net(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Any, at: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        self.losses.append(self.trainer.strategy.reduce(loss.detach().clone()).item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Any, at: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, at: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, at: int) -> torch.Tensor:
        return self.net(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(ranks: int = 1, samples: int = 40) -> DataLoader[Any]:
    """Batches of eight sequences over all ranks."""
    data = torch.randint(0, 32, (samples, 6), generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(data), batch_size=8 // ranks)


def trainer(strategy: Any, **more: Any) -> pl.Trainer:
    return pl.Trainer(**{**QUIET, "devices": 1, "max_epochs": 1, "strategy": strategy, **more})
