"""Rows of docs/deepspeed.md about numbers: what a run comes to, against plain torch, closed forms or DeepSpeed's rules.

One linear layer or two are enough: each row is about what surrounds the model.
"""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from running import started
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.config import LossScale
from zeroxide.errors import ConfigError, ModelError
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.reduce import large_weights as large

BETAS = (0.9, 0.999)
LR = 2.0**-10
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": list(BETAS)}}}
OFF = {"gradient_clipping": 0}
FEW = {"zeroxide": {"threads": 1}}
STAGES = [0, 1, 2, 3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def config(stage=0, dtype=None, **more):
    """A config that says nothing of what it is not asked for."""
    sections = {} if dtype in (None, "fp32") else {dtype: {"enabled": True}}
    return {**ADAM, **FEW, "zero_optimization": {"stage": stage}, **sections, **more}


def linear(inputs=8, outputs=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).to(dtype)


def first_moment(param):
    """The gradient of the only step so far, from exp_avg = (1 - beta1) g: two roundings of 2^-24 from it."""
    return zeroxide.safe_get_full_optimizer_state(param, "exp_avg").double() / (1 - BETAS[0])


class Rotary(nn.Module):
    """A frequency table that bf16 has no room for, beside buffers of other dtypes."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8) / 8))
        self.register_buffer("clock", torch.tensor([1790000123.25], dtype=torch.float64))
        self.register_buffer("low", torch.tensor([0.1, 3.0], dtype=torch.float16))
        self.register_buffer("count", torch.arange(3), persistent=False)

    def forward(self, x):
        angle = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * self.inv_freq
        return self.proj(x * angle.cos().to(x.dtype))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_buffers(dtype, stage):
    """Logits of a random Llama have the bits of transformers' own; every kind of buffer keeps its own.

    Its parameters are rounded before, so that rounding is no part of it. Catches: buffers cast to the dtype of the
    weights, in the engine or in zero.Init.
    """
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    plain = transformers.LlamaForCausalLM(shape).eval()
    for param in plain.parameters():
        param.data = param.data.to(DTYPES[dtype])
    ids = torch.randint(0, 64, (1, 512), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        low = copy.deepcopy(plain).to(DTYPES[dtype])(input_ids=ids).logits
    assert not torch.equal(low, expected), "cast buffers would be seen"
    with started(copy.deepcopy(plain), config=config(stage, dtype)) as engine, torch.no_grad():
        assert torch.equal(engine.eval()(input_ids=ids).logits, expected)

    with zero.Init(dtype=DTYPES[dtype], enabled=stage == 3):
        model = Rotary()
    before = {name: value.clone() for name, value in Rotary().named_buffers()}
    with started(model, config=config(stage, dtype)):
        for name, value in model.named_buffers():
            assert value.dtype is before[name].dtype, name
            assert torch.equal(value, before[name]), name
    with started(Rotary(), config=config(stage, dtype, data_types={"buffer_dtype": "fp32"})) as engine:
        found = {name: value.dtype for name, value in engine.module.named_buffers()}
        assert found == {**dict.fromkeys(("inv_freq", "clock", "low"), torch.float32), "count": torch.int64}


def test_batch_norm(caplog):
    """Catches: statistics left in fp32, which ends in "expected scalar type BFloat16 but found Float" in forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6).bfloat16()
    for types in ({"buffer_dtype": "fp32"}, {"keep_in_fp32_modules": ["running"]}):
        with pytest.raises(ModelError, match="1 would have statistics in float32 as data_types asks") as caught:
            zeroxide.initialize(model=model, config=config(0, "bf16", data_types=types))
        assert caught.value.name == "1.running_mean"
    plain = copy.deepcopy(model).bfloat16().train()
    with started(model.train(), config=config(0, "bf16")) as engine:
        assert any("1.running_mean and 1 more" in line for line in caplog.messages)
        # The engine rounds half up and torch half to even; these weights have no ties.
        assert torch.equal(engine(x), plain(x))
        assert torch.equal(model[1].running_mean, plain[1].running_mean)
    plain = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    with started(plain, config=config(0, "bf16")) as engine:
        assert engine(torch.randn(3, 4).bfloat16()).dtype is torch.bfloat16
        assert plain[0].running_mean.dtype is torch.float32


