"""A small GPT on the bytes of a text, with Lightning: `python examples/lightning_gpt.py --strategy zeroxide_stage_3`.

`--devices 2` starts a second rank; under torchrun or SLURM Lightning finds its ranks by itself. `--resume FOLDER` goes
on from a checkpoint, at any number of devices.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import zeroxide.integrations.lightning  # noqa: F401  registers the strategies


class Pieces(Dataset):
    """Pieces of a text, as numbers of bytes, with the byte that follows each."""

    def __init__(self, text: bytes, length: int) -> None:
        self.bytes, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8), length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, at: int) -> torch.Tensor:
        return self.bytes[at * self.length : (at + 1) * self.length + 1].long()


class Gpt(pl.LightningModule):
    def __init__(self, width: int, layers: int, length: int, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks = None

    def configure_model(self) -> None:
        # Lightning calls this inside the strategy's context, where stage 3 builds the model in slices.
        if self.blocks is None:
            width, length = self.hparams.width, self.hparams.length
            self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, batch_first=True, norm_first=True)
                for _ in range(self.hparams.layers)
            )
            self.head = nn.Linear(width, 256)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        given, following = batch[:, :-1], batch[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1], device=given.device)
        hidden = self.tokens(given) + self.places.weight[: given.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask.to(hidden.dtype), is_causal=True)
        return cross_entropy(self.head(hidden).flatten(0, 1), following.flatten())

    def training_step(self, batch: torch.Tensor, at: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: torch.Tensor, at: int) -> None:
        self.log("validation", self.loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="zeroxide_stage_3_offload")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--text", type=Path, help="a text file; Python's own documentation if none is given")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning_gpt"))
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    pl.seed_everything(0)
    text = args.text.read_bytes() if args.text else "\n".join(topics.values()).encode()
    pieces = Pieces(text, args.length)
    held_out = torch.utils.data.Subset(pieces, range(0, len(pieces), max(2, len(pieces) // 32)))
    trainer = pl.Trainer(
        strategy=args.strategy,
        precision=args.precision,
        devices=args.devices,
        max_steps=args.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=args.out,
        callbacks=[pl.callbacks.ModelCheckpoint(args.out, every_n_train_steps=max(1, args.steps // 2), save_top_k=-1)],
    )
    model = Gpt(args.width, args.layers, args.length, rate=1e-3)
    loader = DataLoader(pieces, batch_size=8, shuffle=True, drop_last=True)
    trainer.fit(model, loader, DataLoader(held_out, batch_size=8), ckpt_path=args.resume)
    trainer.validate(model, DataLoader(held_out, batch_size=8))
    # One file, which `Gpt.load_from_checkpoint` and every strategy reads.
    trainer.save_checkpoint(args.out / "weights.ckpt", weights_only=True)


if __name__ == "__main__":
    main()
