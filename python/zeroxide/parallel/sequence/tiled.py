"""Functions of a sequence computed a tile of its tokens at a time, for activations of one tile instead of all.

What works on every token by itself - an MLP, logits and their loss - may be cut anywhere. Forward computes tile after
tile and keeps none of what is between; backward computes each tile again. Of a tile's gradients, those of the input go
to their place, and those of weights are summed, in fp32, and handed to autograd once: an engine sees one gradient of
each parameter in a backward, and its weights stay where they are over all tiles.

Names and arguments are those of DeepSpeed's `runtime.sequence_parallel.ulysses_sp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.random import fork_rng
from torch.utils.checkpoint import get_device_states, set_device_states

from zeroxide.device.placement import device_kind
from zeroxide.errors import ModelError, TensorError

__all__ = ["SequenceTiledCompute", "TiledFusedLogitsLoss", "TiledMLP", "sequence_tiled_compute"]

REDUCTIONS = ("mean", "sum", None)


class TiledMLP:
    """An MLP over tiles of its tokens: `TiledMLP.apply(fn, self, x, shards, compute_params)`."""

    @staticmethod
    def apply(
        fn: Callable[[Any, torch.Tensor], torch.Tensor],
        self: Any,
        x: torch.Tensor,
        shards: int,
        compute_params: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`fn(self, x)` in `shards` tiles.

        x: (..., tokens, features); fn gives the same but for the features, and nothing of one token depends on another.
        compute_params: the parameters that fn uses; those of the module `self` if None. What is not among them gets no
            gradient.
        """
        params = _parameters(self, compute_params, "TiledMLP")
        work = _Work(lambda tile: fn(self, tile["x"]), {"x": x}, {}, params, shards, dim=-2, out_dim=-2)
        return work.run()


def sequence_tiled_compute(
    fn: Callable[..., torch.Tensor],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, Any],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str | None,
    compute_params: Sequence[torch.Tensor] | None = None,
    output_unshard_dimension: int = 1,
    output_reduction: str | None = "mean",
) -> torch.Tensor:
    """`fn(**kwargs_to_shard, **kwargs_to_pass)` in `shards` tiles of the tokens.

    kwargs_to_shard: tensors of (batch, tokens, ...), with `seqlen` tokens; anything else among them is passed as it is.
    grad_requiring_tensor_key: which of them is sure to take a gradient; those that require one all do.
    compute_params: parameters that fn uses besides what it is given; None for those of modules that it is a method of
        or is given. What is not among them gets no gradient.
    output_unshard_dimension: the dimension of tokens in what fn gives; of no account where that is one number a tile.
    output_reduction: "mean" or "sum" of all that fn gives, or None for that itself. The mean of one number a tile
        counts each as often as its tile has tokens.
    """
    if output_reduction not in REDUCTIONS:
        raise ValueError(f'output_reduction: expected "mean", "sum" or None, got {output_reduction!r}')
    key = grad_requiring_tensor_key
    if key is not None and not isinstance(kwargs_to_shard.get(key), torch.Tensor):
        raise ValueError(f"grad_requiring_tensor_key: expected a tensor among kwargs_to_shard, got {key!r}")
    cut = {name: value for name, value in kwargs_to_shard.items() if isinstance(value, torch.Tensor)}
    passed = {**{name: value for name, value in kwargs_to_shard.items() if name not in cut}, **kwargs_to_pass}
    for name, value in cut.items():
        if value.dim() < 2 or value.shape[1] != seqlen:
            raise TensorError(
                f"sequence_tiled_compute: {name} is {tuple(value.shape)}: expected {seqlen} tokens in dimension 1",
                name=name,
                expected=f"(batch, {seqlen}, ...)",
                got=str(tuple(value.shape)),
            )
    owner = [getattr(fn, "__self__", fn), *passed.values()]
    found = [each for each in owner if isinstance(each, nn.Module)]
    params = list(compute_params) if compute_params is not None else _of_modules(found)
    work = _Work(lambda given: fn(**given), cut, passed, params, shards, dim=1, out_dim=output_unshard_dimension)
    output = work.run(output_reduction)
    return output


