"""Checkpoints of others: their formats by name, so that whoever finds one where ours should be can say so."""

from __future__ import annotations

from pathlib import Path

__all__ = ["foreign_format"]


def foreign_format(directory: Path) -> str | None:
    """What a directory holds that is not ours, and what to do with it, as the rest of a sentence; None if unknown.

    Looked for by file names alone: nothing is read.
    """
    if not directory.is_dir():
        return None
    if (directory / ".metadata").is_file() or next(directory.glob("*.distcp"), None) is not None:
        return (
            "is a checkpoint of torch.distributed.checkpoint, as FSDP2 saves: make a state dict of it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save and give that to engine.load_module_state_dict"
        )
    if (directory / "zero").is_dir() and not any(directory.glob("*_optim_states.pt")):
        return "is a universal checkpoint of DeepSpeed: zeroxide convert makes one of zeroxide's from it"
    if any(directory.glob("*_optim_states.pt")):
        return "is a checkpoint of DeepSpeed: zeroxide convert makes one of zeroxide's from it"
    return None
