"""Gradients of large embeddings and projections, kept small.

A vocabulary of 50,000 gives embedding and output projection a gradient of tens of MiB each, dense, at once, and for the
embedding mostly zero. Three operations get a leaner path with the same bits, whoever calls them with such a weight:

- `functional.linear` with a weight of `LARGE` elements or more: its gradient is computed a block of rows at a time, and
  each block accumulates at once. A row is a sum over samples in the same order, however many rows are computed
  together.
- `losses.linear_cross_entropy`: the same, with the logits of a chunk of the vocabulary at a time.
- `functional.embedding`: its gradient comes as the rows that were looked up. Rows looked up more than once are summed
  in the order of the samples, in the dtype of the gradient, as the dense gradient is.

The lean path accumulates a gradient beside autograd. It is taken only where nobody can tell: the backward under way is
one
that fills this weight's `.grad`, no hook of a user's wants to see the gradient, and what it is added to is what
autograd would have added it to, in the same order. Everywhere else the gradient is dense and autograd's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zeroxide import _core
from zeroxide.device.placement import autocast_dtype, in_host, plain, spec
from zeroxide.errors import ModelError
from zeroxide.losses import linear_cross_entropy
from zeroxide.params.empty import full_class
from zeroxide.params.handle import ManagedParameter
from zeroxide.params.operations import parameters_in
from zeroxide.zero.passes import GradientState, in_backward
from zeroxide.zero.unit import Unit

if TYPE_CHECKING:
    from zeroxide.zero.reduce.reducer import Reducer

__all__ = ["LARGE", "LargeParameter", "LargeWeight", "LargeWeights"]

LARGE = 8 << 20
"""Elements of a weight from which its gradient is accumulated in parts."""
PART = 2 << 20
"""Elements of a part, about."""


class LargeParameter(ManagedParameter):
    """A large trainable matrix while it shows its values."""

    _large: LargeWeight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None
        if func is functional.linear:
            found = _linear(*args, **kwargs)
        elif func is functional.embedding:
            found = _embedding(*args, **kwargs)
        elif func is linear_cross_entropy:
            found = _linear_cross_entropy(*args, **kwargs)
        if found is not None:
            return found
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if torch.is_grad_enabled() and any(each.grad_fn is not None for each in _outputs(result)):
            for each in parameters_in((args, kwargs)):
                if isinstance(each, LargeParameter):
                    each._large.use(lean=False)
        return result


def _outputs(result: Any) -> Sequence[torch.Tensor]:
    found = result if isinstance(result, (tuple, list)) else (result,)
    return [each for each in found if isinstance(each, torch.Tensor)]


def _is_plain() -> bool:
    """Whether operations run at once and by themselves: nothing is compiled, and no transform of torch.func is on."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _linear(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    if not isinstance(weight, LargeParameter) or not weight.requires_grad:
        return None
    dtype, lower = weight.dtype, autocast_dtype()
    if lower is not None:
        # What autocast does to the arguments of a linear layer; autograd casts their gradients back.
        dtype = lower
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    if not weight._large.use(lean=input.dtype is dtype and _is_plain()):
        return None
    output: torch.Tensor = _Linear.apply(input, weight, bias, weight._large, dtype)
    return output


def _linear_cross_entropy(
    input: torch.Tensor, linear_weight: Any, target: torch.Tensor, **own: Any
) -> torch.Tensor | None:
    if not isinstance(linear_weight, LargeParameter) or not linear_weight.requires_grad:
        return None
    if not linear_weight._large.use(lean=_is_plain()):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return linear_cross_entropy(input, linear_weight, target, **(own | {"in_parts": linear_weight._large}))


