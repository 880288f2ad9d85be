"""What becomes of the parameters when their engine ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from zeroxide import _core
from zeroxide.errors import ModelError
from zeroxide.zero.messages import Messages
from zeroxide.zero.unit import Unit

__all__ = ["end_core", "part_from"]

logger = logging.getLogger("zeroxide")


def part_from(module: nn.Module, units: list[Unit], *, params_always_full: bool) -> list[Unit]:
    """Takes the parameters out of the engine, whose memory is still there.

    Where they show their values at all times, they keep them, in memory of their own. Where they do not, the model may
    be larger than memory: they end empty, and their modules raise ModelError when they run, are saved or loaded into.

    Returns the units of which somebody has kept views.
    """
    try:
        if params_always_full:
            for unit in units:
                unit.hand_over()
    finally:
        # Nothing may be left over memory that goes now.
        for unit in units:
            unit.hide()
            if not params_always_full:
                unit.memory.drop()
    if not params_always_full:
        for each in module.modules():
            if each._parameters:
                each.register_forward_pre_hook(_refuse)
                each.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
                each.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
    return [unit for unit in units if not params_always_full and unit.has_readers()]


def end_core(core: _core.Offload, messages: Messages, readers: Sequence[Unit] = ()) -> None:
    """Ends the core, after the messages that read and write its memory.

    readers: units of which somebody has kept views.
    """
    messages.close()
    if readers:
        names = ", ".join(unit.name for unit in readers[:3]) + (", ..." if len(readers) > 3 else "")
        logger.warning("views of weights of %s outlive their engine: what is not in memory now reads as NaN", names)
    core.close([unit.index for unit in readers])


def _refuse(module: nn.Module, *_: Any) -> None:
    raise ModelError(
        f"{type(module).__name__} lost its weights when its engine was destroyed: at stage 3 they are the engine's. "
        "Take engine.module_state_dict() or save before, and build the model again"
    )
