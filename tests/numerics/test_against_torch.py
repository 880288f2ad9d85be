"""The engine beside plain PyTorch: low-precision weights, an fp32 master copy, torch.optim.AdamW, the same clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bound import BETAS, EPS, Bound, half_up
from models import FAMILIES, batches, build, loss_of
from running import Mode, config_of, decay_groups, started, state_of
from torch import nn

CLIP = 0.5
MODE = Mode("nvme", "nvme", "split", 2, "auto", 8192, 1 << 20)


def record_gradients(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Every gradient as it arrives, before the engine takes it."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            seen[name] = []
            param.register_hook(lambda grad, name=name: seen[name].append(grad.detach().clone()))
    return seen


ROUND = {"bf16": half_up, "fp16": torch.Tensor.half, "fp32": torch.Tensor.float}
"""fp32 to live weights."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt", "bf16"),
        ("gpt", "fp16"),
        ("gpt", "fp32"),
        ("partly-frozen", "bf16"),
        ("partly-frozen", "fp16"),
        ("hf-llama", "bf16"),
        ("conv", "fp32"),
    ],
)
def test_masters_follow_torch_adamw_fed_the_same_gradients(family, dtype, tmp_path):
    steps = 50
    model = build(family).train()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    names = {id(param): name for name, param in model.named_parameters()}
    groups = decay_groups(model)
    masters = {name: nn.Parameter(value.float().clone()) for name, value in start.items()}
    plain_groups = [{**group, "params": [masters[names[id(p)]] for p in group["params"]]} for group in groups]
    plain = torch.optim.AdamW(plain_groups, lr=1e-3, betas=BETAS, eps=EPS, foreach=False, fused=False)
    bounds = {names[id(p)]: Bound(p.shape) for group in groups for p in group["params"]}
    worst = 0.0
    seen = record_gradients(model)
    config = config_of(MODE, tmp_path, dtype, gradient_clipping=CLIP, gradient_accumulation_steps=2)
    # A power of two, that changes on the way; gradients and norm are divided by it exactly.
    config["fp16"] |= {"initial_scale_power": 6, "loss_scale_window": 20}
    with started(model, model_parameters=groups, config=config) as engine:
        feed = iter(batches(family, 2 * steps))
        for _ in range(steps):
            scale = engine.loss_scale()
            for _ in range(2):
                engine.backward(loss_of(engine(**next(feed))))
                engine.step()
            grads = {name: sum(parts[1:], parts[0]).float() / scale for name, parts in seen.items()}
            for parts in seen.values():
                parts.clear()
            # One rounding a product and n - 1 a sum: 4096 + n / 4096 roundings of 2^-53 each are far below 1e-9.
            norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
            assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-9)
            clip = min(1.0, CLIP / (norm + 1e-6))
            for group in plain.param_groups:
                for param in group["params"]:
                    name = next(name for name, master in masters.items() if master is param)
                    param.grad = grads[name] * clip
                    bounds[name].step(param.detach(), param.grad, group["lr"], group["weight_decay"])
            plain.step()
        for name, (master, _, _) in state_of(engine).items():
            if name not in bounds:
                assert torch.equal(master, ROUND[dtype](start[name]).float()), f"{name} is frozen"
                continue
            apart = (master.double() - masters[name].detach().double()).abs()
            worst = max(worst, (apart / (2 * bounds[name].dp)).max().item())
            assert not torch.equal(masters[name], start[name].float())
        assert engine.skipped_steps == 0
        assert scale == {"fp16": 2.0**8}.get(dtype, 1.0)
    assert worst <= 1.0
    # The bound is of use only if it is far below what training does: 50 steps of about 1e-3 each.
    assert max(bound.dp.max().item() for bound in bounds.values()) < 1e-4


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((name, dtype) for name in FAMILIES for dtype in FAMILIES[name].dtypes),
        *((name, "fp16") for name in ("gpt", "used-twice", "recurrent", "hf-gpt2", "hf-llama", "hf-t5")),
    ],
)
def test_first_forward_and_backward_are_those_of_the_plain_model(family, dtype, tmp_path):
    """The same operations on the same weights: the same bits, up to the order of sums inside one matrix product.

    That order may depend on alignment, which the flat buffer changes; torch's CPU kernels do not use it, so equality
    is asked for.
    """
    model = build(family).train()
    # Weights lie contiguous in the flat buffer: torch's convolutions sum in another order for other layouts.
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for param in plain.parameters():
        param.data = ROUND[dtype](param.data)
    for buffer_owner in plain.modules():
        for name, buffer in buffer_owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                buffer_owner._buffers[name] = buffer.to(ROUND[dtype](torch.ones(1)).dtype)
    (batch,) = batches(family, 1)
    seen = record_gradients(model)
    config = config_of(MODE, tmp_path, dtype)
    config["fp16"]["initial_scale_power"] = 4
    with started(model, config=config) as engine:
        scale = engine.loss_scale()
        loss = loss_of(engine(**batch))
        engine.backward(loss)
    assert scale == (2.0**4 if dtype == "fp16" else 1.0)
    expected = loss_of(plain(**batch))
    (expected.float() * scale).backward()
    assert torch.equal(loss, expected)
    for name, param in plain.named_parameters():
        if param.requires_grad and param.grad is not None:
            got = sum(seen[name][1:], seen[name][0])
            assert torch.equal(got, param.grad), name


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt", "bf16"), ("gpt", "fp16"), ("gpt", "fp32"), ("hf-gpt2", "bf16"), ("conv", "fp32")]
)
def test_losses_follow_plain_training(family, dtype, tmp_path):
    """Free-running for 50 steps. Masters stay within `Bound`, a few fp32 ulp, so forward sees the same bf16 weights but
    for the few whose master lies that close to a rounding boundary; each of those moves by one bf16 ulp, 2^-8 of
    itself at most, as does every activation behind it. A loss then moves by less than the rounding of its own logits:
    2^-7 of it for bf16 and 2^-10 for fp16; for fp32, whose ulp is 2^-23, by the bound's own growth, 1e-4 with room.
    """
    steps, lr = 50, 1e-3
    relative = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 1e-4}[dtype]
    model = build(family).train()
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    live = [param for param in plain.parameters() if param.requires_grad]
    masters = [param.detach().clone().float() for param in live]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.1)
    feed = batches(family, steps)
    mine, theirs = [], []
    config = config_of(MODE, tmp_path, dtype, gradient_clipping=CLIP)
    config["optimizer"]["params"] = {"lr": lr, "weight_decay": 0.1}
    scale = 2.0**8 if dtype == "fp16" else 1.0
    config["fp16"]["loss_scale"] = scale
    with started(model, config=config) as engine:
        for batch in feed:
            loss = loss_of(engine(**batch))
            engine.backward(loss)
            engine.step()
            mine.append(loss.item())
    for batch in feed:
        for param, master in zip(live, masters, strict=True):
            param.data = ROUND[dtype](master)
        loss = loss_of(plain(**batch))
        (loss * scale).backward()
        theirs.append(loss.item())
        for param, master in zip(live, masters, strict=True):
            master.grad = param.grad.float() / scale
            param.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
    assert mine[0] == theirs[0]
    assert mine == pytest.approx(theirs, rel=relative)
    assert len(set(theirs)) > steps // 4


def test_a_tie_is_the_only_difference_to_torch_rounding():
    """Half-up and half-even give the same bf16 but for exact ties with an even lower neighbour: there, one ulp more."""
    from zeroxide import _core
    from zeroxide.device.placement import spec

    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(3))
    ties = (bits[:1000] & ~0xFFFF) | 0x8000
    values = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    values = values[values.isfinite()]
    mine = torch.empty_like(values, dtype=torch.bfloat16)
    _core.round_bf16(spec(values), spec(mine))
    theirs = values.bfloat16()
    raw = values.view(torch.int32).to(torch.int64) & 0xFFFF_FFFF
    even_below = ((raw & 0xFFFF) == 0x8000) & ((raw >> 16 & 1) == 0)
    assert even_below.sum() > 100
    apart = mine.view(torch.int16).to(torch.int64) - theirs.view(torch.int16).to(torch.int64)
    assert torch.equal(apart, even_below.long())
