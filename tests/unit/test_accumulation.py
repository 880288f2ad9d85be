"""Accumulating gradients: every micro-batch counts, in the dtype asked for, wherever the state is."""

from __future__ import annotations

import copy

import pytest
import torch
from models import batches, build, loss_of
from running import Mode, config_of, same_bits, started, state_of, weights_of

HOST = Mode()
CPU = Mode("cpu", "cpu", "fp32", 2)
CPU_STATE = Mode("none", "cpu", "split")
DISK = Mode("nvme", "nvme", "split", 2, "auto", 8192, 1 << 20)
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**4
STEPS = 3


def half_up(values):
    """fp32 to bf16 as live weights are rounded: ties towards larger magnitude."""
    bits = values.view(torch.int32).to(torch.int64)
    return ((bits + 0x8000) >> 16 << 16).to(torch.int32).view(torch.float32).bfloat16()


def config_for(mode, directory, dtype, kept, **more):
    config = config_of(mode, directory, dtype, **more)
    config["fp16"]["loss_scale"] = SCALE
    config["data_types"] = {"grad_accum_dtype": kept}
    return config


def plain_sum(family, feed, dtype, kept):
    """The gradients of plain PyTorch for each micro-batch, one after the other summed in fp32 and kept as `kept`."""
    plain = copy.deepcopy(build(family)).train()
    for param in plain.parameters():
        param.data = half_up(param.data) if dtype == "bf16" else param.data.to(TORCH[dtype])
    scale = SCALE if dtype == "fp16" else 1.0
    total, last = {}, {}
    for batch in feed:
        plain.zero_grad()
        (loss_of(plain(**batch)) / len(feed) * scale).backward()
        for name, param in plain.named_parameters():
            if param.grad is not None:
                before = total.get(name)
                total[name] = (param.grad if before is None else before.float() + param.grad.float()).to(TORCH[kept])
                last[name] = param.grad
    return (
        {name: value.float() / scale for name, value in total.items()},
        {name: value.float() / scale for name, value in last.items()},
    )


@pytest.mark.parametrize(
    ("dtype", "kept"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]
)
@pytest.mark.parametrize("mode", [HOST, CPU, CPU_STATE, DISK], ids=str)
@pytest.mark.parametrize("family", ["gpt", "sometimes-unused"])
def test_every_micro_batch_is_in_the_gradient(family, mode, dtype, kept, tmp_path):
    """The first moment after one step is (1 - beta1) of the gradient, which is exactly that of plain PyTorch.

    Forward and backward have torch's bits, and every sum is one rounding to a known dtype, so that nothing but the
    product with 1 - beta1 is rounded: that constant is held to 48 bits, which leaves 2 roundings of 2^-24.
    """
    feed = batches(family, STEPS)
    config = config_for(mode, tmp_path, dtype, kept, gradient_accumulation_steps=STEPS)
    with started(build(family).train(), config=config) as engine:
        for batch in feed:
            assert engine.global_steps == 0
            engine.backward(loss_of(engine(**batch)))
            engine.step()
        assert (engine.global_steps, engine.skipped_steps) == (1, 0)
        moments = {name: parts[0].double() / (1 - 0.9) for name, parts in state_of(engine, ["exp_avg"]).items()}
    expected, last = plain_sum(family, feed, dtype, kept)
    for name, moment in moments.items():
        grad = expected.get(name, torch.zeros_like(moment)).double()
        assert torch.allclose(moment, grad, rtol=2 * 2.0**-24, atol=1e-40), name
    # The gradients of the micro-batches differ, so that one of them alone, or one too few, would be seen.
    assert any((last[name] - expected[name]).abs().max() > 0.1 * expected[name].abs().max() for name in last)


def test_the_dtype_of_the_sum_matters(tmp_path):
    """Sums in bf16 and in fp32 differ: the test above would notice the wrong one."""
    feed = batches("gpt", STEPS)
    (low, _), (exact, _) = (plain_sum("gpt", feed, "bf16", kept) for kept in ("bf16", "fp32"))
    assert all(not torch.equal(low[name], exact[name]) for name in low)