class Router(nn.Module):
    """A routing bias under a name that its class lists, and one that its parent's class lists."""

    _keep_in_fp32_modules_strict = ("routing_bias",)

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("routing_bias", torch.full((3,), 5.5, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.full((3,), 0.25, dtype=torch.bfloat16))


class Routed(nn.Module):
    _keep_in_fp32_modules = ("sc*le",)

    def __init__(self):
        super().__init__()
        self.router = Router()
        self.register_buffer("routing_bias", torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "types", "fp32"),
    [
        ("bf16", {}, {"router.routing_bias"}),
        ("fp16", {}, {"router.routing_bias", "router.scale"}),
        ("fp32", {}, set()),
        ("bf16", {"keep_in_fp32_modules": "auto"}, {"router.routing_bias"}),
        ("bf16", {"keep_in_fp32_modules": ["router.*"]}, {"router.routing_bias", "router.scale"}),
        ("bf16", {"keep_in_fp32_modules": []}, set()),
        ("bf16", {"buffer_dtype": "bf16"}, {"router.routing_bias"}),
    ],
)
def test_keep_in_fp32(dtype, types, fp32):
    """Catches: the lists ignored, those of fp16 honoured under bf16, a class's list applied outside of it, and a cast
    to buffer_dtype of what is kept."""
    model = Routed()
    with started(model, config=config(0, dtype, data_types=types)):
        assert {name for name, value in model.named_buffers() if value.dtype is torch.float32} == fp32
        assert model.router.routing_bias.tolist() == [5.5] * 3


