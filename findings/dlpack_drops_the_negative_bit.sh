#!/bin/sh
# torch 2.15.0: a tensor that torch negates by a bit alone crosses DLPack with the opposite sign.
#
# The imaginary part of a conjugate is a view whose memory holds the opposites of its values, and a bit of the tensor
# says so. `numpy()` refuses such a tensor. `__dlpack__`, and the C functions of `__dlpack_c_exchange_api__`, describe
# its memory as if the bit were not set, so numpy.from_dlpack and torch.from_dlpack give every value with the wrong sign
# and nothing says so. autograd stores a gradient with the bit in `.grad` as it is where it has no gaps, as for a
# parameter of one element, so whoever reads gradients by their address or through DLPack steps the wrong way.
#
# Seen: imag(conj(1 + 2i)) is -2 in torch and 2 in numpy and torch behind DLPack; a gradient with the bit set arrives in
# `.grad` with the bit set; resolve_neg() before mends all of it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import torch


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.complex(torch.zeros_like(grad), grad).conj().imag


print("torch", torch.__version__, "numpy", numpy.__version__)
part = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
print("is_neg:", part.is_neg(), "torch:", part.tolist())
assert part.is_neg() and part.tolist() == [-2.0, 4.0]
behind = numpy.from_dlpack(part).tolist(), torch.from_dlpack(part).tolist()
print("behind DLPack, numpy and torch:", *behind)
assert behind == ([2.0, -4.0], [2.0, -4.0]), behind
assert numpy.from_dlpack(part.resolve_neg()).tolist() == [-2.0, 4.0]
try:
    part.numpy()
    raise SystemExit("numpy() did not refuse")
except RuntimeError as error:
    print("numpy():", error)

weight = torch.ones(1, requires_grad=True)
Negated.apply(weight).sum().backward()
behind = numpy.from_dlpack(weight.grad).tolist()
print("gradient:", weight.grad.tolist(), "is_neg:", weight.grad.is_neg(), "behind DLPack:", behind)
assert weight.grad.tolist() == [-1.0]
assert weight.grad.is_neg() and behind == [1.0]
PYTHON
