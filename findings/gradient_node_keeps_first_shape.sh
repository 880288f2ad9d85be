#!/bin/sh
# torch 2.15.0: the node that takes a parameter's gradient keeps the shape that the parameter had when autograd made it.
#
# Engines that partition parameters give them empty data while they are not in use. Autograd makes the node at the first
# use that it records, and gradients are checked against the node's shape, not the parameter's. Where a function of
# autograd is handed the parameter while it is still empty, and something inside brings the data before it computes, a
# right gradient of the parameter's own shape is refused, though the shape has been right ever since. Data of another
# dtype in between makes torch forget the node; data of another shape does not.
#
# Seen: made while empty, the gradient [3, 4] is "invalid ... expected shape compatible with [0]"; made with the shape and
# kept, the same steps give the gradient; after a change of dtype and back they give it as well.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Scale(torch.autograd.Function):
    """x times w, whose values come only now."""

    @staticmethod
    def forward(ctx, x, w, values):
        w.data = values
        ctx.save_for_backward(x)
        return x * w.detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None, grad * x, None


def run(prepare):
    values, w = torch.ones(3, 4), torch.nn.Parameter(torch.empty(0))
    kept = prepare(w, values)
    out = Scale.apply(torch.full((3, 4), 2.0), w, values).sum()
    try:
        out.backward()
    except RuntimeError as error:
        return str(error)
    del kept
    return list(w.grad.shape), float(w.grad.sum())


def nothing(w, values):
    return None


def node_first(w, values):
    w.data = values
    node = w.view_as(w).grad_fn.next_functions[0][0]
    w.data = torch.empty(0)
    return node


def node_then_dtype(w, values):
    node = w.view_as(w).grad_fn.next_functions[0][0]
    w.data = torch.empty(0, dtype=torch.float64)
    w.data = values
    fresh = w.view_as(w).grad_fn.next_functions[0][0]
    w.data = torch.empty(0)
    return node, fresh


print("torch", torch.__version__)
empty, first, dtype = run(nothing), run(node_first), run(node_then_dtype)
print("made while empty:        ", empty)
print("made with its shape:     ", first)
print("forgotten by its dtype:  ", dtype)
assert isinstance(empty, str) and "expected shape compatible with [0]" in empty, empty
assert first == ([3, 4], 24.0), first
assert dtype == ([3, 4], 24.0), dtype
PYTHON
