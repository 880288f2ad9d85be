"""What holds weights and optimizer state is its owner's alone, whatever the umask says."""

from __future__ import annotations

import pytest
from launching import run_ranks

JOB = """
import stat
from pathlib import Path
from torch import nn
import zeroxide
from zeroxide import zero

umask, param, optimizer = int(sys.argv[1], 8), sys.argv[2], sys.argv[3]
folder = Path(os.environ["JOB_FOLDER"])
scratch, slices = folder / "scratch", folder / "slices"
slices.mkdir(exist_ok=True)
ranks.barrier()
os.umask(umask)

def home(device):
    return {"device": device, **({"nvme_path": str(scratch)} if device == "nvme" else {})}

def look(path, seen):
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
        mode = stat.S_IMODE(status.st_mode)
        assert mode == (0o700 if stat.S_ISDIR(status.st_mode) else 0o600), (path, oct(mode))
        seen.append(str(path))

def look_everywhere():
    # Everything under the scratch folder, and every file that this process has open there or that has no name.
    seen = []
    for top in [scratch] if scratch.exists() else []:
        for path in [top, *top.rglob("*")]:
            look(path, seen)
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if "memfd" in target or target.startswith((str(scratch), str(slices))):
            look(f"/proc/self/fd/{number}", seen)
            seen[-1] += f" {target}"
    return seen

settings = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "offload_param": home(param), "offload_optimizer": home(optimizer)},
}
sliced = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(slices)}}}
torch.manual_seed(0)
files = []
import mmap as maps
opened = maps.mmap
def noted(number, *rest, **more):
    if number >= 0:
        files.append(stat.S_IMODE(os.fstat(number).st_mode))
    return opened(number, *rest, **more)
maps.mmap = noted
with zero.Init(config_dict_or_path=sliced):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
maps.mmap = opened
assert files and all(mode & 0o077 == 0 for mode in files), files
engine = zeroxide.initialize(model=model, config=settings)[0]
engine.backward(engine(torch.randn(2, 64)).square().mean())
engine.step()
found = look_everywhere()
kinds = {name for name in ("LOCK", "header", "blocks.bin", "memfd") if any(name in path for path in found)}
say(" ".join(sorted(kinds)))
ranks.barrier()
engine.destroy()
"""


@pytest.mark.parametrize(
    ("umask", "param", "optimizer", "kinds"),
    [
        ("0", "nvme", "nvme", "LOCK blocks.bin memfd"),
        ("377", "cpu", "nvme", "LOCK blocks.bin memfd"),
    ],
)
def test_nobody_else_can_read_what_an_engine_keeps(umask, param, optimizer, kinds):
    for result in run_ranks(2, JOB, [umask, param, optimizer]):
        assert result.code == 0, result.err
        assert set(kinds.split()) <= set(result.out.split()), result.out
