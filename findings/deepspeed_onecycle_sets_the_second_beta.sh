#!/bin/sh
# deepspeed 0.19.8, its schedule OneCycle: asking for a cycle of the learning rate also changes Adam's second beta.
#
# cycle_momentum, which is on unless a config turns it off, is described as moving the first beta between
# cycle_min_mom and cycle_max_mom. While it does, the second beta is 0.99, whatever the optimizer was made with and from
# the first step on: a config that says "betas": [0.9, 0.95] trains with another one, and says nothing. The first step,
# whose rate is the lowest, has the lowest momentum too, though the two are to move against one another; the second step
# then jumps to nearly the highest.
#
# Seen: second betas 0.99 and 0.99 of groups made with 0.95 and 0.999, and first betas 0.8, then 0.89.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.15.0 numpy==2.4.6 setuptools wheel
DS_BUILD_OPS=0 venv/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8
cat > show.py <<'PYTHON'
import os

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from deepspeed.runtime.lr_schedules import OneCycle

one, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
optimizer = torch.optim.AdamW([{"params": [one], "betas": (0.9, 0.95)}, {"params": [other]}], lr=1e-3)
schedule = OneCycle(optimizer, cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=10)
firsts, seconds = [], []
for _ in range(2):
    firsts.append(optimizer.param_groups[0]["betas"][0])
    seconds.append([group["betas"][1] for group in optimizer.param_groups])
    schedule.step()
print("second betas of the two groups, step by step:", seconds)
print("first beta:", [round(each, 4) for each in firsts])
assert seconds == [[0.99, 0.99]] * 2
assert firsts[0] == 0.8 and abs(firsts[1] - 0.89) < 1e-9
PYTHON
venv/bin/python show.py 2>/dev/null
