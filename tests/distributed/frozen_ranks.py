"""What each rank of the tests of frozen bits runs: every rank draws other bytes, and rank 0's are what all must show.

Arguments: what to do, stage, offload, transport, precision, folder.
"""

import os
import sys
from pathlib import Path

import torch
from frozen_models import Mixed, bytes_by_name, drawn, expected_kept, raw_bytes

import zeroxide
from zeroxide import zero

KINDS = [torch.complex128, torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.bits16, torch.uint8]
KINDS += [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int4, torch.bool]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(seed):
    model = Mixed(seed, buffers=False, dtypes=KINDS)
    generator = torch.Generator().manual_seed(seed)
    model.register_buffer("wide", drawn(torch.complex128, (3, 2), generator))
    model.register_buffer("turned", drawn(torch.int64, (3, 2), generator).t())
    model.register_buffer("expanded", drawn(torch.uint8, (1, 4), generator).expand(3, 4))
    model.register_buffer("none", torch.empty(0, dtype=torch.complex64))
    return model


def start(model, stage, offload, transport, precision, folder):
    home = {"device": offload, "nvme_path": str(folder)} if offload == "nvme" else {"device": offload}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": int(stage), "offload_optimizer": home},
        "zeroxide": {"tile_bytes": 8192, "staging_bytes": 1 << 20, "threads": 1, "transport": transport},
    }
    if stage == "3":
        config["zero_optimization"]["offload_param"] = home
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return zeroxide.initialize(model=model, config=config)[0]


def train(engine, precision):
    engine.backward(engine(torch.ones(2, 8, dtype=PRECISIONS[precision])))
    engine.step()


def shown(model):
    with zero.GatheredParameters(model.parameters()):
        return bytes_by_name(model.kept())


def check(found, expected, what):
    wrong = [name for name, value in expected.items() if found.get(name) != value]
    assert not wrong, f"{what}: {len(wrong)} of {len(expected)} differ: {wrong[:5]}"
    assert expected


def main(act, stage, offload, transport, precision, folder):
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    compute = PRECISIONS[precision]
    first, second = build(0), build(100)
    expected, new = expected_kept(first, compute), expected_kept(second, compute)
    buffers = {name: (each.dtype, bytes(raw_bytes(each).tolist())) for name, each in first.named_buffers()}
    if act == "init":
        with zero.Init(dtype=None if precision == "fp32" else compute):
            model = build(rank)
    else:
        model = build(rank if act == "train" else rank + 50)
    engine = start(model, stage, offload, transport, precision, folder)
    if act == "load":
        engine.load_checkpoint(Path(folder) / "saved")
        expected = new
    check(shown(model), expected, "at first")
    found = {name: (each.dtype, bytes(raw_bytes(each).tolist())) for name, each in model.named_buffers()}
    assert found == buffers, [name for name in found if found[name] != buffers[name]]
    train(engine, precision)
    check(
        {name: (None, None, bytes(raw.tolist())) for name, raw in model.seen.items()},
        {name: (None, None, expected[name][2]) for name in model.seen if name in expected},
        "in forward",
    )
    if act != "load":
        with zero.GatheredParameters(model.parameters(), modifier_rank=world - 1):
            if rank == world - 1:
                for name, param in model.kept():
                    if name in new:
                        raw_bytes(param).copy_(raw_bytes(second.get_parameter(name)))
        expected = new
    train(engine, precision)
    check(shown(model), expected, "after a change")
    state = engine.module_state_dict()
    if rank == 0:
        check(bytes_by_name(state.items()), expected, "state dict")
    engine.load_module_state_dict(state)
    check(shown(model), expected, "loaded state dict")
    engine.save_checkpoint(Path(folder) / ("saved" if act == "train" else "again"))
    engine.destroy()
    if stage != "3":
        check(bytes_by_name(model.kept()), expected, "left behind")


main(*sys.argv[1:])
