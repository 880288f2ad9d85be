"""A call of the core that waits for another rank keeps nothing that another thread of the process needs.

The other rank is a second core in the same process, so that it can be silent for ever. Each case runs in a process of
its own: a lock that is kept, the interpreter's among them, stops all of its threads.
"""

from __future__ import annotations

import pytest
from launching import run_ranks

PROGRAM = """
import sys
import threading
import time

import torch

from zeroxide import _core
from zeroxide.device.placement import spec
from zeroxide.errors import CoreError, RanksError

ELEMENTS = 8192
ADAM = _core.Adam(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, bias_correction=True)
waiting_in, end = sys.argv[1:]


def made(rank):
    unit = _core.UnitSpec(
        name="layer", params=[(ELEMENTS, True)], weights=_core.WeightHome.HOST, state=_core.StateHome.HOST,
        optimizer=ADAM, format="fp32",
    )
    settings = _core.Settings(
        limit=None, threads=1, compute="f32", grad="f32", tile_elements=2048, staging_bytes=0, gathered_bytes=0,
        engine=_core.IoEngine.AUTO, queue_depth=1, directories=[], job="", comm_dtype="f32", reduce_scale=0.5,
        mesh=_core.MeshPosition(rank=rank, shards=2, replicas=1, transport=_core.Transport.SHARED),
    )
    return _core.Offload(settings, [unit])


ones, out, raw = torch.ones(ELEMENTS), torch.empty(ELEMENTS), torch.zeros(16, dtype=torch.uint8)
rows = torch.zeros(1, dtype=torch.int64)
core, silent = cores = [made(rank) for rank in (0, 1)]
handles = [each.segment_handle() for each in cores]
for each in cores:
    each.join(handles)
for each in cores:
    each.fill_begin(0, "weight")
    each.fill_param(0, 0, 0, spec(ones))
    each.fill_commit(0)


def exchange():
    for each in cores:
        each.accumulate(0, 0, 0, spec(ones), False)
        each.send(0)
    core.receive(0, True)


def wait():
    if waiting_in == "receive":
        core.receive(0, True)
    elif waiting_in == "gather":
        core.gather(0)
    else:
        core.accumulate(0, 0, 0, spec(ones), False)


# The other rank has not sent the unit; has not read what was sent; has not made the step.
if waiting_in == "receive":
    core.accumulate(0, 0, 0, spec(ones), False)
    core.send(0)
elif waiting_in == "gather":
    exchange()
    silent.receive(0, True)
    core.step([ADAM], 1.0)
else:
    exchange()

calls = {
    "accumulate": lambda: core.accumulate(0, 0, 0, spec(ones), False),
    "accumulate_rows": lambda: core.accumulate_rows(0, 0, ELEMENTS, spec(rows), spec(ones[:1])),
    "accumulated": lambda: core.accumulated(),
    "away_runs": lambda: core.away_runs(0, [ADAM]),
    "beside": lambda: core.beside(0),
    "check_usable": lambda: core.check_usable(),
    "bringer": lambda: core.bringer().take(),
    "clear_gradients": lambda: core.clear_gradients(),
    "cover": lambda: core.cover(0),
    "fill_begin": lambda: core.fill_begin(0, "exp_avg"),
    "fill_bytes": lambda: core.fill_bytes(0, 0, 0, spec(raw)),
    "fill_commit": lambda: core.fill_commit(0),
    "fill_param": lambda: core.fill_param(0, 0, 0, spec(ones)),
    "finish": lambda: core.finish(),
    "gather": lambda: core.gather(0),
    "gather_ahead": lambda: core.gather_ahead(0),
    "gradient_arrived": lambda: core.gradient_arrived(0, 0),
    "gradient_room": lambda: core.gradient_room(0, 0),
    "grad_norm": lambda: core.grad_norm(),
    "has_gradient": lambda: core.has_gradient(0, 0),
    "has_room": lambda: core.has_room(0),
    "incoming": lambda: core.incoming(0),
    "io": lambda: core.io(),
    "join": lambda: core.join(handles[:1]),
    "lend": lambda: core.lend(0, spec(ones), spec(ones)),
    "note_gradient": lambda: core.note_gradient(0, 0),
    "note_norm": lambda: core.note_norm(0, 0, 1.0, False),
    "outgoing": lambda: core.outgoing(0),
    "param_offset": lambda: core.param_offset(0, 0),
    "pieces": lambda: core.pieces(0),
    "kept_pieces": lambda: core.kept_pieces(0),
    "kept_gradients": lambda: core.kept_gradients(0),
    "prefetch": lambda: core.prefetch(0),
    "read_bytes": lambda: core.read_bytes(0, 0, 0, spec(raw)),
    "read_param": lambda: core.read_param(0, 0, "weight", 0, spec(out[: ELEMENTS // 2])),
    "receive": lambda: core.receive(0, False),
    "receive_from": lambda: core.receive_from(0),
    "recorder": lambda: (core.recorder().start(8), core.recorder().stop()),
    "receive_sum": lambda: core.receive_sum(0, spec(ones[: ELEMENTS // 2])),
    "release": lambda: core.release(0),
    "room": lambda: core.room("incoming"),
    "rewrite_weights": lambda: core.rewrite_weights(0),
    "segment_handle": lambda: core.segment_handle(),
    "send": lambda: core.send(0),
    "set_accumulated": lambda: core.set_accumulated(bytes([0])),
    "set_all_shards_valid": lambda: core.set_all_shards_valid(0),
    "set_lazy": lambda: core.set_lazy(0),
    "set_group": lambda: core.set_group(0, 0, 0),
    "set_updates": lambda: core.set_updates(0, 0, 0),
    "shard": lambda: core.shard(0),
    "step": lambda: core.step([ADAM], 1.0),
    "updates": lambda: core.updates(0, 0),
    "usage": lambda: core.usage(),
    "watch_readers": lambda: core.watch_readers(),
    "window": lambda: core.window(0),
    "write_bytes": lambda: core.write_bytes(0, 0, 0, spec(raw)),
    "write_param": lambda: core.write_param(0, 0, "weight", 0, spec(ones)),
}
ends = {"cancel": lambda: core.cancel("rank 1 is gone", [1]), "close": lambda: core.close()}
# Nothing works after it.
last = {"fail_step": lambda: core.fail_step("a kernel failed", False)}
every = {name for name in dir(core) if not name.startswith("_")}
assert set(calls) | set(ends) | set(last) == every, set(calls) ^ every
# The only calls that may themselves wait for the silent rank.
peers = {"accumulate", "accumulate_rows", "gather", "gather_ahead", "gradient_room", "send"}

outcomes = {}


def run(name, call):
    try:
        call()
        outcomes[name] = "returned"
    except (CoreError, RanksError) as error:
        outcomes[name] = f"{type(error).__name__}: {error}"


def started(name, call):
    thread = threading.Thread(target=run, args=(name, call), daemon=True)
    thread.start()
    return thread


first = started("first", wait)
while first.ident is None:
    time.sleep(0.01)
time.sleep(0.3)
assert first.is_alive(), outcomes
maybe = {}
for name, call in calls.items():
    thread = started(name, call)
    # Long enough for a busy machine; one that waits for the other rank is left to itself.
    thread.join(0.2 if name in peers else 30)
    if thread.is_alive():
        assert name in peers, f"{name} hangs"
        maybe[name] = thread
until = time.monotonic() + 2
for thread in maybe.values():
    thread.join(max(0.0, until - time.monotonic()))
later = {name: thread for name, thread in maybe.items() if thread.is_alive()}
assert first.is_alive(), outcomes
started(end, ends[end]).join(30)
assert end in outcomes, f"{end} hangs"
line = "rank 1 is gone" if end == "cancel" else "the engine was closed while this call waited for other ranks"
for name, thread in {"first": first, **later}.items():
    thread.join(30)
    assert not thread.is_alive(), f"{name} hangs after {end}"
assert outcomes["first"] == f"RanksError: {line}", outcomes
for name in later:
    assert outcomes[name].startswith(("RanksError", "CoreError")), (name, outcomes[name])
for name, call in last.items():
    started(name, call).join(30)
    assert name in outcomes, f"{name} hangs"
core.close()
print("done", sorted(later))
"""


@pytest.mark.parametrize("end", ["cancel", "close"])
@pytest.mark.parametrize("waiting_in", ["receive", "gather", "accumulate"])
def test_every_call_returns_while_one_waits_for_a_rank_that_is_silent(waiting_in, end):
    """Catches: the core's lock kept while other ranks are waited for, the interpreter's lock kept by any call, a wait
    that neither the watch nor the end of the engine ends."""
    (ran,) = run_ranks(1, PROGRAM, [waiting_in, end], timeout=240, preamble="")
    assert ran.code == 0, ran.out + ran.err
    assert ran.out.startswith("done")
