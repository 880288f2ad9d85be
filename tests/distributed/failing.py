"""A job of which one rank is lost while it trains. Arguments: the config as JSON, the phase, and how it is lost.

Rank 1 comes to the phase of its third step and stays there, or raises; with a signal, rank 0 sends it then. What is
lost is counted to 15 s, which is said aloud, and so is whom a rank blames whose wait for others ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from families import build, micro_batch

import zeroxide
from zeroxide.errors import RanksError

LOST_AT = 2

torch.set_num_threads(1)
config, phase, way = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
here = Path(os.environ["JOB_FOLDER"]) / "here"
model = build("gpt")
engine, *_ = zeroxide.initialize(model=model, config=config)
victim = engine.global_rank == 1


def send() -> None:
    while not here.exists():
        time.sleep(0.01)
    # Let the others come to where they wait.
    time.sleep(0.5)
    os.kill(int(here.read_text()), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[way])
    threading.Thread(target=lambda: (time.sleep(15), print("15 s", flush=True)), daemon=True).start()


def lose() -> None:
    if way == "raise":
        raise ValueError("labels are out of range")
    if way == "leave":
        engine.destroy()
        sys.exit(0)
    aside = here.with_suffix(".part")
    aside.write_text(str(os.getpid()))
    aside.rename(here)
    while True:
        time.sleep(0.01)


if way in ("kill", "stop") and engine.global_rank == 0:
    threading.Thread(target=send, daemon=True).start()


def train() -> None:
    for step in range(LOST_AT + 2):
        now = victim and step == LOST_AT
        if now and phase == "forward":
            model.h[2].register_forward_pre_hook(lambda *_: lose())
        if now and phase == "backward":
            model.h[2].register_full_backward_hook(lambda *_: lose())
        loss = engine(**micro_batch("gpt", step))
        engine.backward(loss)
        if now and phase == "step":
            lose()
        engine.step()
        print("step", step, flush=True)


try:
    train()
except RanksError as error:
    # Only a wait of the core gives its error a `line`.
    print("blames", list(error.ranks), "in Python" if error.line is None else "in the core", flush=True)
    raise
engine.destroy()
