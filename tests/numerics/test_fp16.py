"""fp16 training: the same bits in every offload mode, overflows that skip one step, and norms without the scale."""

from __future__ import annotations

import math

import pytest
import torch
from models import batches, build, loss_of
from running import Mode, Outcome, assert_same, config_of, same_bits, started, state_of, weights_of
from torch import nn

from zeroxide.errors import ConfigError, NumericsError

HOST = Mode()
CPU = Mode("cpu", "cpu", "fp32", 2)
DISK = Mode("nvme", "nvme", "fp32", 2, "auto", 8192, 1 << 20)
MIXED = Mode("nvme", "cpu", "fp32", 1, "threads", 8192, 1 << 20, 0)
MODES = [HOST, CPU, DISK]


def fp16(mode, directory, *, scaling=None, **more):
    """The mode in fp16, with weights at a scale at which gradients of the tiny models stay finite."""
    config = config_of(mode, directory, "fp16", **more)
    config["fp16"] |= {"initial_scale_power": 6} if scaling is None else scaling
    return config


def training_state(engine):
    """Live weights and exact state by parameter."""
    return weights_of(engine), state_of(engine)


def assert_unchanged(engine, before):
    weights, state = before
    now = weights_of(engine)
    assert [name for name in weights if not same_bits(weights[name], now[name])] == []
    for name, parts in state_of(engine).items():
        assert all(same_bits(a, b) for a, b in zip(parts, state[name], strict=True)), name


def run(family, mode, directory, steps=20):
    """Two micro-batches a step with everything on, from the default scale, at which the first steps overflow."""
    model = build(family).train()
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    scaling = {"loss_scale_window": 4, "hysteresis": 2, "auto_cast": True}
    config = fp16(
        mode, directory, scaling=scaling, gradient_clipping=0.5, gradient_accumulation_steps=2, scheduler=scheduler
    )
    outcome, scales = Outcome(), []
    with started(model, config=config) as engine:
        for number, batch in enumerate(batches(family, 2 * steps)):
            loss = loss_of(engine(**batch))
            engine.backward(loss)
            engine.step()
            outcome.losses.append(loss.item())
            if number % 2:
                norm = float(engine.get_global_grad_norm())
                outcome.norms.append(norm if math.isfinite(norm) else None)
                outcome.rates.append(engine.get_lr())
                scales.append(engine.loss_scale())
        assert engine.skipped_steps == outcome.norms.count(None)
        assert engine.global_steps == steps
        outcome.weights, outcome.state = training_state(engine)
        outcome.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return outcome, scales


@pytest.mark.parametrize("family", ["gpt", "gpt-nonreentrant", "partly-frozen", "sometimes-unused", "conv", "hf-llama"])
def test_modes_agree(family, tmp_path):
    expected, scales = run(family, HOST, tmp_path)
    for mode in (CPU, DISK, MIXED):
        got, other = run(family, mode, tmp_path)
        assert_same(got, expected, str(mode))
        assert other == scales
    assert len(set(expected.losses)) > 20, "it trains"
    assert len(set(scales)) >= 2, "the scale moved"
    assert all(weight.dtype == torch.float16 for weight in expected.weights.values())


