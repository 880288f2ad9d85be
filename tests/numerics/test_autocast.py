"""Autocast, asked for in the config or opened by the caller, beside plain PyTorch under torch.autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from models import VOCABULARY, WIDTH, batches, build, loss_of, next_token_loss, tokens
from running import Mode, config_of, same_bits, started, state_of, weights_of
from torch import nn

from zeroxide.zero.reduce import large_weights as large

HOST = Mode()
DISK = Mode("nvme", "nvme", "fp32", 2, "auto", 8192, 1 << 20)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ["gpt", "gpt-reentrant", "gpt-nonreentrant", "partly-frozen", "hf-gpt2", "hf-llama"]


class WideHead(nn.Module):
    """Projections with a bias, and an embedding, all of them large once `LARGE` is small."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, input_ids):
        return next_token_loss(self.head(self.up(self.norm(self.wte(input_ids)))), input_ids)


@pytest.fixture
def small_large(monkeypatch):
    """Every weight of the tiny models takes the path of large ones, in several parts."""
    monkeypatch.setattr(large, "LARGE", 1)
    monkeypatch.setattr(large, "PART", 1000)


def gradients(model):
    """Every gradient of a parameter as it arrives, by name."""
    seen = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad.detach().clone()))
    return seen


def plain_step(model, batch, dtype, scale, cache=True):
    """(loss, gradient by name) of plain PyTorch."""
    with torch.autocast("cpu", dtype, cache_enabled=cache):
        loss = loss_of(model(**batch))
    (loss.float() * scale).backward()
    return loss, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("way", ["config", "caller"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, dtype) for name in FAMILIES for dtype in DTYPES), ("recurrent", "bfloat16")],
)
def test_first_forward_and_backward_are_those_of_torch(family, dtype, way, tmp_path):
    model = build(family).train()
    plain = copy.deepcopy(model)
    seen = gradients(model)
    (batch,) = batches(family, 1)
    config = config_of(DISK, tmp_path, "fp32")
    if way == "config":
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    with started(model, config=config) as engine, torch.autocast("cpu", DTYPES[dtype], enabled=way == "caller"):
        scale = engine.loss_scale()
        loss = loss_of(engine(**batch))
        engine.backward(loss)
        assert {weight.dtype for weight in weights_of(engine).values()} == {torch.float32}
    # Whether casts of weights are kept matters where a weight is used twice by products that autocast lowers.
    expected, grads = plain_step(plain, batch, DTYPES[dtype], scale, cache=way == "caller")
    assert scale == (2.0**16 if way == "config" and dtype == "float16" else 1.0)
    assert same_bits(loss, expected)
    assert not torch.equal(loss, loss_of(plain(**batch))), "autocast makes a difference"
    for name, grad in grads.items():
        assert same_bits(sum(seen[name][1:], seen[name][0]), grad), name
    assert seen.keys() == grads.keys()


@pytest.mark.parametrize("way", ["config", "caller"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_modules_compute_in_the_dtype_of_autocast(dtype, way, tmp_path, small_large):
    """Their gradients do not pass through autograd: the first moment shows them, a tenth, after two roundings."""
    torch.manual_seed(0)
    model = WideHead()
    plain = copy.deepcopy(model)
    batch = tokens(torch.Generator().manual_seed(1))
    config = config_of(HOST, tmp_path, "fp32")
    if way == "config":
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    with started(model, config=config) as engine:
        assert isinstance(model.head.weight, large.LargeParameter), "the leaner path is in use"
        with torch.autocast("cpu", DTYPES[dtype], enabled=way == "caller"):
            loss = engine(**batch)
        scale = engine.loss_scale()
        engine.backward(loss)
        engine.step()
        assert engine.was_step_applied()
        moments = state_of(engine, ["exp_avg"])
    expected, grads = plain_step(plain, batch, DTYPES[dtype], scale)
    assert same_bits(loss, expected)
    for name, (exp_avg,) in moments.items():
        assert torch.allclose(exp_avg / (1 - 0.9), grads[name] / scale, rtol=4 * 2.0**-24, atol=1e-38), name
        low = grads[name].to(DTYPES[dtype]).float()
        if name in ("head.weight", "up.weight"):
            assert torch.equal(low, grads[name]), f"{name} is a product in the low dtype"


@pytest.mark.parametrize("dtype", DTYPES)
def test_offload_modes_agree(dtype, tmp_path):
    ends = []
    for mode in (HOST, Mode("cpu", "cpu", "fp32", 2), DISK):
        config = config_of(mode, tmp_path, "fp32", gradient_clipping=0.5, gradient_accumulation_steps=2)
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
        losses = []
        with started(build("gpt"), config=config) as engine:
            for batch in batches("gpt", 20):
                loss = engine(**batch)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            assert engine.global_steps > engine.skipped_steps
            ends.append((losses, engine.skipped_steps, engine.loss_scale(), state_of(engine)))
    for *figures, state in ends[1:]:
        assert tuple(figures) == ends[0][:-1]
        for name, parts in state.items():
            assert all(same_bits(a, b) for a, b in zip(parts, ends[0][-1][name], strict=True)), name


def test_an_autocast_around_several_steps_sees_the_new_weights(tmp_path):
    """torch keeps casts of weights until its autocast ends; those of weights that a step changed must not be used."""
    ends = []
    for around in (False, True):
        losses = []
        with (
            started(build("gpt"), config=config_of(HOST, tmp_path, "fp32")) as engine,
            torch.autocast("cpu", torch.bfloat16, enabled=around),
        ):
            for batch in batches("gpt", 3):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = engine(**batch)
                with torch.autocast("cpu", enabled=False):
                    engine.backward(loss)
                    engine.step()
                losses.append(loss.item())
        ends.append(losses)
    assert ends[0] == ends[1]


def test_an_evaluation_before_leaves_nothing_to_the_forward_that_trains(tmp_path):
    """Both inside an autocast of the caller's: a cast of a weight that was kept from no_grad would have no gradient."""
    (batch,) = batches("gpt", 1)
    config = config_of(DISK, tmp_path, "fp32")
    config["torch_autocast"] = {"enabled": True}
    norms = []
    for evaluate in (False, True):
        with started(build("gpt"), config=config) as engine, torch.autocast("cpu", torch.bfloat16):
            if evaluate:
                with torch.no_grad():
                    engine(**batch)
            engine.backward(engine(**batch))
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
    assert norms[0] == norms[1]
