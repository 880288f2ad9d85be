"""Who stands for the other ranks on paper: groups that count what they would carry, and carry nothing.

They are the engine's own groups but for the call that sends: so what is counted is what the engine's code would send.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zeroxide.distributed import Ranks
from zeroxide.moe.exchange import ExpertExchange
from zeroxide.parallel.sequence.exchange import Exchange
from zeroxide.parallel.sequence.huggingface import UlyssesSPAttentionHF
from zeroxide.parallel.sequence.layout import SequenceLayout
from zeroxide.parallel.sequence.registration import Registration, add, check_model, config_of
from zeroxide.parallel.tensor import TensorGroup

__all__ = ["Counted", "PaperAttention", "PaperExchange", "PaperTensorGroup", "absent", "balance", "share_on_paper"]


def absent(world: int) -> Ranks:
    """The first of `world` ranks on as many hosts, none of which is there."""
    return Ranks(rank=0, world=world, backend="fake", same_host=False, same_network=False, shares_memory=False)


@dataclass
class Counted:
    """Messages of one kind, and the bytes of them that leave a rank."""

    count: int = 0
    sent: int = 0

    def add(self, sent: int) -> None:
        """One more."""
        self.count += 1
        self.sent += sent

    def taken(self) -> Counted:
        """What there is, which is forgotten here."""
        found = Counted(self.count, self.sent)
        self.count = self.sent = 0
        return found


class PaperTensorGroup(TensorGroup):
    """The first of `size` tensor-parallel ranks."""

    def __init__(self, size: int) -> None:
        super().__init__(absent(size))
        self.reduced, self.gathered = Counted(), Counted()

    def all_reduce(self, tensor: torch.Tensor, what: str, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """See `TensorGroup`."""
        before = self.sent
        found = super().all_reduce(tensor, what, op)
        self.reduced.add(self.sent - before)
        return found

    def all_gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """See `TensorGroup`."""
        before = self.sent
        found = super().all_gather(tensor, what)
        self.gathered.add(self.sent - before)
        return found

    def _try(self, what: str, act: Callable[[], Any]) -> None:
        """Nobody is there."""


class PaperExchange(ExpertExchange):
    """The first of `size` ranks that have experts, all of which route their tokens alike."""

    def __init__(self, size: int, name: str, tokens: Counted, counts: Counted) -> None:
        super().__init__(absent(size), 0, name, _at_once)
        self._tokens, self._counts = tokens, counts

    def exchange(
        self, arriving: torch.Tensor, leaving: torch.Tensor, given: list[int], to: list[int], what: str
    ) -> None:
        """See `ExpertExchange`."""
        before = self.sent_bytes
        super().exchange(arriving, leaving, given, to, what)
        (self._counts if what == "of counts" else self._tokens).add(self.sent_bytes - before)

    def carry(self, arriving: torch.Tensor, leaving: torch.Tensor, given: list[int], to: list[int]) -> None:
        """Counts of rows alone have values."""
        if not leaving.is_floating_point():
            arriving.copy_(leaving[self.position].expand_as(arriving))


def _at_once(kind: str, name: str, number: int) -> AbstractContextManager[None]:
    return nullcontext()


def balance(experts: nn.Module, number: int) -> None:
    """Has every one of `number` experts in all take as many tokens, whatever a router says of them."""
    kind: Any = type(experts)

    def forward(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        even = torch.arange(top_k_index.numel(), device=hidden_states.device).remainder(number)
        found: torch.Tensor = kind.forward(self, hidden_states, even.view(top_k_index.shape), top_k_weights)
        return found

    experts.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@dataclass(frozen=True)
class _PaperHeads(Exchange):
    """Heads for tokens, of which none travel."""

    def carry(self, incoming: torch.Tensor, outgoing: torch.Tensor, back: list[int], out: list[int]) -> None:
        """See `Exchange`."""
        self.group.add(outgoing.numel())


class PaperAttention(UlyssesSPAttentionHF):
    """Ulysses' attention over sequences that are cut into equal parts, without padding."""

    exchange_type = _PaperHeads
    shared: int
    """Ranks that share a sequence."""

    def _layout(
        self, batch: int, positions: torch.Tensor, padding: torch.Tensor | None, causal: bool
    ) -> SequenceLayout:
        tokens = positions.shape[1]
        return SequenceLayout((tokens,) * self.shared, None, (((0, tokens * self.shared),),))


def share_on_paper(model: nn.Module, shared: int, counted: Counted) -> Registration:
    """Has the attention of a Hugging Face model work on the first of `shared` parts of sequences; until `unregister`.

    Raises ModelError and ConfigError for a model whose sequences cannot be shared.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    core = config_of(model)._attn_implementation
    check_model(model.config, model, core)
    state: Any = SimpleNamespace(
        sequence_group=counted, sequence_ranks=tuple(range(shared)), get_sequence_parallel_rank=lambda: 0
    )
    attention = PaperAttention(
        ALL_ATTENTION_FUNCTIONS[core],
        ALL_MASK_ATTENTION_FUNCTIONS[core],
        state,
        flash=core != "sdpa",
        ring=False,
        tokens=None,
        rows=None,
        disable_in_eval=False,
    )
    attention.shared = shared
    made = Registration(state, attention)
    add(made, model, core)
    return made