def test_live_weights_are_the_master_as_torch_casts_it(tmp_path):
    outcome, _ = run("partly-frozen", DISK, tmp_path, steps=5)
    for name, (master, _, _) in outcome.state.items():
        assert torch.equal(outcome.weights[name], master.half()), name
    frozen = dict(build("partly-frozen").named_parameters())["wte.weight"]
    assert torch.equal(outcome.weights["wte.weight"], frozen.half())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_overflow_skips_one_step_and_nothing_else(mode, tmp_path):
    """Infinity in one of two micro-batches. The run goes on as one that never saw them, bit for bit.

    With one unit of hysteresis to use up, the scale is not halved, so that even the gradients are the same.
    """
    feed = batches("gpt", 8)
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    ends = []
    for spoiled in ((), (4, 5)):
        config = fp16(mode, tmp_path, gradient_accumulation_steps=2, gradient_clipping=1.0, scheduler=schedule)
        with started(build("gpt"), config=config) as engine:
            for number, batch in enumerate(feed):
                if number == 4:
                    before, rate = training_state(engine), engine.get_lr()
                if number in (4, 5) and not spoiled:
                    continue
                loss = engine(**batch)
                engine.backward(loss * math.inf if number == 5 else loss)
                engine.step()
                if number != 5:
                    continue
                assert engine.optimizer.overflow
                assert not engine.was_step_applied()
                assert engine.get_global_grad_norm() == math.inf
                assert_unchanged(engine, before)
                assert engine.get_lr() == rate
            assert engine.skipped_steps == int(bool(spoiled))
            assert not engine.optimizer.overflow
            assert engine.loss_scale() == 2.0**6
            ends.append((training_state(engine), engine.get_lr(), float(engine.get_global_grad_norm())))
    (state, *rest), (other, *other_rest) = ends
    assert rest == other_rest
    assert all(same_bits(state[0][name], other[0][name]) for name in state[0])
    assert all(same_bits(a, b) for name in state[1] for a, b in zip(state[1][name], other[1][name], strict=True))


def test_the_scale_follows_overflows_and_is_seen(tmp_path):
    (batch,) = batches("gpt", 1)
    scaling = {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 4}
    with started(build("gpt"), config=fp16(HOST, tmp_path, scaling=scaling)) as engine:
        assert engine.fp16_enabled()
        assert engine.dynamic_loss_scale()
        seen = []
        for factor in (1, math.inf, math.nan, 1, math.inf, 1, 1, 1):
            engine.backward(engine(**batch) * factor)
            engine.step()
            scale = engine.loss_scale()
            assert engine.optimizer.loss_scale == engine.optimizer.cur_scale == scale
            seen.append((scale, engine.skipped_steps))
        assert seen == [(16, 0), (16, 1), (8, 2), (8, 2), (4, 3), (4, 3), (4, 3), (8, 3)]


def test_an_overflow_at_the_smallest_scale_is_an_error_with_the_weights_intact(tmp_path):
    (batch,) = batches("gpt", 1)
    scaling = {"initial_scale_power": 0, "hysteresis": 1}
    with started(build("gpt"), config=fp16(DISK, tmp_path, scaling=scaling)) as engine:
        before = training_state(engine)
        engine.backward(engine(**batch) * math.inf)
        with pytest.raises(NumericsError, match="smallest loss scale, 1"):
            engine.step()
        assert_unchanged(engine, before)
        engine.backward(engine(**batch))
        engine.step()
        assert engine.was_step_applied()


@pytest.mark.parametrize("scale", [1.0, 100.0, 2.0**8])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_static_scale_changes_neither_norm_nor_update(mode, scale, tmp_path):
    """The norm is that of the gradients as they arrive, divided by the scale, and clipping goes by that norm.

    The norm is a double-precision sum, so that a few of its roundings and the one of the division, all of 2^-53, stay
    far below 1e-12. exp_avg is (1 - beta1) of the gradient times a factor that is rounded once: 4 roundings of 2^-24.
    """
    (batch,) = batches("gpt", 1)
    clip = 0.25
    model = build("gpt")
    seen = {}
    for name, param in model.named_parameters():
        param.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad.clone()))
    with started(model, config=fp16(mode, tmp_path, scaling={"loss_scale": scale}, gradient_clipping=clip)) as engine:
        for _ in range(2):
            seen.clear()
            engine.backward(engine(**batch))
            engine.step()
            grads = {name: sum(parts[1:], parts[0]).double() / scale for name, parts in seen.items()}
            norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
            assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-12)
            assert norm > clip
            assert engine.loss_scale() == scale
            if engine.global_steps == 1:
                for name, (exp_avg,) in state_of(engine, ["exp_avg"]).items():
                    expected = grads[name] * ((1 - 0.9) * clip / (norm + 1e-6))
                    assert torch.allclose(exp_avg.double(), expected, rtol=4 * 2.0**-24, atol=1e-40), name
        assert not engine.dynamic_loss_scale()
        engine.backward(engine(**batch) * math.inf)
        engine.step()
        assert (engine.skipped_steps, engine.loss_scale()) == (1, scale)