@pytest.mark.parametrize("mode", [HOST, DISK], ids=str)
def test_the_caller_may_own_the_boundary(mode, tmp_path):
    """Two backward passes or three, then one step: the weights of a config that counts as many."""
    for count in (2, 3):
        feed, ends = batches("gpt", 2 * count), []
        for managed in (True, False):
            steps = count if managed else 7
            config = config_of(
                mode, tmp_path, "fp32", gradient_accumulation_steps=steps, managed_gradient_accumulation=managed
            )
            with started(build("gpt"), config=config) as engine:
                for number, batch in enumerate(feed, 1):
                    loss = engine(**batch)
                    if managed:
                        engine.backward(loss)
                        engine.step()
                        continue
                    assert not engine.is_gradient_accumulation_boundary(), "only inside step"
                    engine.backward(loss / count, scale_wrt_gas=False)
                    if number % count == 0:
                        engine.step()
                        assert engine.was_step_applied()
                assert engine.global_steps == 2
                ends.append(weights_of(engine))
        assert all(same_bits(value, ends[1][name]) for name, value in ends[0].items())


def test_a_boundary_that_was_told_gives_way_to_the_config(tmp_path):
    for managed in (True, False):
        config = config_of(HOST, tmp_path, gradient_accumulation_steps=2, managed_gradient_accumulation=managed)
        with started(build("gpt"), config=config) as engine:
            engine.set_gradient_accumulation_boundary(False)
            assert not engine.is_gradient_accumulation_boundary()
            engine.set_gradient_accumulation_boundary(True)
            assert engine.is_gradient_accumulation_boundary()
            engine.set_gradient_accumulation_boundary(None)
            assert not engine.is_gradient_accumulation_boundary()
            engine.backward(engine(**batches("gpt", 1)[0]))
            engine.step()
            assert engine.was_step_applied() is not managed, "one micro-batch of two, and every step"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_dividing_by_the_steps_can_be_left_out(dtype, tmp_path):
    """Four steps are a power of two, so that four times the gradient has exactly four times the norm."""
    (batch,) = batches("gpt", 1)
    norms = []
    for divided in (True, False):
        config = config_for(HOST, tmp_path, dtype, "fp32", gradient_accumulation_steps=4)
        with started(build("gpt"), config=config) as engine:
            engine.set_gradient_accumulation_boundary(True)
            loss = engine(**batch)
            assert torch.equal(engine.backward(loss, scale_wrt_gas=divided), loss / 4 if divided else loss)
            engine.step()
            norms.append(engine.get_global_grad_norm().item())
    # In fp16 the smallest gradients round, each by 2^-25 of the scale at most: far below a thousandth of the norm.
    assert norms[1] == (4 * norms[0] if dtype == "fp32" else pytest.approx(4 * norms[0], rel=1e-3))


def test_no_sync_accumulates_as_any_backward_does(tmp_path):
    feed, ends = batches("gpt", 4), []
    for inside in (False, True):
        with started(build("gpt"), config=config_of(HOST, tmp_path, gradient_accumulation_steps=2)) as engine:
            for number, batch in enumerate(feed):
                if inside and number % 2 == 0:
                    with engine.no_sync():
                        engine.backward(engine(**batch))
                else:
                    engine.backward(engine(**batch))
                engine.step()
            assert engine.global_steps == 2
            ends.append(weights_of(engine))
    assert all(same_bits(value, ends[1][name]) for name, value in ends[0].items())


def test_a_retained_graph_is_differentiated_again(tmp_path):
    (batch,) = batches("gpt", 1)
    norms = []
    for times in (1, 2):
        with started(build("gpt"), config=config_of(DISK, tmp_path, "fp32")) as engine:
            loss = engine(**batch)
            for left in reversed(range(times)):
                engine.backward(loss, retain_graph=left > 0)
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
    assert norms[1] == 2 * norms[0], "twice the same gradient: a power of two is exact"