class SequenceTiledCompute:
    """`sequence_tiled_compute` as `SequenceTiledCompute.apply`, with the keys and the arguments apart."""

    @staticmethod
    def apply(
        fn: Callable[..., torch.Tensor],
        seqlen: int,
        shards: int,
        keys_to_shard: Sequence[str],
        keys_to_pass: Sequence[str],
        grad_requiring_tensor_key: str | None,
        compute_params: Sequence[torch.Tensor] | None,
        output_unshard_dimension: int,
        output_reduction: str | None,
        *args: Any,
    ) -> torch.Tensor:
        """See `sequence_tiled_compute`; `args` are the values of `keys_to_shard`, then of `keys_to_pass`."""
        if len(args) != len(keys_to_shard) + len(keys_to_pass):
            raise ValueError(
                f"SequenceTiledCompute: expected {len(keys_to_shard) + len(keys_to_pass)} arguments, one for each key, "
                f"got {len(args)}"
            )
        return sequence_tiled_compute(
            fn,
            seqlen,
            shards,
            dict(zip(keys_to_shard, args, strict=False)),
            dict(zip(keys_to_pass, args[len(keys_to_shard) :], strict=True)),
            grad_requiring_tensor_key,
            compute_params,
            output_unshard_dimension,
            output_reduction,
        )


class TiledFusedLogitsLoss:
    """Logits and their loss over tiles of tokens, with their gradients in the same go:
    `TiledFusedLogitsLoss.apply(fn, self, x, y, mask, shards, compute_params, output_reduction)`."""

    @staticmethod
    def apply(
        fn: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
        self: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        mask: torch.Tensor | None,
        shards: int,
        compute_params: Sequence[torch.Tensor] | None = None,
        output_reduction: str = "mean",
    ) -> torch.Tensor:
        """The mean or sum of `fn(self, x, y)`, one number, over tiles.

        x: (batch, tokens, features); y: (batch, tokens), the labels; fn sees (tokens, features) and (tokens,).
        mask: (batch, tokens), bool, or None: tokens where it is False are taken out before fn sees them.
        compute_params: see `TiledMLP.apply`. output_reduction: "sum", or "mean", which counts the number of a tile as
            often as it has tokens: give a mask where fn leaves out labels and takes means.

        Gradients are computed in forward, while each tile is there, and kept until backward.
        """
        if output_reduction not in ("mean", "sum"):
            raise ValueError(f'output_reduction: expected "mean" or "sum", got {output_reduction!r}')
        if x.shape[:-1] != y.shape or (mask is not None and mask.shape != y.shape):
            shapes = f"x {tuple(x.shape)}, y {tuple(y.shape)}, mask {None if mask is None else tuple(mask.shape)}"
            raise TensorError(
                f"TiledFusedLogitsLoss: {shapes}: expected (batch, tokens, features), (batch, tokens), (batch, tokens)",
                name="y",
                expected=str(tuple(x.shape[:-1])),
                got=str(tuple(y.shape)),
            )
        params = _parameters(self, compute_params, "TiledFusedLogitsLoss")
        rows, labels = x.reshape(-1, x.shape[-1]), y.reshape(-1)
        if mask is not None:
            at = mask.reshape(-1).nonzero().squeeze(1)
            # Autograd puts gradients back where the rows were.
            rows, labels = rows[at], labels[at]
        if not len(rows):
            return rows.sum() * 0.0
        work = _Work(lambda tile: fn(self, tile["x"], tile["y"]), {"x": rows, "y": labels}, {}, params, shards, 0, 0)
        return work.run(output_reduction, at_once=True)


def _parameters(module: Any, given: Sequence[torch.Tensor] | None, call: str) -> list[torch.Tensor]:
    if given is not None:
        return [each for each in given if each.requires_grad]
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{call}: {type(module).__name__} is no module: give compute_params, the parameters that are used"
        )
    return _of_modules([module])


