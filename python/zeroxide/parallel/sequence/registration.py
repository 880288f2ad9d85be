"""Which models of Hugging Face can share their sequences among ranks, and how their attention is replaced.

A model that is at hand gets an attention implementation of its own name, so that no other model sees it. Where only a
name is known, the implementation of that name is another one for all models, until it is undone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from zeroxide.distributed import first_line
from zeroxide.errors import ConfigError, ModelError
from zeroxide.parallel.sequence.parallel_state import SequenceParallelState

if TYPE_CHECKING:
    from zeroxide.parallel.sequence.huggingface import UlyssesSPAttentionHF

__all__ = ["Registration", "add", "check_model", "config_of", "heads_of", "replace"]

CORES = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention implementations of transformers that compute what is between the exchanges."""
_NOT_SHARED = frozenset({"chunked_attention", "linear_attention", "mamba", "recurrent", "conv", "hybrid"})
"""Kinds of layers in which tokens meet otherwise than in attention by causality, documents and a window."""
_numbers = itertools.count()


class Registration:
    """What `register_with_transformers` returns: an `mpu` for `initialize`, and what undoes it."""

    def __init__(self, state: SequenceParallelState, attention: UlyssesSPAttentionHF) -> None:
        self.state = state
        self.attention = attention
        self.undo: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        # Whatever is asked of an mpu.
        if not name.startswith("get_"):
            raise AttributeError(name)
        return getattr(self.state, name)

    def unregister(self) -> None:
        """Models compute as before; their weights and the sequence groups stay. Calling it again does nothing."""
        while self.undo:
            self.undo.pop()()

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()


def config_of(given: nn.Module | str) -> Any:
    """The config of a model, or of what it is loaded from. Raises ModelError and ConfigError where there is none."""
    if isinstance(given, str):
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(given)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model_name_or_path {given!r}: transformers finds no config there: {first_line(error)}",
                path="model_name_or_path",
            ) from error
    config = getattr(given, "config", None)
    if config is None or not hasattr(given, "set_attn_implementation"):
        raise ModelError(
            f"{type(given).__name__} is no model of transformers, whose attention can be chosen: use "
            "DistributedAttention in the model itself"
        )
    return config


def heads_of(config: Any) -> tuple[int, int]:
    """(query heads, key heads). Raises ModelError where the config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    queries = getattr(text, "num_attention_heads", None)
    if queries is None:
        raise ModelError(f"the config of {getattr(text, 'model_type', 'the model')} does not say num_attention_heads")
    return queries, getattr(text, "num_key_value_heads", None) or queries


def check_model(config: Any, given: nn.Module | str, core: str) -> None:
    """Raises ModelError and ConfigError for a model whose sequences ranks cannot share by its attention `core`."""
    if core not in CORES:
        raise ConfigError(
            f"core_attn_implementation {core!r} over ranks that share sequences: expected one of {', '.join(CORES)}",
            path="core_attn_implementation",
            expected=" | ".join(CORES),
            got=repr(core),
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = sorted(
        {each for each in getattr(text, "layer_types", None) or () if any(part in each for part in _NOT_SHARED)}
    )
    if found:
        raise ModelError(
            f"{text.model_type} has layers of type {', '.join(found)}, in which tokens meet otherwise than in "
            "attention: ranks cannot share its sequences"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} has an encoder and a decoder: ranks cannot share its sequences yet")
    if isinstance(given, str):
        return
    own = config._attn_implementation
    if own != core:
        raise ConfigError(
            f"core_attn_implementation {core!r}, and the model was made with {own!r}: load it with "
            f"attn_implementation={core!r}, or unregister it first",
            path="core_attn_implementation",
            expected=repr(own),
            got=repr(core),
        )


def add(made: Registration, model: Any, core: str) -> None:
    """Gives the model an implementation of its own name."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    name = f"ulysses_{core}_{next(_numbers)}"
    made.attention.model = weakref.ref(model)
    for interface, what in ((AttentionInterface, made.attention), (AttentionMaskInterface, made.attention.mask)):
        interface.register(name, what)
        made.undo.append(partial(_forget, interface, name))
    try:
        model.set_attn_implementation(name)
    except Exception:
        made.unregister()
        raise
    if model.config._attn_implementation != name:
        made.unregister()
        raise ModelError(
            f"{type(model).__name__} does not let its attention be chosen: ranks cannot share its sequences"
        )
    made.undo.append(lambda: model.set_attn_implementation(core))
    hook = model.register_forward_pre_hook(_NeedsPositions(made.attention), with_kwargs=True)
    made.undo.append(hook.remove)


class _NeedsPositions:
    """A model without `position_ids` counts from 0 on every rank, and nothing would fail."""

    def __init__(self, attention: UlyssesSPAttentionHF) -> None:
        self.attention = attention

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self.attention.disable_in_eval and not model.training:
            return
        if kwargs.get("position_ids") is None and (len(args) < 3 or args[2] is None):
            raise ModelError(
                "sequence parallelism: the model was called without position_ids, and would count this rank's tokens "
                "from 0: pass positions in the whole sequence (UlyssesSPDataLoaderAdapter cuts them with the rest)"
            )


def replace(made: Registration, core: str) -> None:
    """Puts the implementation in the place of one that models will be loaded with."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if isinstance(made.attention.core, type(made.attention)):
        raise ModelError(f"{core} is shared among ranks already: unregister() what was returned then first")
    for interface, what in (
        (ALL_ATTENTION_FUNCTIONS, made.attention),
        (ALL_MASK_ATTENTION_FUNCTIONS, made.attention.mask),
    ):
        before = interface._local_mapping.get(core)
        interface[core] = what
        made.undo.append(partial(_put_back, interface, core, before))


def _forget(interface: Any, name: str) -> None:
    interface._global_mapping.pop(name, None)


def _put_back(interface: Any, name: str, before: Any) -> None:
    if before is None:
        del interface[name]
    else:
        interface[name] = before
