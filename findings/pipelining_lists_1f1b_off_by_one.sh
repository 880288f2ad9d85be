#!/bin/sh
# torch 2.15.0: the list of a 1F1B schedule's actions gives the last rank a forward of a micro-batch that is not there.
#
# torch.distributed.pipelining shows and exports its schedules by get_schedule_ops. For "1F1B" the last rank's forwards are
# numbered from 1 on: micro-batch 0 is never computed, and one is that does not exist. What Schedule1F1B.step runs is
# right, since it does not follow its list; whoever estimates bubbles or runs the list does not get what is trained.
#
# Seen: 4 ranks, 8 micro-batches. Ranks 0 to 2 have forwards 0 to 7, rank 3 has 1 to 8; GPipe has 0 to 7 everywhere.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops


def forwards(schedule):
    ranks = get_schedule_ops(schedule, 4, 8)
    named = [[str(action) for action in rank if action is not None] for rank in ranks]
    return [[int(each.split("F")[1]) for each in rank if each[1:2] == "F"] for rank in named]


print("torch", torch.__version__)
for schedule in ("GPipe", "1F1B"):
    print(schedule, forwards(schedule))
assert forwards("GPipe") == [list(range(8))] * 4
assert forwards("1F1B") == [list(range(8))] * 3 + [list(range(1, 9))]
PYTHON