def _of_modules(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    found = {id(each): each for module in modules for each in module.parameters() if each.requires_grad}
    return list(found.values())


@dataclass
class _Work:
    """What is computed over tiles."""

    fn: Callable[[dict[str, Any]], torch.Tensor]
    cut: dict[str, torch.Tensor]
    """What is cut, with its tokens in dimension `dim`."""
    passed: dict[str, Any]
    params: list[torch.Tensor]
    shards: int
    dim: int
    out_dim: int
    names: list[str] = field(default_factory=list)
    """What of both takes a gradient."""
    outputs: list[torch.Size] = field(default_factory=list)
    """The shape of what each tile gave."""

    def given(self) -> dict[str, Any]:
        """All that fn is given, whole."""
        return {**self.cut, **self.passed}

    def let_go(self) -> list[str]:
        """Holds no tensor but the parameters any more; what was cut."""
        cut = list(self.cut)
        self.cut = {}
        self.passed = {name: value for name, value in self.passed.items() if not isinstance(value, torch.Tensor)}
        return cut

    def take_up(self, tensors: Mapping[str, torch.Tensor], cut: Sequence[str]) -> None:
        """Undoes `let_go`."""
        self.cut = {name: tensors[name] for name in cut}
        self.passed |= {name: value for name, value in tensors.items() if name not in self.cut}

    def run(self, reduction: str | None = None, at_once: bool = False) -> torch.Tensor:
        """What all tiles give. `at_once`: with their gradients, where anything takes one."""
        if self.shards < 1:
            raise ValueError(f"shards: expected an integer of at least 1, got {self.shards!r}")
        tensors = self.given()
        self.names = [
            name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        taking = [tensors[name] for name in self.names] + self.params
        kind = _AtOnce if at_once and taking and torch.is_grad_enabled() else _Tiled
        found: torch.Tensor = kind.apply(self, reduction, *taking)
        return found

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(first, number of tokens) of each tile; there may be fewer than asked for."""
        first = next(iter(self.cut.values()))
        tokens, at = first.shape[self.dim], 0
        for part in torch.empty((tokens, 0), device="meta").chunk(self.shards):
            yield at, len(part)
            at += len(part)

    def tile(self, first: int, count: int, taking: bool) -> dict[str, Any]:
        """What fn is given of a tile; `taking` gradients or not."""
        found = dict(self.passed)
        for name, value in self.cut.items():
            found[name] = value.detach().narrow(self.dim, first, count)
            if taking and name in self.names:
                found[name].requires_grad_()
        return found

    def weight(self, count: int, reduction: str | None) -> float:
        """How much one number of a tile of `count` tokens counts."""
        return count / next(iter(self.cut.values())).shape[self.dim] if reduction == "mean" else 1.0

    def combined(self, outputs: list[torch.Tensor], reduction: str | None) -> torch.Tensor:
        """What all tiles give together."""
        if outputs[0].dim() == 0:
            stacked = torch.stack(outputs)
            if reduction is None:
                return stacked
            weights = [self.weight(count, reduction) for _, count in self.tiles()]
            return (stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)).sum()
        whole = torch.cat(outputs, self.out_dim)
        return whole if reduction is None else whole.mean() if reduction == "mean" else whole.sum()

    def gradient_of(self, number: int, gradient: torch.Tensor, reduction: str | None) -> torch.Tensor:
        """That of what tile `number` gave, from that of what all gave together."""
        shape = self.outputs[number]
        if not shape:
            if reduction is None:
                return gradient[number]
            return gradient * self.weight(list(self.tiles())[number][1], reduction)
        if reduction is not None:
            total = sum(each.numel() for each in self.outputs)
            return (gradient / total if reduction == "mean" else gradient).expand(shape)
        first = sum(each[self.out_dim] for each in self.outputs[:number])
        return gradient.narrow(self.out_dim, first, shape[self.out_dim])


class _Sums:
    """Gradients of all that takes one, from those of the tiles."""

    def __init__(self, work: _Work, taking: Sequence[torch.Tensor]) -> None:
        self.work = work
        self.taking = taking
        self.found: list[torch.Tensor | None] = [None] * len(taking)

    def add(self, first: int, tile: dict[str, Any], output: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds those of a tile that begins at token `first`, by the gradient of what it gave."""
        if not output.requires_grad:
            return
        leaves = [tile[name] for name in self.work.names] + self.work.params
        for at, part in enumerate(torch.autograd.grad(output, leaves, gradient, allow_unused=True)):
            if part is None:
                continue
            if at < len(self.work.names) and self.work.names[at] in self.work.cut:
                # Every token is in one tile.
                value = self.work.cut[self.work.names[at]]
                total = self.found[at]
                if total is None:
                    total = self.found[at] = torch.zeros_like(value)
                total.narrow(self.work.dim, first, part.shape[self.work.dim]).copy_(part)
            elif (before := self.found[at]) is None:
                # A copy, since autograd may give one tensor for several: a wider one where there are more to add.
                wider = torch.promote_types(part.dtype, torch.float32) if self.work.shards > 1 else part.dtype
                self.found[at] = part.to(wider, copy=True)
            else:
                before.add_(part)

    def all(self) -> list[torch.Tensor | None]:
        """They, in the dtypes of what they are of."""
        return [None if each is None else each.to(of.dtype) for each, of in zip(self.found, self.taking, strict=True)]


class _Tiled(torch.autograd.Function):
    """Tiles in forward, and once more in backward."""

    @staticmethod
    def forward(ctx: Any, work: _Work, reduction: str | None, *taking: torch.Tensor) -> torch.Tensor:
        ctx.work, ctx.reduction = work, reduction
        ctx.state = _Random.now(work)
        outputs = [work.fn(work.tile(*each, taking=False)) for each in work.tiles()]
        work.outputs = [each.shape for each in outputs]
        found = work.combined(outputs, reduction)
        # As autograd saves them: what changes one of them meanwhile is noticed.
        ctx.names = [name for name, value in work.given().items() if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(work.given()[name] for name in ctx.names))
        ctx.cut = work.let_go()
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        work: _Work = ctx.work
        work.take_up(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.cut)
        sums = _Sums(work, [work.given()[name] for name in work.names] + work.params)
        with ctx.state.again():
            for number, (first, count) in enumerate(work.tiles()):
                tile = work.tile(first, count, taking=True)
                with torch.enable_grad():
                    output = work.fn(tile)
                part = work.gradient_of(number, gradient, ctx.reduction)
                sums.add(first, tile, output, part)
        work.let_go()
        return (None, None, *sums.all())


class _AtOnce(torch.autograd.Function):
    """Tiles and their gradients in forward."""

    @staticmethod
    def forward(ctx: Any, work: _Work, reduction: str | None, *taking: torch.Tensor) -> torch.Tensor:
        sums = _Sums(work, taking)
        outputs = []
        for first, count in work.tiles():
            tile = work.tile(first, count, taking=True)
            with torch.enable_grad():
                output = work.fn(tile)
            if output.dim() != 0:
                raise TensorError(
                    f"TiledFusedLogitsLoss: fn gave {tuple(output.shape)}: expected one number",
                    name="fn",
                    expected="()",
                    got=str(tuple(output.shape)),
                )
            weight = torch.full_like(output, work.weight(count, reduction), requires_grad=False)
            sums.add(first, tile, output, weight)
            outputs.append(output.detach())
        found = sums.all()
        ctx.there = [each is not None for each in found]
        ctx.save_for_backward(*(each for each in found if each is not None))
        return work.combined(outputs, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        kept = iter(ctx.saved_tensors)
        return (None, None, *(next(kept) * gradient if there else None for there in ctx.there))


@dataclass(frozen=True)
class _Random:
    """What computing a tile again needs to be the same: random numbers, and autocast."""

    host: torch.Tensor
    devices: list[int]
    states: list[torch.Tensor]
    """Of the random numbers of each device that has a part of the input."""
    kind: str
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, work: _Work) -> _Random:
        """As it is."""
        tensors = [each for each in work.given().values() if isinstance(each, torch.Tensor)]
        kind = device_kind(next(iter(work.cut.values())))
        return cls(
            torch.get_rng_state(),
            *get_device_states(*tensors),
            kind,
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was."""
        forked = fork_rng(self.devices, device_type=self.kind) if self.devices else fork_rng(devices=[])
        with forked, torch.autocast(self.kind, dtype=self.dtype, enabled=self.autocast):
            torch.set_rng_state(self.host)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=self.kind)
            yield
