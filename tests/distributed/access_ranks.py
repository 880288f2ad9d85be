"""What every rank of the surface tests runs: many cases in one job, each of which says "ok NAME" when it has held.

Oracles are plain torch on one process: every rank computes them for itself.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError

sys.path.insert(0, str(Path(__file__).parents[1]))
from access_engines import ENGINES, config_of, full, ids, live_if_frozen, same, seeded, start, status, values_of
from models import Block, build, next_token_loss

torch.set_num_threads(1)
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# Building in slices --------------------------------------------------------------------------------------------------


def case_init_keeps_rank_zero_s_values_in_slices():
    torch.manual_seed(RANK)
    with zero.Init():
        model = build("gpt")
        model.wte.weight.data.mul_(RANK + 1)  # rank 0's counts: nothing changes
        nn.init.constant_(model.h[1].up.bias, float(RANK + 5))
    expected = values_of(seeded())
    expected["h.1.up.bias"].fill_(5)
    for param in model.parameters():
        each = -(-param.ds_numel // WORLD)
        assert param.numel() == 0
        assert param.ds_tensor.numel() == max(0, min(each, param.ds_numel - RANK * each))
    assert model.head.weight is model.wte.weight
    with zero.GatheredParameters(model.parameters()):
        same(values_of(model), expected)
    for base in ENGINES[:3]:
        torch.manual_seed(RANK)
        with zero.Init():
            model = build("gpt")
            nn.init.constant_(model.h[1].up.bias, 5.0)
        engine = start(model, base)
        same(full(engine), expected)
        engine.destroy()


def case_slices_are_modified_by_one_rank():
    with zero.Init():
        model = build("gpt")
        with zero.GatheredParameters(model.h[0].mix.weight, modifier_rank=1):
            nn.init.constant_(model.h[0].mix.weight, float(RANK))
    with (
        zero.GatheredParameters([None, model.wte.weight, nn.Parameter(torch.ones(2))], modifier_rank=1),
        torch.no_grad(),
    ):
        model.wte.weight.fill_(float(RANK + 1))
    with zero.GatheredParameters(model.parameters()):
        assert bool((model.h[0].mix.weight == 1).all())
        assert bool((model.wte.weight == 2).all())


def case_ranks_may_hold_other_tensors_alive():
    kept = []
    with zero.Init():
        layers = []
        for _ in range(3):
            layers.append(nn.Linear(64, 64, bias=False))
            if RANK == 1:
                kept.append(layers[-1].weight.detach())
        model = nn.ModuleList(layers)
        with torch.no_grad():
            for number, layer in enumerate(model):
                layer.weight.fill_(float(number))
    with zero.GatheredParameters(model.parameters()):
        assert [layer.weight.unique().tolist() for layer in model] == [[0.0], [1.0], [2.0]]


# Access --------------------------------------------------------------------------------------------------------------


def case_access():
    for base in ENGINES:
        for dtype in ("bf16", "fp32"):
            check_access(base, dtype)


def check_access(base, dtype):
    torch.manual_seed(RANK)
    model = build("partly-frozen")
    engine = start(model, base, dtype)
    expected = live_if_frozen(model, dtype, values_of(seeded("partly-frozen")))
    same(full(engine), expected)
    weight, frozen = model.h[2].up.weight, model.wte.weight
    local = zeroxide.safe_get_local_fp32_param(weight)
    parts = engine.ranks.gather_objects(local.tolist())
    joined = parts[0] if base["zero_optimization"]["stage"] == 0 else [value for part in parts for value in part]
    assert joined == expected["h.2.up.weight"].flatten().tolist()

    value = torch.randn(weight.ds_shape, generator=torch.Generator().manual_seed(3))
    zeroxide.safe_set_full_fp32_param(weight, value + RANK)
    zeroxide.safe_set_full_optimizer_state(weight, value.abs(), "exp_avg_sq")
    zeroxide.safe_set_full_fp32_param(frozen, torch.ones(61, 48))
    expected["h.2.up.weight"] = value
    expected["wte.weight"] = torch.ones(61, 48)
    same(full(engine), expected)
    assert torch.equal(zeroxide.safe_get_full_optimizer_state(weight, "exp_avg_sq"), value.abs())
    assert not zeroxide.safe_get_full_optimizer_state(weight, "exp_avg").any()
    assert zeroxide.safe_get_full_optimizer_state(frozen, "exp_avg") is None
    assert zeroxide.safe_get_full_grad(weight) is None

    # Forward sees what was set, on every rank.
    plain = seeded("partly-frozen")
    plain.load_state_dict({**plain.state_dict(), "h.2.up.weight": value, "wte.weight": torch.ones(61, 48)})
    plain.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    with torch.no_grad():
        zero.safe_set_local_fp32_param(weight, zeroxide.safe_get_local_fp32_param(weight) * 2)
        expected["h.2.up.weight"] = value * 2
        plain.h[2].up.weight.mul_(2)
        if dtype == "fp32":
            assert torch.equal(engine(ids(RANK)), plain(ids(RANK)))
    same(full(engine), expected)

    loss = engine(ids(RANK))
    engine.backward(loss)
    if dtype == "fp32":
        for rank in range(WORLD):
            (plain(ids(rank)) / WORLD).backward()
        got = zeroxide.safe_get_full_grad(weight)
        # Sums of a few hundred terms of like size in two orders: a few ulp of the largest.
        torch.testing.assert_close(got, plain.h[2].up.weight.grad, rtol=0, atol=1e-6 * float(got.abs().max()))
    before = zeroxide.safe_get_full_grad(model.h[1].mix.weight)
    zeroxide.safe_set_full_grad(weight, torch.full(weight.ds_shape, 0.5))
    assert bool((zeroxide.safe_get_full_grad(weight) == 0.5).all())
    own = zeroxide.safe_get_local_grad(weight)
    zeroxide.safe_set_local_grad(weight, own * 2)
    assert bool((zeroxide.safe_get_full_grad(weight) == 1).all())
    assert torch.equal(zeroxide.safe_get_full_grad(model.h[1].mix.weight), before)
    grads = {name: zeroxide.safe_get_full_grad(param) for name, param in model.named_parameters()}
    norm = sum(float(grad.double().square().sum()) for grad in grads.values() if grad is not None) ** 0.5
    engine.step()
    assert abs(engine.get_global_grad_norm() - norm) < 1e-6 * norm
    assert zeroxide.safe_get_full_grad(weight) is None
    after = zeroxide.safe_get_full_fp32_param(weight)
    # AdamW of torch from the same state.
    oracle = nn.Parameter(value * 2)
    optimizer = torch.optim.AdamW([oracle], lr=1e-2, weight_decay=engine.optimizer.param_groups[0]["weight_decay"])
    optimizer.state[oracle] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(value), "exp_avg_sq": value.abs()}
    oracle.grad = torch.ones_like(value)
    optimizer.step()
    # Two ulp of the larger of weight and update, and torch's own.
    torch.testing.assert_close(after, oracle.detach(), rtol=4 * 2**-23, atol=1e-7)
    engine.destroy()


def case_gathered_parameters_of_an_engine():
    for base in ENGINES:
        model = seeded()
        exact = values_of(model)
        engine = start(model, base)
        weight, bias = model.h[0].up.weight, model.h[0].up.bias
        with zero.GatheredParameters([weight, bias]):
            assert weight.dtype is torch.bfloat16
            assert weight.shape == (144, 48)
            assert weight.ds_status is zero.ZeroParamStatus.AVAILABLE
            with zero.GatheredParameters(weight):
                pass
            assert weight.shape == (144, 48)
        assert (weight.numel() > 0) == weight.ds_persist
        with zero.GatheredParameters([weight, None, bias], modifier_rank=1), torch.no_grad():
            weight[3].fill_(float(RANK) + 0.5)
            with zero.GatheredParameters(bias, modifier_rank=0):
                bias.fill_(float(RANK) + 8)
        exact["h.0.up.weight"][3] = 1.5
        exact["h.0.up.bias"][:] = 8
        same(full(engine), exact)
        raised = ""
        try:
            with zero.GatheredParameters([weight], modifier_rank=0):
                weight.data = torch.ones(7)
        except ModelError as error:
            raised = str(error)
        assert "expected torch.bfloat16 (144, 48)" in raised, raised
        # Computing inside the context, and training after it.
        with zero.GatheredParameters(model.parameters()):
            engine.backward(engine(ids(RANK)))
            assert weight.shape == (144, 48)
        engine.step()
        assert all((param.numel() > 0) == param.ds_persist for param in model.parameters())
        same(full(engine), full(engine))
        engine.destroy()


def case_visible_parameters():
    """At stages 0 to 2 parameters show what the last step, load or change has left, on every rank."""
    for stage in (0, 1, 2):
        for transport in ("collective", "shared_memory"):
            for more in ({}, {"offload_optimizer": "nvme"}):
                if more and stage == 0:
                    continue
                base = {"zero_optimization": {"stage": stage, **more}, "zeroxide": {"transport": transport}}
                model = seeded()
                expected = values_of(model)
                engine = start(model, base, "fp32")
                assert model.wte.weight.ds_persist
                seen = values_of(model)
                same(seen, expected)
                for step in range(3):
                    engine.backward(engine(ids(step * WORLD + RANK)))
                    engine.step()
                    before, seen = seen, values_of(model)
                    assert not torch.equal(before["h.0.up.weight"], seen["h.0.up.weight"])
                    same(seen, full(engine))
                folder = os.path.join(os.environ["JOB_FOLDER"], f"visible-{stage}-{transport}-{len(more)}")
                engine.save_checkpoint(folder)
                engine.backward(engine(ids(RANK)))
                engine.step()
                engine.load_checkpoint(folder)
                same(values_of(model), seen)
                with zero.GatheredParameters(model.h[0].up.weight, modifier_rank=1):
                    model.h[0].up.weight.data.mul_(0.5)
                assert torch.equal(model.h[0].up.weight, seen["h.0.up.weight"] * 0.5)
                engine.load_module_state_dict(expected, strict=False)
                same(values_of(model), expected)
                # Through shared memory it is one copy for all.
                engine.ranks.barrier()
                with torch.no_grad():
                    model.h[1].up.weight.mul_(0.5)
                engine.backward(engine(ids(RANK)))
                if transport == "collective":
                    engine.step()
                else:
                    with pytest.raises(ModelError, match=r"h\.1\.up\.weight was changed in place"):
                        engine.step()
                engine.ranks.barrier()
                last = values_of(model)
                engine.destroy()
                same(values_of(model), last)


def case_embeddings_that_change_in_forward():
    """Each rank would rescale the rows that it looked up, and only those of its own shard would last."""
    for stage in range(4):
        for transport in ("collective", "shared_memory"):
            base = {"zero_optimization": {"stage": stage}, "zeroxide": {"transport": transport}}
            model = nn.Sequential(nn.Embedding(61, 8, max_norm=0.5), nn.Linear(8, 61))
            with pytest.raises(ModelError, match=r"0 has max_norm = 0\.5"):
                start(model, base, "fp32")


def case_full_state_dicts():
    for base in ENGINES[:4]:
        model = seeded("gpt", seed=RANK)
        engine = start(model, base, "fp32")
        expected = seeded().state_dict()
        got = engine.module_state_dict()
        if RANK == 0:
            same(got, expected)
        else:
            assert got == {}
        # torch's own words: every rank has all of it.
        state = engine.module.state_dict()
        same(state, expected)
        assert state["head.weight"].data_ptr() == state["wte.weight"].data_ptr()
        same(engine.module.h[1].state_dict(prefix="h.1."), {k: v for k, v in expected.items() if k.startswith("h.1.")})
        raised = ""
        try:
            engine.load_module_state_dict({"nothing": torch.ones(1)} if RANK == 0 else {})
        except ModelError as error:
            raised = str(error)
        assert "wte.weight is missing" in raised, raised
        new = {name: value + 1 for name, value in expected.items()}
        engine.load_module_state_dict(new if RANK == 0 else {})
        got = engine.module_state_dict()
        if RANK == 0:
            same(got, new)
        engine.destroy()


# Modules -------------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Experts of which every rank uses another one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, hidden, chosen):
        return self.experts[chosen](hidden)


class RoutedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(61, 48)
        self.routed = Routed()
        self.head = nn.Linear(48, 61)

    def forward(self, input_ids, chosen):
        return next_token_loss(self.head(self.routed(self.wte(input_ids), chosen)), input_ids)


def case_leaf_modules_are_gathered_by_all():
    torch.manual_seed(0)
    model = RoutedModel()
    start_values = values_of(model)
    assert zero.set_z3_leaf_modules(model, [Routed]) == [model.routed]
    engine = start(model, ENGINES[1], "fp32")
    for step in range(3):
        engine.backward(engine(ids(10 * step + RANK), (RANK + step) % 2))
        # Each expert has a gradient on one rank.
        for expert in model.routed.experts:
            assert zeroxide.safe_get_full_grad(expert.up.weight) is not None
        engine.step()
    got = full(engine)
    engine.destroy()
    plain = RoutedModel()
    plain.load_state_dict(start_values)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01)
    decay = engine.resolved_config.optimizer.weight_decay
    optimizer.param_groups[0]["weight_decay"] = decay
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (plain(ids(10 * step + rank), (rank + step) % 2) / WORLD).backward()
        optimizer.step()
    for name, value in plain.named_parameters():
        # Adam turns a rounding error of a gradient near 0 into a step of its own sign: at most 3 steps of lr each way.
        close = (got[name] - value.detach()).abs() <= 1e-5
        assert close.float().mean() > 0.99, (name, close.float().mean())


def case_external_parameters():
    class Uses(nn.Module):
        def __init__(self, owner):
            super().__init__()
            self.lin = nn.Linear(48, 48)
            self.owner = [owner]
            zero.register_external_parameter(self, owner.weight)

        def forward(self, hidden):
            return self.lin(hidden) + hidden @ self.owner[0].weight.t()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(61, 48)
            self.h = nn.ModuleList([Block(), Block()])
            self.tail = nn.ModuleList([Uses(self.h[0].mix), Uses(self.h[0].mix)])

        def forward(self, input_ids):
            hidden = self.wte(input_ids)
            for block in [*self.h, *self.tail]:
                hidden = block(hidden)
            return next_token_loss(hidden @ self.wte.weight.t(), input_ids)

    torch.manual_seed(0)
    model = Model()
    plain = Model()
    plain.load_state_dict(model.state_dict())
    for uses in plain.tail:
        uses.owner = [plain.h[0].mix]
    engine = start(model, ENGINES[1], "fp32")
    loss = engine(ids(RANK))
    assert torch.equal(loss, plain(ids(RANK)))
    engine.backward(loss)
    for rank in range(WORLD):
        (plain(ids(rank)) / WORLD).backward()
    got = zeroxide.safe_get_full_grad(model.h[0].mix.weight)
    expected = plain.h[0].mix.weight.grad
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    engine.destroy()


def case_two_engines_and_a_reference():
    models = [seeded(seed=1), seeded(seed=2), seeded(seed=3)]
    alone = []
    for number in (0, 1):
        engine = start(seeded(seed=number + 1), ENGINES[number])
        for step in range(3):
            engine.backward(engine(ids(step + RANK)))
            engine.step()
        alone.append(full(engine))
        engine.destroy()
    engines = [start(models[0], ENGINES[0]), start(models[1], ENGINES[1]), start(models[2], ENGINES[1])]
    frozen = full(engines[2])
    engines[2].eval()
    for step in range(3):
        with torch.no_grad():
            engines[2](ids(step + RANK))
        for engine in engines[:2]:
            engine.backward(engine(ids(step + RANK)))
            engine.step()
    for engine, expected in zip(engines, [*alone, frozen], strict=True):
        same(full(engine), expected)
        engine.destroy()


def case_a_frozen_model_needs_no_optimizer():
    for base in ENGINES:
        model = seeded(seed=RANK).requires_grad_(False)
        config = config_of(base, "fp32", tempfile.mkdtemp(dir=os.environ["JOB_FOLDER"]))
        del config["optimizer"]
        engine, optimizer, *_ = zeroxide.initialize(model=model, config=config)
        assert optimizer is None
        with torch.no_grad():
            assert torch.equal(engine(ids(RANK)), seeded()(ids(RANK)))
        with zero.GatheredParameters(model.wte.weight, modifier_rank=1), torch.no_grad():
            model.wte.weight.fill_(float(RANK))
        assert bool((zeroxide.safe_get_full_fp32_param(model.wte.weight) == 1).all())
        assert "optimizer" not in {name for name, used in engine.plan().buckets.items() if used}
        engine.destroy()


def case_generation():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=61, bos_token_id=0, eos_token_id=1)
    for base in ENGINES[:2]:
        torch.manual_seed(RANK)
        with zero.Init():
            model = GPT2LMHeadModel(config)
        torch.manual_seed(0)
        plain = GPT2LMHeadModel(config).eval()
        engine = start(model, base, "fp32")
        same(full(engine), values_of(plain))
        engine.eval()
        prompt = torch.arange(2 + RANK).view(1, -1)
        shared = base is ENGINES[0]
        length = 6 + 5 * RANK
        options = {"do_sample": False, "pad_token_id": 1, "min_new_tokens": length, "max_new_tokens": length}
        got = engine.module.generate(prompt, **options, **({} if shared else {"synced_gpus": True}))
        expected = plain.generate(prompt, **options)
        assert torch.equal(got[:, : expected.shape[1]], expected), (got, expected)
        engine.ranks.barrier()
        engine.train()
        loss = engine(input_ids=ids(RANK), labels=ids(RANK)).loss
        engine.backward(loss)
        engine.step()
        engine.destroy()


def case_memory_of_construction():
    """Each rank's peak stays near its share and the largest module, whatever the model's size."""
    width, layers = 2048, 32  # 512 MiB of fp32

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(width, width, bias=False)

    gc.collect()
    with zero.Init():
        nn.ModuleList(Layer() for _ in range(2))  # what comes with first use is not counted
    before = status("RssAnon")
    peak = [0]

    class Watched(Layer):
        def __init__(self):
            super().__init__()
            peak[0] = max(peak[0], status("RssAnon"))

    with zero.Init():
        model = nn.ModuleList(Watched() for _ in range(layers))
        peak[0] = max(peak[0], status("RssAnon"))
    each = width * width * 4
    share = layers * each // WORLD
    grown = peak[0] - before
    # The layer being made, as parameter and on its way to others, and what the allocator keeps between its slices.
    assert grown <= share + 10 * each < layers * each, (grown >> 20, share >> 20)
    assert sum(param.ds_tensor.nbytes for param in model.parameters()) == share


if __name__ == "__main__":
    zeroxide.init_distributed(timeout=60)
    for name in sys.argv[1:]:
        try:
            globals()[name]()
        except BaseException:
            print(f"failed {name}\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        print(f"ok {name}", flush=True)
    torch.distributed.destroy_process_group()
