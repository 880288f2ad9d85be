"""Ulysses for models of Hugging Face: `UlyssesSPAttentionHF`, which can be undone.

What transformers calls with a rank's own tokens is attention over all of them: to the core of it, one of transformers'
own, each rank gives all tokens and a part of the heads.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from zeroxide.errors import ConfigError, ModelError
from zeroxide.parallel.sequence.exchange import Exchange, Heads, to_heads, to_sequence
from zeroxide.parallel.sequence.layout import SequenceLayout, gather_layout
from zeroxide.parallel.sequence.parallel_state import (
    SequenceParallelState,
    current_state,
    initialize_sequence_parallel,
)
from zeroxide.parallel.sequence.registration import (
    Registration,
    add,
    check_model,
    config_of,
    heads_of,
    replace,
)
from zeroxide.parallel.sequence.ring import ring_attention

__all__ = ["UlyssesSPAttentionHF"]

logger = logging.getLogger("zeroxide")

_LOCAL = ("cu_seq_lens_q", "cu_seq_lens_k", "position_bias", "s_aux", "head_mask", "softcap")
"""What may be given to attention besides, and says something of tokens or heads as this rank had them before."""


class _LocalHeads:
    """An attention module as its core sees it: with this rank's heads."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self.module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class UlyssesSPAttentionHF:
    """The attention function that transformers calls, around one of its own."""

    exchange_type = Exchange

    def __init__(
        self,
        core: Callable[..., Any],
        core_mask: Callable[..., Any],
        state: SequenceParallelState,
        *,
        flash: bool,
        ring: bool,
        tokens: int | None,
        rows: int | None,
        disable_in_eval: bool,
    ) -> None:
        self.core, self.core_mask, self.state = core, core_mask, state
        self.flash = flash
        self.ring = ring
        """Whether there are more ranks than heads."""
        self.tokens, self.rows = tokens, rows
        """Of every micro-batch; None where they may change."""
        self.disable_in_eval = disable_in_eval
        self.model: Callable[[], nn.Module | None] = lambda: None
        self.layouts: Any = WeakTensorKeyDictionary()
        """By position_ids: their version, whether causal, the padding, and the layout that all ranks have of them."""

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: nn.Module | str,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int | None = None,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> Registration | None:
        """Has attention exchange tokens for heads within groups of `sequence_parallel_size` ranks; every rank calls it.

        model_name_or_path: the model, or what it is loaded from afterwards (then all models with that implementation
            change until `unregister`).
        core_attn_implementation: what computes between the exchanges, "sdpa" or a "flash_attention"; it must be the
            model's.
        micro_batch_size, seq_length: with `seq_length_is_variable` False every forward has so many sequences of so many
            tokens over all ranks, and others are refused.
        disable_in_eval: in evaluation every rank has whole sequences, and computes them alone.
        max_length: DeepSpeed's old name of `seq_length`.

        Returns an `mpu` for `initialize`, whose `unregister` undoes it; None for a size of 1. Each rank then gives the
        model its part of the tokens, with `position_ids` that count in the whole sequence, see
        `UlyssesSPDataLoaderAdapter`.

        Raises ConfigError, ModelError or RanksError for what cannot be shared.
        """
        if sequence_parallel_size == 1:
            return None
        seq_length = max_length if seq_length is None else seq_length
        config = config_of(model_name_or_path)
        check_model(config, model_name_or_path, core_attn_implementation)
        if not seq_length_is_variable and (seq_length is None or seq_length % sequence_parallel_size):
            raise ConfigError(
                f"seq_length = {seq_length} over {sequence_parallel_size} ranks: with seq_length_is_variable False "
                "expected a multiple of the ranks",
                path="seq_length",
                got=repr(seq_length),
            )
        if disable_in_eval and isinstance(model_name_or_path, str):
            raise ConfigError(
                "disable_in_eval needs the model itself, not what it is loaded from: only that tells when it evaluates",
                path="disable_in_eval",
            )
        # Beside other axes a script has made the groups, by its mesh.
        state = current_state()
        if state is None or state.get_sequence_parallel_world_size() != sequence_parallel_size:
            state = initialize_sequence_parallel(sequence_parallel_size)
        ring = heads_of(config)[0] < sequence_parallel_size
        if ring and state.get_sequence_parallel_rank() == 0:
            logger.warning(
                "%d ranks share a sequence and there are %d heads: attention goes around in a ring",
                *(sequence_parallel_size, heads_of(config)[0]),
            )
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention = cls(
            ALL_ATTENTION_FUNCTIONS[core_attn_implementation],
            ALL_MASK_ATTENTION_FUNCTIONS[core_attn_implementation],
            state,
            flash=core_attn_implementation != "sdpa",
            ring=ring,
            tokens=None if seq_length_is_variable else seq_length,
            rows=None if seq_length_is_variable else micro_batch_size,
            disable_in_eval=disable_in_eval,
        )
        made = Registration(state, attention)
        if isinstance(model_name_or_path, str):
            replace(made, core_attn_implementation)
        else:
            add(made, model_name_or_path, core_attn_implementation)
        return made

    # What transformers calls --------------------------------------------------------------------------------------

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """Instead of a mask over this rank's tokens: which of them are padding, (batch, tokens); None if none are."""
        model = self.model()
        if self.disable_in_eval and model is not None and not model.training:
            return self.core_mask(*args, **kwargs)
        if args:
            raise ModelError("sequence parallelism: a mask function of transformers is called by keywords")
        if kwargs.get("use_vmap") or "or_mask" in getattr(kwargs.get("mask_function"), "__qualname__", ""):
            raise ModelError(
                "sequence parallelism: the model has a mask of its own kind (tokens that see what comes after them, or "
                "a function given to it), which is not built: only causality, documents, padding and windows are"
            )
        if kwargs.get("q_length") != kwargs.get("kv_length"):
            raise ModelError(
                f"sequence parallelism: {kwargs.get('q_length')} tokens attend to {kwargs.get('kv_length')}: caches of "
                "keys, as generation has, are not shared among ranks; generate with a model that is not registered"
            )
        return kwargs.get("attention_mask")

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(batch, tokens, heads, size) of this rank's tokens; query, key, value: (batch, heads, tokens, size)."""
        if self.disable_in_eval and not module.training:
            found: tuple[torch.Tensor, None] = self.core(module, query, key, value, attention_mask, **kwargs)
            return found
        positions = kwargs.pop("position_ids", None)
        _check_call(module, query, key, value, attention_mask, positions, kwargs)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        layout = self._layout(query.shape[0], positions, attention_mask, causal)
        if self.ring:
            return _around(layout, self.state, query, key, value, causal, kwargs), None
        exchange = self.exchange_type(
            self.state.sequence_group,
            self.state.get_sequence_parallel_rank(),
            Heads(query.shape[1], key.shape[1], len(layout.lengths)),
            layout.lengths,
            head_dim=1,
            sequence_dim=2,
        )
        q, k, v = to_heads(exchange, query, key, value)
        groups = q.shape[1] // k.shape[1]
        if not exchange.heads.is_grouped(exchange.rank):
            each = torch.tensor(exchange.heads.key_of_each_query(exchange.rank), device=key.device)
            k, v, groups = k.index_select(1, each), v.index_select(1, each), 1
        output = self._attend(_LocalHeads(module, groups), layout, causal, (q, k, v), kwargs)
        return to_sequence(dataclasses.replace(exchange, head_dim=2, sequence_dim=1), output), None

    def _attend(
        self, module: Any, layout: SequenceLayout, causal: bool, qkv: tuple[torch.Tensor, ...], more: dict[str, Any]
    ) -> torch.Tensor:
        """(batch, tokens, heads, size) of all tokens, with this rank's heads."""
        if not layout.packed:
            mask = layout.padding if self.flash else layout.mask(causal, more.get("sliding_window"))
            output: torch.Tensor = self.core(module, *qkv, mask, **more)[0]
            return output
        # A document at a time: no mask of tokens by tokens, and nothing is computed that a mask would hide.
        rows = []
        for row, documents in enumerate(layout.documents):
            parts = []
            for first, end in documents:
                part = [each[row : row + 1, :, first:end] for each in qkv]
                alone = SequenceLayout((end - first,), None, (((0, end - first),),))
                mask = None if self.flash else alone.mask(causal, more.get("sliding_window"))
                parts.append(self.core(module, *part, mask, **more)[0])
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows, 0)

    def _layout(
        self, batch: int, positions: torch.Tensor, padding: torch.Tensor | None, causal: bool
    ) -> SequenceLayout:
        """Told once for each micro-batch, whatever the number of layers; also where backward computes them again."""
        known = self.layouts.setdefault(positions, [])
        for version, kind, mask, layout in known:
            if version == positions._version and kind == causal and mask is padding:
                found: SequenceLayout = layout
                return found
        layout = gather_layout(self.state.sequence_group, batch, positions, padding, causal)
        if self.tokens is not None and (layout.tokens, batch) != (self.tokens, self.rows or batch):
            raise ModelError(
                f"{batch} sequences of {layout.tokens} tokens over all ranks: registered for "
                f"{self.rows or batch} of {self.tokens}; register with seq_length_is_variable=True"
            )
        known.append((positions._version, causal, padding, layout))
        return layout


