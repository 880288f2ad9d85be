#!/bin/sh
# torch 2.15.0: with hooks for saved tensors, a gradient is wrong in silence where it is refused without them.
#
# autograd remembers the version of every tensor that it saves, and refuses a backward when the tensor has been changed in
# place since. Under torch.autograd.graph.saved_tensors_hooks it does not look, whatever the hooks do: hooks that keep the
# tensor itself, to move or to gather something else for instance, turn an error into a wrong gradient.
#
# Seen: y = sum(h * h) with h = x = 2, and h times 10 in place before backward. Without hooks a RuntimeError names the
# in-place operation; with hooks that hand the tensor through, the gradient is 40 instead of 4.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import torch


def gradient(context):
    x = torch.full((3,), 2.0, requires_grad=True)
    with context:
        h = x * 1
        y = (h * h).sum()
    with torch.no_grad():
        h.mul_(10)
    y.backward()
    return x.grad.tolist()


print("torch", torch.__version__)
try:
    gradient(contextlib.nullcontext())
    raise SystemExit("a change in place was not refused")
except RuntimeError as error:
    print("without hooks:", str(error).split(":")[0])
found = gradient(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda kept: kept))
print("with hooks:", found)
assert found == [40.0, 40.0, 40.0], found
PYTHON