@pytest.mark.parametrize(
    ("given", "limit"),
    [({}, 1.0), ({"gradient_clipping": "auto"}, 1.0), (OFF, None), ({"gradient_clipping": 0.25}, 0.25)],
)
def test_clipping(given, limit, caplog):
    """The first moment is (1 - beta1) g min(1, limit / (|g| + 1e-6)), with g of plain torch in float64."""
    model, x = linear(), torch.full((2, 8), 3.0)
    plain = copy.deepcopy(model).double()
    plain(x.double()).sum().backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
    assert norm > 10
    factor = 1.0 if limit is None else limit / (norm + 1e-6)
    with caplog.at_level(logging.WARNING, "zeroxide"), started(model, config=config(**given)) as engine:
        assert engine.gradient_clipping() == (limit or 0.0)
        engine.backward(engine(x).sum())
        engine.step()
        # The norm is within 1e-6 of exact, as are the fp32 gradient and its product.
        assert torch.allclose(first_moment(model.weight), plain.weight.grad * factor, rtol=4e-6, atol=0)
    told = [line for line in caplog.messages if "gradient_clipping" in line]
    assert told == (
        ["gradient_clipping is 1, the default; 0 is none"] if given.get("gradient_clipping", "auto") == "auto" else []
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_own_dtype(stage, dtype):
    """Weights stay what they are, and the master moves by lr where the live weight has no room for it.

    Adam's first update is lr g / (|g| + eps), so lr to a part in 1e5 of gradients of 1e-3 and more; the master is near
    1, where fp32 rounds by 2^-24 and bf16 and fp16 cannot show a change of 2^-13. Catches: a model without a section
    made fp32, and a low model without exact masters.
    """
    model = linear(dtype=DTYPES[dtype])
    model.weight.data.fill_(1.0)
    off = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    step = 2.0**-13
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": step}}}
    with started(model, config=config(stage, **OFF, **off, **adam)) as engine:
        assert (engine.bfloat16_enabled(), engine.fp16_enabled()) == (dtype == "bf16", dtype == "fp16")
        assert engine.dynamic_loss_scale() is (dtype == "fp16")
        out = engine(torch.ones(2, 8, dtype=DTYPES[dtype]))
        assert out.dtype is DTYPES[dtype]
        engine.backward(out.float().sum() * 2.0**-7)
        engine.step()
        assert engine.was_step_applied()
        master = zeroxide.safe_get_full_fp32_param(model.weight)
        assert torch.allclose(master, torch.full_like(master, 1 - step), rtol=0, atol=2.0**-24 + step * 1e-5)
        with zero.GatheredParameters(model.weight):
            assert model.weight.dtype is DTYPES[dtype]
    # A section that is on, and dtype=, count before the model.
    for more in ({"dtype": "fp32"}, {"config": config(stage, **OFF, data_types={"param_dtype": "fp32"})}):
        with started(linear(dtype=DTYPES[dtype]), **{"config": config(stage, **OFF), **more}) as engine:
            assert engine.resolved_config.precision.dtype == "fp32"


def test_odd_dtypes():
    """Catches: torch's own message, or a cast nobody asked for."""
    with pytest.raises(ModelError, match=r"weight has no shape yet.*one batch before"):
        zeroxide.initialize(model=nn.LazyLinear(4), config=config())
    with pytest.raises(ModelError, match=r'weight is float64: .*dtype="fp32"'):
        zeroxide.initialize(model=linear(dtype=torch.float64), config=config())
    mixed = nn.Sequential(linear(), linear(4, 4).bfloat16())
    with pytest.raises(ModelError, match=r"several dtypes: float32 \(first 0.weight\), bfloat16 \(first 1.weight\)"):
        zeroxide.initialize(model=mixed, config=config())
    frozen = nn.Sequential(linear().double().requires_grad_(False), linear(4, 4).bfloat16())
    with started(frozen, config=config()) as engine:
        assert engine.resolved_config.precision.dtype == "bf16", "that of what is trained"
    with started(linear(dtype=torch.float64), config=config(), dtype="fp32") as engine:
        assert engine(torch.ones(1, 8)).dtype is torch.float32
    with started(nn.Sequential(linear(), linear(4, 4).bfloat16()), config=config(0, "bf16")) as engine:
        assert engine(torch.ones(1, 8).bfloat16()).dtype is torch.bfloat16


class Words(nn.Module):
    """An embedding looked up twice for some rows, and a head; loss and logits are both outputs."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.to(dtype)

    def forward(self, ids):
        logits = self.head(torch.tanh(self.words(ids)))
        return {"loss": nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()), "logits": logits}


def moments(engine):
    return {name: zeroxide.safe_get_full_optimizer_state(p, "exp_avg") for name, p in engine.module.named_parameters()}


@pytest.mark.parametrize("lean", [False, True], ids=["dense", "large"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_plain_backward(stage, dtype, lean, monkeypatch):
    """Four steps: every style, and all of them in one window, has the bits of `engine.backward`; and those are a
    quarter of the sum over plain torch. Catches: gradients of plain backward left as they are, those of large modules
    alone, those of engine.backward divided again, and a division at loss and logits both.
    """
    if lean:
        monkeypatch.setattr(large, "LARGE", 1)
    feed = [torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    styles = {
        "engine": lambda engine, loss: engine.backward(loss),
        "scale": lambda engine, loss: engine.scale(loss).backward(),
        "plain": lambda engine, loss: loss.backward(),
    }
    if dtype == "fp16":
        del styles["plain"]
    runs = {name: [style] * 4 for name, style in styles.items()} | {"mixed": (list(styles.values()) * 2)[:4]}
    fp16 = {"fp16": {"enabled": True, "loss_scale": 4.0}} if dtype == "fp16" else {}
    found = {}
    for name, run in runs.items():
        options = config(stage, dtype, gradient_accumulation_steps=4, **OFF) | fp16
        with started(Words(DTYPES[dtype]), config=options) as engine:
            for ids, style in zip(feed, run, strict=True):
                style(engine, engine(ids)["loss"])
                engine.step()
            assert (engine.global_steps, engine.skipped_steps) == (1, 0)
            found[name] = moments(engine)
    for name in runs:
        assert all(torch.equal(value, found["engine"][each]) for each, value in found[name].items()), name
    if dtype != "fp32":
        return
    plain = Words(torch.float64)
    plain.load_state_dict({key: value.double() for key, value in Words(torch.float32).state_dict().items()})
    for ids in feed:
        plain(ids)["loss"].backward()
    for name, param in plain.named_parameters():
        # Sums of fewer than 64 products of fp32 numbers below 1, each rounded by 2^-24.
        error = (found["plain"][name].double() / (1 - BETAS[0]) - param.grad / 4).abs().max()
        assert error < 64 * 2.0**-24, name


def test_torch_adam():
    for params, decay in (
        ({"torch_adam": True}, 0.01),
        ({"torch_adam": "true"}, 0.01),
        ({"torch_adam": True, "weight_decay": 0.0}, 0.0),
        ({"torch_adam": True, "weight_decay": "auto"}, 0.01),
        ({"torch_adam": False}, 0.0),
        ({}, 0.0),
        ({"torch_adam": True, "adam_w_mode": False}, 0.0),
    ):
        kind = "Adam" if "adam_w_mode" in params else "AdamW"
        with started(linear(), config=FEW | {"optimizer": {"type": kind, "params": params}}) as engine:
            assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [decay], params


def test_loss_scale():
    """DeepSpeed's counting by iteration numbers, over all histories of nine steps with windows of 1 to 3."""
    for window in (1, 2, 3):
        for history in range(2**9):
            scaler = LossScaler(LossScale(initial=2.0**20, window=window, hysteresis=1, minimum=2.0**-20))
            scale, last = 2.0**20, -1
            for now in range(9):
                overflow = bool(history >> now & 1)
                if overflow:
                    scale, last = scale / 2, now
                elif now - last - 1 > 0 and (now - last - 1) % window == 0:
                    scale *= 2
                scaler.update(overflow)
                assert scaler.scale == scale, (window, history, now)


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_last_batch_iteration(kind):
    """From iteration 4 on: optimizer step k runs with the rate of iteration 4 + k of the warm-up over 10 iterations."""
    params = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.011, "warmup_num_steps": 10, "warmup_type": kind}
    schedule = {"scheduler": {"type": "WarmupLR", "params": {**params, "last_batch_iteration": 4}}}
    with started(linear(), config=config(**schedule)) as engine:
        for step in range(10):
            at = 4 + step
            factor = min(1.0, at / 10 if kind == "linear" else math.log(at + 1) / math.log(10)) if at < 10 else 1.0
            assert engine.get_lr() == [pytest.approx(0.001 + 0.01 * factor, rel=1e-12)], step
            engine.backward(engine(torch.ones(1, 8)).sum())
            engine.step()


