#!/bin/sh
# torch 2.15.0: Module.to("meta") and Module.to_empty() make two parameters of a tied one, and say nothing.
#
# A module keeps a tied weight tied when it is moved between CPU and GPU, because each parameter stays the object that it
# is and gets other data. Where a tensor cannot be another one's data, as between the CPU and the meta device, torch makes
# a new parameter, once for every module that has it. The model then has a weight more, which an estimate of its size
# counts, and which is trained apart from the other one after to_empty(), the usual way from the meta device to memory.
#
# Seen: an embedding tied to its head, 64,000 parameters; after .to("meta") 128,000, after building it on the meta device
# 64,000, and after to_empty() 128,000. .to(torch.float64) keeps the tie.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embedding.weight


def look(what, model):
    tied = model.head.weight is model.embedding.weight
    count = sum(each.numel() for each in model.parameters())
    print(f"{what}: tied {tied}, {count} parameters")
    return tied, count


print("torch", torch.__version__)
assert look("built", Tied()) == (True, 64000)
assert look(".to(torch.float64)", Tied().to(torch.float64)) == (True, 64000)
assert look('.to("meta")', Tied().to("meta")) == (False, 128000)
with torch.device("meta"):
    model = Tied()
assert look("built on the meta device", model) == (True, 64000)
assert look("after to_empty()", model.to_empty(device="cpu")) == (False, 128000)
PYTHON