@pytest.mark.parametrize("mode", [HOST, DISK], ids=str)
def test_backward_by_hand_needs_the_scale_and_gives_the_same_bits(mode, tmp_path):
    feed, ends = batches("gpt", 3), []
    for by_hand in (False, True):
        with started(build("gpt"), config=fp16(mode, tmp_path)) as engine:
            for batch in feed:
                loss = engine(**batch)
                if by_hand:
                    engine.scale(loss).backward()
                else:
                    assert same_bits(engine.backward(loss), loss)
                engine.step()
            ends.append(state_of(engine))
            before = training_state(engine)
            engine(**feed[0]).backward()
            with pytest.raises(RuntimeError, match=r"not scaled: fp16 needs engine\.backward"):
                engine.step()
            assert_unchanged(engine, before)
            engine.zero_grad()
            engine.backward(engine(**feed[0]))
            engine.step()
            assert engine.was_step_applied()
    for name, parts in ends[0].items():
        assert all(same_bits(a, b) for a, b in zip(parts, ends[1][name], strict=True)), name


class Steep(nn.Module):
    """A gradient of 40 000 for every weight: finite in fp16, and twice as much is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self):
        return self.weight.float().sum() * 40_000


@pytest.mark.parametrize(("dtype", "skipped"), [(None, 1), ("fp16", 1), ("fp32", 0)])
def test_a_sum_that_overflows_is_found_in_fp16_and_fits_in_fp32(dtype, skipped, tmp_path):
    config = fp16(HOST, tmp_path, scaling={"loss_scale": 1})
    config["data_types"] = {"grad_accum_dtype": dtype}
    with started(Steep(), config=config) as engine:
        for _ in range(2):
            engine.backward(engine())
        engine.step()
        assert engine.skipped_steps == skipped
        assert engine.was_step_applied() is not bool(skipped)
        if not skipped:
            assert engine.get_global_grad_norm() == pytest.approx(80_000 * math.sqrt(8), rel=1e-12)


def test_inputs_are_cast_where_that_is_asked_for(tmp_path):
    (batch,) = batches("conv", 1)
    plain = build("conv").to(memory_format=torch.contiguous_format).half()
    expected = plain(batch["images"].half(), batch["classes"])
    for asked in (True, False):
        scaling = {"auto_cast": asked, "loss_scale": 4}
        with started(build("conv"), config=fp16(HOST, tmp_path, scaling=scaling)) as engine:
            if asked:
                assert torch.equal(engine(**batch), expected)
                assert torch.equal(engine(batch["images"], classes=batch["classes"]), expected)
            else:
                with pytest.raises(RuntimeError, match="same"):
                    engine(**batch)


def test_the_shortcut_trains_and_split_is_refused(tmp_path):
    config = config_of(HOST, tmp_path)
    del config["bf16"], config["fp16"], config["zeroxide"]["format"]
    with started(build("gpt"), config=config, dtype="fp16") as engine:
        assert engine.fp16_enabled()
        assert not engine.bfloat16_enabled()
        assert {weight.dtype for weight in weights_of(engine).values()} == {torch.float16}
    config["zeroxide"]["format"] = "split"
    with (
        pytest.raises(ConfigError, match=r"needs bf16\.enabled, got fp16"),
        started(build("gpt"), config=config, dtype="fp16"),
    ):
        pass


def test_without_the_check_a_step_is_applied_whatever_its_gradients(tmp_path):
    (batch,) = batches("gpt", 1)
    for check in (True, False):
        config = config_of(HOST, tmp_path, gradient_clipping=1.0)
        config["bf16"]["check_grad_overflow"] = check
        with started(build("gpt"), config=config) as engine:
            engine.backward(engine(**batch) * math.nan)
            engine.step()
            assert engine.optimizer.overflow is check
            assert engine.skipped_steps == int(check)
            assert engine.was_step_applied() is not check
            assert any(weight.isnan().any() for weight in weights_of(engine).values()) is not check