def test_warmup_type(caplog):
    """The rate after three steps of a log warm-up over 8 iterations is ln(3) / ln(8) of the peak; linear has 2 / 8."""
    for name, factor, warns in (
        ("linear", 0.25, False),
        ("Linear", math.log(3) / math.log(8), True),
        ("LOG", math.log(3) / math.log(8), True),
    ):
        caplog.clear()
        params = {"warmup_max_lr": 1.0, "warmup_num_steps": 8, "warmup_type": name}
        with started(linear(), config=config(scheduler={"type": "WarmupLR", "params": params})) as engine:
            for _ in range(3):
                engine.backward(engine(torch.ones(1, 8)).sum())
                engine.step()
            assert engine.get_lr() == [pytest.approx(factor, rel=1e-12)], name
        assert any("warmup_type" in line for line in caplog.messages) is (warns and name != "LOG") or name == "LOG"
    with pytest.raises(ConfigError, match="warmup_type"):
        zeroxide.initialize(
            model=linear(), config=config(scheduler={"type": "WarmupLR", "params": {"warmup_type": "cosine"}})
        )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_first_update(dtype):
    """Every gradient is 1/8, so that Adam's first update is lr to a part in 1e7, and the masters are below 1."""
    model = linear(dtype=DTYPES[dtype])
    before = model.weight.detach().float()
    with started(model, config=config(0, dtype, **OFF)) as engine:
        # In fp16 a loss scale of 2^16 leaves room for that.
        engine.backward(engine(torch.ones(2, 8, dtype=DTYPES[dtype])).float().sum() * 2.0**-4)
        engine.step()
        after = zeroxide.safe_get_full_fp32_param(model.weight)
    assert torch.allclose(before - after, torch.full_like(after, LR), rtol=0, atol=2 * 2.0**-24)


def test_infinite_gradient():
    model = linear()
    with started(model, config=config()) as engine:
        before = model.weight.detach().clone()
        engine.backward(engine(torch.ones(1, 8)).sum() * math.inf)
        engine.step()
        assert (engine.skipped_steps, engine.was_step_applied()) == (1, False)
        assert torch.equal(model.weight, before)


def test_fp16_stage0():
    """Clipping is at a norm that every step exceeds, and the loss is scaled at both stages."""
    ends = []
    for stage in (0, 1):
        model = linear(dtype=torch.float16)
        with started(model, config=config(stage, "fp16", gradient_clipping=0.5)) as engine:
            assert engine.loss_scale() == 2.0**16
            for step in range(4):
                engine.backward(engine(torch.full((1, 8), 1.0 + step).half()).float().sum() * 2.0**-4)
                engine.step()
            assert engine.get_global_grad_norm() > 0.5
            ends.append((zeroxide.safe_get_full_fp32_param(model.weight), engine.skipped_steps, engine.loss_scale()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_change_in_place():
    model = linear()
    with started(model, config=config(1, **OFF)) as engine:
        with torch.no_grad():
            model.weight.fill_(0.5)
        engine.backward(engine(torch.ones(2, 8)).sum())
        engine.step()
        # The gradient is 2 everywhere, so that the first update is lr.
        assert torch.allclose(model.weight, torch.full_like(model.weight, 0.5 - LR), rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("section", [None, "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_dtypes(stage, section):
    """Catches: a section that casts fp8, integers or parameter classes, and a cast that nobody asked for."""

    class Packed(nn.Parameter):
        pass

    given = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn)
    model = linear(dtype=DTYPES[section or "bf16"])
    for dtype in given:
        name = str(dtype).removeprefix("torch.")
        model.register_parameter(f"{name}_plain", nn.Parameter(torch.ones(5).to(dtype), requires_grad=False))
        model.register_parameter(f"{name}_packed", Packed(torch.ones(5).to(dtype), requires_grad=False))
    with started(model, config=config(stage, section, **OFF)) as engine, zero.GatheredParameters(model.parameters()):
        for dtype in given:
            name = str(dtype).removeprefix("torch.")
            cast = section is not None and dtype in DTYPES.values()
            assert model.get_parameter(f"{name}_plain").dtype is (DTYPES[section] if cast else dtype)
            assert model.get_parameter(f"{name}_packed").dtype is dtype
        assert engine.global_steps == 0
