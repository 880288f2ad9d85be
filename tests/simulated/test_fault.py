"""A host that touches device memory ends with a line that says so, and other faults go where they went before."""

from __future__ import annotations

import signal

import pytest

from simulated.programs import run

LINE = "simulated device: the host touches device memory at 0x{:016x}, which is memory of sim:{}"

TOUCH = """
import ctypes
there = torch.ones(8, device=sys.argv[1])
print(there.data_ptr() + 8, flush=True)
if sys.argv[2] == "read":
    ctypes.string_at(there.data_ptr() + 8, 1)
elif sys.argv[2] == "write":
    ctypes.memset(there.data_ptr() + 8, 1, 1)
else:
    torch.frombuffer((ctypes.c_char * 8).from_address(there.data_ptr() + 8), dtype=torch.float32).sum()
print("went on", flush=True)
"""


@pytest.mark.parametrize(("where", "how"), [("sim:0", "read"), ("sim:1", "write"), ("sim:0", "tensor")])
def test_a_host_that_touches_device_memory(where, how):
    ended = run(TOUCH, where, how)
    assert ended.returncode == -signal.SIGSEGV
    assert ended.stderr.splitlines() == [LINE.format(int(ended.stdout), where[-1])]


def test_the_handler_that_was_there_before_is_heard_as_well():
    """It tells from where the host has touched it."""
    ended = run("import faulthandler; faulthandler.enable()\n" + TOUCH, "sim", "read")
    assert ended.returncode == -signal.SIGSEGV
    assert ended.stderr.splitlines()[0] == LINE.format(int(ended.stdout), 0)
    assert "Segmentation fault" in ended.stderr
    assert "string_at" in ended.stderr


def test_a_handler_that_goes_on_is_heard_once():
    """Python's own returns, and the instruction would fault for ever."""
    ended = run("import signal; signal.signal(signal.SIGSEGV, lambda *_: None)\n" + TOUCH, "sim", "read")
    assert ended.returncode == -signal.SIGSEGV
    assert ended.stderr.splitlines() == [LINE.format(int(ended.stdout), 0)]


ELSEWHERE = """
import ctypes, faulthandler
faulthandler.enable()
torch.ones(1, device="sim")
ctypes.string_at(8)
"""


def test_a_fault_elsewhere_goes_to_the_handler_before():
    ended = run(ELSEWHERE)
    assert ended.returncode == -signal.SIGSEGV
    assert "simulated device" not in ended.stderr
    assert "Segmentation fault" in ended.stderr


WINDOWS = """
import ctypes
from torch import nn
import zeroxide

def begin():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    disk = {"device": "nvme", "nvme_path": sys.argv[1]}
    config = {"zero_optimization": {"stage": 3, "offload_param": disk}}
    views, values = [], []
    for module in model:
        module.register_forward_hook(lambda module, *_: views.append(module.weight.detach().view(-1)[:]))
        values.append(module.weight.detach().clone())
    engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-3)
    with torch.no_grad():
        engine(torch.ones(1, 4))
    return engine, views, values

if sys.argv[2] == "device first":
    there = torch.ones(1, device="sim")
    engine, views, values = begin()
else:
    engine, views, values = begin()
    there = torch.ones(1, device="sim")
if sys.argv[2] == "engine twice":
    engine.destroy()
    engine, views, values = begin()
print(all(view.equal(value.view(-1)) for view, value in zip(views, values)), there.data_ptr(), flush=True)
ctypes.string_at(there.data_ptr(), 1)
"""


@pytest.mark.parametrize("order", ["device first", "engine first", "engine twice"])
def test_windows_of_the_engine_are_served_beside_it(tmp_path, order):
    """Both have a handler: each takes its own faults and passes on the others, whichever came last."""
    ended = run(WINDOWS, str(tmp_path), order)
    served, address = ended.stdout.split()
    assert served == "True"
    assert ended.returncode == -signal.SIGSEGV
    assert LINE.format(int(address), 0) in ended.stderr