def _around(
    layout: SequenceLayout,
    state: SequenceParallelState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    more: dict[str, Any],
) -> torch.Tensor:
    """(batch, tokens, heads, size), by ring attention."""
    window = more.get("sliding_window")
    if layout.packed or layout.padding is not None or (window is not None and window < layout.tokens):
        raise ModelError(
            "ring attention (more ranks share a sequence than there are heads) has neither padding, packed documents "
            "nor sliding windows: use a smaller sequence_parallel_size"
        )
    if more.get("dropout"):
        raise ModelError("ring attention has no dropout: set attention_dropout to 0, or use fewer ranks for a sequence")
    scale = more.get("scaling")
    if len(set(layout.lengths)) > 1:
        raise ModelError(f"ring attention over parts of {list(layout.lengths)} tokens: expected equal parts")
    found = ring_attention(query, key, value, state.sequence_group, is_causal=causal, scale=scale)
    return found.transpose(1, 2)


def _check_call(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    more: dict[str, Any],
) -> None:
    """Raises ModelError for what an attention is given that means something else over all tokens."""
    if positions is None:
        raise ModelError(
            "sequence parallelism: attention was not given position_ids: pass the model position_ids that count in the "
            "whole sequence (a model that does not hand them to its attention cannot share sequences)"
        )
    if mask is not None and mask.dim() != 2:
        raise ModelError(
            f"sequence parallelism: an attention mask of {mask.dim()} dimensions {tuple(mask.shape)} is of this rank's "
            "tokens alone: pass one of (sequences, tokens), or none"
        )
    if key.shape[2] != query.shape[2] or value.shape[:3] != key.shape[:3]:
        raise ModelError(
            f"sequence parallelism: a query of {query.shape[2]} tokens and a key of {key.shape[2]}: attention to other "
            "tokens than its own, and caches, are not shared among ranks"
        )
    given = [name for name in _LOCAL if more.get(name) is not None]
    if given:
        raise ModelError(f"sequence parallelism: attention with {', '.join(given)} is not built")
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and "sliding" in kinds[layer] and more.get("sliding_window") is None:
        raise ModelError(
            f"sequence parallelism: layer {layer} has a sliding window that its attention is not told of, only its "
            "mask: ranks cannot share its sequences"
        )