def _embedding(
    input: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor | None:
    if not isinstance(weight, LargeParameter) or not weight.requires_grad:
        return None
    if not weight._large.use(lean=max_norm is None and not scale_grad_by_freq and not sparse and _is_plain()):
        return None
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    output: torch.Tensor = _Embedding.apply(input, weight, padding, weight._large)
    return output


class _Linear(torch.autograd.Function):
    """x W^T + b whose weight gradient is accumulated in parts.

    `dtype` is that of x, bias and all products. It may be lower than the weight's, which is cast each time it is used:
    no copy of it lives from forward to backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        large: LargeWeight,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.large = large
        ctx.dtype = dtype
        ctx.has_bias = bias is not None
        with torch._C.DisableTorchFunctionSubclass():
            return functional.linear(x, weight.to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        x_flat = x.reshape(-1, x.shape[-1])
        weight_grad = None
        with torch._C.DisableTorchFunctionSubclass():
            # First: when the weight's own gradient is complete, its unit may be released.
            x_grad = flat.mm(weight.to(ctx.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
            shape, dtype = weight.shape, weight.dtype
        if ctx.needs_input_grad[1]:
            if ctx.large.is_lean(ctx.next_functions[1][0]):
                # Of nearly one size: a product of a single row is another function's, with sums in another order.
                parts = -(-shape[0] // max(2, PART // shape[1]))
                ends = [shape[0] * number // parts for number in range(parts + 1)]
                for start, end in pairwise(ends):
                    ctx.large.accumulate_part(start * shape[1], flat[:, start:end].t().mm(x_flat))
            else:
                weight_grad = flat.t().mm(x_flat).to(dtype)
        bias_grad = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return x_grad, weight_grad, bias_grad, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a weight, whose gradient is accumulated as rows."""

    @staticmethod
    def forward(
        ctx: Any, indices: torch.Tensor, weight: torch.Tensor, padding: int, large: LargeWeight
    ) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.padding = padding
        ctx.large = large
        ctx.rows = weight.shape[0]
        with torch._C.DisableTorchFunctionSubclass():
            return functional.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        if not ctx.large.is_lean(ctx.next_functions[1][0]):
            dense = torch.ops.aten.embedding_dense_backward(grad, indices, ctx.rows, ctx.padding, False)
            return None, dense, None, None
        rows = indices.reshape(-1).to(torch.int64)
        values = grad.reshape(-1, grad.shape[-1])
        if ctx.padding >= 0:
            kept = rows != ctx.padding
            rows, values = rows[kept], values[kept]
        ctx.large.accumulate_rows(ctx.rows, rows.contiguous(), values.contiguous())
        return None, None, None, None


class LargeWeight:
    """What is known about the uses of one large weight since the last backward."""

    def __init__(self, shared: LargeWeights, unit: Unit, position: int) -> None:
        self.shared = shared
        self.unit = unit
        self.position = position
        self.param = unit.params[position]
        self.uses = 0
        self.all_lean = True
        self.accumulated = 0

    def use(self, *, lean: bool) -> bool:
        """Notes a use of the weight, and whether its gradient may be accumulated beside autograd: returns whether it
        is to.

        A forward without gradients counts as well: with reentrant checkpointing it is the one that backward repeats.
        """
        if not in_backward():
            if not torch.is_grad_enabled() and not self.shared.is_training():
                return False
            if self.shared.new_cycle(self):
                self.uses, self.accumulated, self.all_lean = 0, 0, True
            self.uses += 1
            if self.uses > 1:
                self.shared.note_repeated(self.unit)
        elif self.uses == 0:
            self.uses = 1
        if not torch.is_grad_enabled():
            return False
        self.all_lean &= lean
        return lean

    def is_lean(self, accumulate: Any) -> bool:
        """Whether the gradient of this use is accumulated beside autograd; `accumulate` is the node that fills
        `.grad`."""
        if not self.all_lean or self.param._backward_hooks or len(self.param._post_accumulate_grad_hooks) > 1:
            return False
        # More than one summand: they are added in the order in which they arrive, as autograd adds them, but to zero
        # and in their own dtype.
        if self.uses > 1 and not self.shared.adds_as_autograd(self.unit.flat.dtype):
            return False
        order = self.shared.reducer.order
        if order is not None and not order.may_add(self.unit, self.position):
            return False
        try:
            wanted: bool = torch._C._will_engine_execute_node(accumulate)
        except RuntimeError:
            # torch.autograd.grad: what fills `.grad` has no part in it.
            return False
        return wanted

    def accumulate_part(self, start: int, part: torch.Tensor) -> None:
        """Takes a block of rows, whose first element is number `start` of the weight."""
        reducer = self.shared.reducer
        if self.unit.gradients is not GradientState.OPEN:
            reducer.check_open(self.unit)
        if reducer.order is not None:
            reducer.order.note(self.unit, self.position)
        reducer.core.accumulate(self.unit.index, self.position, start, spec(plain(reducer.share(part))), True)
        if start + part.numel() == self.unit.shapes[self.position].numel():
            self._arrived()

    def accumulate_rows(self, count: int, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Takes `values`, one row for each of `rows` (int64), of a weight of `count` rows."""
        reducer = self.shared.reducer
        if self.unit.gradients is not GradientState.OPEN:
            reducer.check_open(self.unit)
        if reducer.order is not None:
            reducer.order.note(self.unit, self.position)
        shared = plain(reducer.share(values))
        reducer.core.accumulate_rows(self.unit.index, self.position, count, spec(rows), spec(shared))
        self._arrived()

    def _arrived(self) -> None:
        self.accumulated += 1
        if self.accumulated >= self.uses:
            self.shared.reducer.arrived(self.unit, self.position)


class LargeWeights:
    """The large weights of a model. `grad_dtype` is that in which gradients pile up on their way to the step."""

    def __init__(
        self,
        units: Sequence[Unit],
        reducer: Reducer,
        note_repeated: Callable[[Unit], None],
        is_training: Callable[[], bool],
        grad_dtype: torch.dtype,
    ) -> None:
        self.reducer = reducer
        self.note_repeated = note_repeated
        self.is_training = is_training
        self.grad_dtype = grad_dtype
        self.starts_at_zero = True
        """Whether no gradient has been accumulated since the last step, but in the backward under way."""
        self.cycle = 0
        """Counts backwards."""
        self.seen: dict[int, int] = {}
        self.found: dict[tuple[int, int], LargeWeight] = {}
        for unit in units:
            for position, param in enumerate(unit.params):
                shape = unit.shapes[position]
                if unit.trainable[position] and len(shape) == 2 and shape.numel() >= LARGE and _is_ordinary(param):
                    self.found[unit.index, position] = LargeWeight(self, unit, position)

    def take_uses(self) -> tuple[Any, ...]:
        """What is known of the uses by one micro-batch, to be put back when that goes on. Forgets it."""
        found = self.seen, [(large.uses, large.all_lean, large.accumulated) for large in self.found.values()]
        self.seen = {}
        return found

    def put_uses(self, taken: tuple[Any, ...]) -> None:
        """Goes on from what `take_uses` returned."""
        self.seen, uses = taken
        for large, known in zip(self.found.values(), uses, strict=True):
            large.uses, large.all_lean, large.accumulated = known

    def kinds(self, unit: Unit) -> dict[int, type[nn.Parameter]]:
        """The class of each large parameter of the unit, by its position."""
        return {position: LargeParameter for index, position in self.found if index == unit.index}

    def attach(self) -> None:
        """Tells the parameters, which have their classes now."""
        for large in self.found.values():
            if issubclass(full_class(large.param), LargeParameter):
                large.param._large = large  # type: ignore[attr-defined]

    def adds_as_autograd(self, dtype: torch.dtype) -> bool:
        """Whether summands of `dtype` that are accumulated one after the other give the bits of their sum accumulated
        at once."""
        return self.starts_at_zero and self.grad_dtype is dtype and self.reducer.divisor == 1

    def new_cycle(self, large: LargeWeight) -> bool:
        """Whether there has been a backward since the weight's last use."""
        before = self.seen.get(id(large))
        self.seen[id(large)] = self.cycle
        return before != self.cycle

    def end_backward(self) -> None:
        """Uses from here on belong to another backward, whose gradients are added to what has been accumulated."""
        self.cycle += 1
        self.starts_at_zero = False

    def close(self) -> None:
        """Lets go of the parameters."""
        for large in self.found.values():
            large.param.__dict__.pop("_large", None)
        self.found.clear()


def _is_ordinary(param: nn.Parameter) -> bool:
    return type(param) in (nn.Parameter, ManagedParameter)


def accumulate_rows(core: _core.Offload, unit: Unit, position: int, grad: torch.Tensor) -> None:
    """Accumulates a sparse gradient of shape (rows, width), not coalesced, from wherever it is."""
    rows, values = in_host(plain(grad._indices()[0])), in_host(plain(grad._values()))
    core.accumulate_rows(unit.index, position, grad.shape[0], spec(rows), spec(values))


def raise_closed(unit: Unit) -> NoReturn:
    """Raises ModelError: a gradient has come after the unit's had gone out to the other ranks."""
    raise ModelError(
        f"a gradient of {unit.name} arrived after the unit had been reduced over the ranks: a module is used again in "
        "a way that forward did not show; make it part of a leaf module (zero.set_z3_leaf_modules)",
        name=unit.name,
    )
