#!/bin/sh
# torch 2.15.0: pipeline schedules that split backward call some parameters' post-accumulate hooks and not others'.
#
# A hook of register_post_accumulate_grad_hook is the usual place to reduce, offload or step a gradient as soon as it is
# there. Schedules of torch.distributed.pipelining with a zero bubble compute the gradients of weights in a second half of
# backward, which writes .grad beside autograd: hooks of register_hook hear of it, post-accumulate hooks do not. Which
# micro-batches are split depends on the schedule, so such a hook is called now and then, and its absence is not an error.
#
# Seen: two ranks with two stages each, 4 micro-batches, linear layers with bias, rank 0. ScheduleInterleaved1F1B calls both
# kinds of hooks 16 times; ScheduleInterleavedZeroBubble, with the same gradients, the first 16 times and the second 8.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat > "$folder/ranks.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
layers = [nn.Linear(4, 4) for _ in range(4)]
x, y = torch.randn(8, 4), torch.randn(8, 4)
own = [layers[rank], layers[rank + 2]]
params = [param for layer in own for param in layer.parameters()]
calls = {"register_hook": 0, "register_post_accumulate_grad_hook": 0}


def counted(name):
    def hook(_):
        calls[name] += 1

    return hook


for param in params:
    for name in calls:
        getattr(param, name)(counted(name))
found = []
for kind in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble):
    calls.update(dict.fromkeys(calls, 0))
    for param in params:
        param.grad = None
    stages = [PipelineStage(layer, rank + 2 * at, 4, torch.device("cpu")) for at, layer in enumerate(own)]
    schedule = kind(stages, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    schedule.step(*([x] if rank == 0 else []), **({"target": y} if rank == 1 else {}))
    found.append((*calls.values(), [param.grad.clone() for param in params]))
    if rank == 0:
        print(kind.__name__, calls)
if rank == 0:
    for one, other in zip(found[0][2], found[1][2]):
        torch.testing.assert_close(one, other)
    print("torch", torch.__version__)
    assert [each[:2] for each in found] == [(16, 16), (16, 8)], found
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/ranks.py"
