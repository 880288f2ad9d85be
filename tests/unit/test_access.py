"""ZeRO-3's user surface on one rank: gathered parameters, exact values, state dicts, and what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import Block, build, loss_of, next_token_loss
from running import Mode, assert_released, config_of, started
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import ConfigError, ModelError

MODES = [Mode(), Mode("nvme", "nvme", "split", 1, "threads", 8192, 1 << 20, 0), Mode("none", "nvme", "fp32")]


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return request.param


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def values_of(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def exact(engine):
    return {name: zeroxide.safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def one_line(error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_what_parameters_say_of_themselves(mode, tmp_path):
    """DeepSpeed's keys. Catches: a unit that counts as in use after its pass."""
    model = build("gpt")
    with started(model, config=config_of(mode, tmp_path)) as engine:
        weight, seen = model.h[0].up.weight, []
        handle = model.h[0].up.register_forward_hook(lambda *_: seen.append(weight.ds_active_sub_modules))
        with torch.no_grad():
            engine(ids())
        handle.remove()
        assert model.h[0] in seen[0]
        assert weight.ds_active_sub_modules == set()
        found = weight.ds_summary()
        assert (found["id"], found["status"], found["persist"]) == (weight.ds_id, "NOT_AVAILABLE", False)
        assert (found["numel"], found["shape"], found["ds_numel"], found["ds_shape"]) == (0, (0,), 144 * 48, (144, 48))
        assert (found["requires_grad"], found["grad_shape"], found["active_sub_modules"]) == (True, None, set())
        assert found["ds_tensor.shape"] == (144 * 48,)
        assert weight.ds_summary(use_debug_name=True)["id"] == "h.0.up.weight"


def test_hooks_that_libraries_remove_and_put_back(mode, tmp_path):
    """What TRL does around a generation. Catches: a facade of an engine that is gone, or that takes any module."""
    model = build("gpt")
    external = model.h[0].up.bias
    zero.register_external_parameter(model.h[1], external)
    with started(model, config=config_of(mode, tmp_path)) as engine:
        offload = engine.optimizer.parameter_offload
        assert offload.module is engine
        assert [(name, param is external) for name, param in offload.module.ds_external_parameters()] == [
            ("h.0.up.bias", True)
        ]
        assert offload.param_coordinator.is_invalid_trace()
        assert (offload.forward_hooks, offload.backward_hooks) == ([], [])
        offload._register_deepspeed_module(offload.module)
        offload._register_deepspeed_module(model)
        one_line(ModelError, "no part of this engine", offload._register_deepspeed_module, nn.Linear(2, 2))


# Gathered parameters ----------------------------------------------------------------------------------------------


def test_gathered_parameters_show_the_live_weights(mode, tmp_path):
    model = build("gpt")
    before = values_of(model)
    with started(model, config=config_of(mode, tmp_path)) as engine:
        weight = model.h[1].up.weight
        assert (weight.ds_shape, weight.ds_numel, weight.ds_persist) == (torch.Size([144, 48]), 144 * 48, False)
        assert weight.ds_status is zero.ZeroParamStatus.NOT_AVAILABLE
        assert len({param.ds_id for param in model.parameters()}) == len(list(model.parameters()))
        own = nn.Parameter(torch.ones(3))
        with zero.GatheredParameters(param for param in [None, weight, own, *model.h[0].parameters()]):
            # Half up, the rounding of the exact formats.
            bits = (before["h.1.up.weight"].view(torch.int32) + 0x8000) >> 16
            assert torch.equal(weight.detach().view(torch.int16).to(torch.int32), bits.to(torch.int16).to(torch.int32))
            assert weight.ds_status is zero.ZeroParamStatus.AVAILABLE
            assert own.shape == (3,)
            assert torch.equal(weight.flatten(), weight.ds_tensor)
        assert_released(engine)
        with zero.GatheredParameters(weight, enabled=False):
            assert weight.numel() == 0


def test_changes_by_the_modifier_are_kept_and_others_are_not(mode, tmp_path):
    model = build("gpt")
    expected = values_of(model)
    with started(model, config=config_of(mode, tmp_path)) as engine:
        first, second = model.h[1].up.weight, model.h[1].up.bias
        moment = torch.rand(144, 48)
        zeroxide.safe_set_full_optimizer_state(first, moment, "exp_avg")
        with zero.GatheredParameters([first, second], modifier_rank=0), torch.no_grad():
            first[2, 5:9] = 0.5
            with zero.GatheredParameters(first, modifier_rank=0):
                first[3] = 0.25
            second.data.mul_(0)
        expected["h.1.up.weight"][2, 5:9] = 0.5
        expected["h.1.up.weight"][3] = 0.25
        expected["h.1.up.bias"].zero_()
        # All other elements keep the bits that a bf16 weight does not have.
        same(exact(engine), expected)
        assert torch.equal(zeroxide.safe_get_full_optimizer_state(first, "exp_avg"), moment)
        with pytest.raises(ModelError, match="was changed"), zero.GatheredParameters(first):
            first.data.fill_(9)
        with pytest.raises(KeyError):
            change_and_fail(first)
        same(exact(engine), expected)
        assert_released(engine)


def change_and_fail(param):
    with zero.GatheredParameters(param, modifier_rank=0), torch.no_grad():
        param.fill_(9)
        raise KeyError


def test_changes_for_nobody_are_noticed(tmp_path):
    model = build("gpt")
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        weight, before = model.wte.weight, exact(engine)

        def change(act):
            with zero.GatheredParameters([weight, model.norm.weight]), torch.no_grad():
                act()

        def replace():
            weight.data = torch.zeros(61, 48, dtype=torch.bfloat16)

        one_line(ModelError, "wte.weight was changed .* modifier_rank=0", change, lambda: weight.fill_(1))
        one_line(ModelError, "wte.weight was changed", change, replace)
        same(exact(engine), before)
        assert_released(engine)


def test_a_changed_shape_and_an_impossible_rank_are_refused(tmp_path):
    model = build("gpt")
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        before = exact(engine)

        def grow():
            with zero.GatheredParameters([model.wte.weight, model.norm.weight], modifier_rank=0):
                model.wte.weight.data = torch.zeros(70, 48)

        one_line(ModelError, r"\(70, 48\).*expected torch.bfloat16 \(61, 48\)", grow)
        one_line(
            ConfigError,
            "modifier_rank: expected 0 to 0, got 1",
            zero.GatheredParameters(model.wte.weight, modifier_rank=1).__enter__,
        )
        same(exact(engine), before)
        assert_released(engine)


@pytest.mark.parametrize("family", ["gpt", "gpt-reentrant", "gpt-nonreentrant"])
def test_computing_and_training_inside_the_context(family, tmp_path):
    outcomes = []
    for inside in (False, True):
        model = build(family)
        with started(model, config=config_of(MODES[1], tmp_path)) as engine:
            with zero.GatheredParameters(list(model.parameters())[: 3 if inside else 0]):
                loss = loss_of(engine(input_ids=ids()))
                engine.backward(loss)
                if inside:
                    assert next(model.parameters()).numel() > 0
            engine.step()
            assert_released(engine)
            outcomes.append((loss.item(), exact(engine)))
    assert outcomes[0][0] == outcomes[1][0]
    same(outcomes[0][1], outcomes[1][1])


def test_gathering_in_a_forward(tmp_path):
    class Looks(Block):
        def forward(self, hidden):
            with zero.GatheredParameters([self.up.weight, self.other[0]]):
                assert self.up.weight.shape == (144, 48)
                assert self.other[0].shape == (61, 48)
                out = super().forward(hidden)
            assert self.up.weight.shape == (144, 48)
            return out

    model = build("gpt")
    model.h[1] = Looks()
    model.h[1].other = [model.wte.weight]
    plain = copy.deepcopy(model)
    plain.h[1].__class__ = Block
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        loss = engine(ids())
        assert torch.equal(loss, plain(ids()))
        engine.backward(loss)
        plain(ids()).backward()
        for (name, param), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
            got = zeroxide.safe_get_full_grad(mine)
            assert torch.equal(got, param.grad), name
        assert_released(engine)


# Exact values -----------------------------------------------------------------------------------------------------


def test_everything_can_be_read_and_set(mode, tmp_path):
    model = build("partly-frozen")
    start = values_of(model)
    with started(model, config=config_of(mode, tmp_path)) as engine:
        weight, frozen = model.h[2].up.weight, model.wte.weight
        before = exact(engine)
        assert torch.equal(before["h.2.up.weight"], start["h.2.up.weight"])
        value = torch.randn(144, 48)
        zeroxide.safe_set_full_fp32_param(weight, value)
        zeroxide.safe_set_local_fp32_param(model.h[2].up.weight, value * 3)
        zeroxide.safe_set_full_optimizer_state(weight, value.square(), "exp_avg_sq")
        zeroxide.safe_set_local_optimizer_state(weight, -value.flatten(), "exp_avg")
        same(exact(engine), {**before, "h.2.up.weight": value * 3})
        assert torch.equal(zeroxide.safe_get_full_optimizer_state(weight, "exp_avg_sq"), value.square())
        assert torch.equal(zeroxide.safe_get_local_optimizer_state(weight, "exp_avg"), -value.flatten())
        others = [param for param in model.parameters() if param.requires_grad and param is not weight]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not any(zeroxide.safe_get_full_optimizer_state(param, key).any() for param in others)
        assert zeroxide.safe_get_full_grad(weight) is None
        assert zeroxide.safe_get_local_grad(weight) is None
        engine.backward(engine(ids()))
        grad = zeroxide.safe_get_full_grad(weight)
        engine.backward(engine(ids()))
        torch.testing.assert_close(zeroxide.safe_get_full_grad(weight), 2 * grad)
        zeroxide.safe_set_full_grad(weight, torch.full((144, 48), 3.0))
        assert torch.equal(zeroxide.safe_get_local_grad(weight), torch.full((144 * 48,), 3.0))
        grads = [zeroxide.safe_get_full_grad(param) for param in [weight, *others]]
        engine.step()
        norm = torch.cat([each.double().flatten() for each in grads]).norm().item()
        # Sums of squares in double precision, in another order.
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-12)
        assert zeroxide.safe_get_full_grad(weight) is None
        oracle = nn.Parameter(value * 3)
        optimizer = torch.optim.AdamW([oracle], lr=1e-3, weight_decay=engine.resolved_config.optimizer.weight_decay)
        state = {"step": torch.tensor(0.0), "exp_avg": -value, "exp_avg_sq": value.square()}
        optimizer.state[oracle] = state
        oracle.grad = torch.full((144, 48), 3.0)
        optimizer.step()
        # Two ulp of the larger of weight and update here, and torch's own rounding.
        got = zeroxide.safe_get_full_fp32_param(weight)
        torch.testing.assert_close(got, oracle.detach(), rtol=4 * 2**-23, atol=1e-7)
        assert torch.equal(zeroxide.safe_get_full_fp32_param(frozen), before["wte.weight"])


def test_a_gradient_can_be_given_where_there_was_none(tmp_path):
    model = build("gpt")
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        before = exact(engine)
        zeroxide.safe_set_full_grad(model.norm.bias, torch.full((48,), 2.0))
        engine.step()
        assert engine.get_global_grad_norm() == pytest.approx(2 * 48**0.5)
        after = exact(engine)
        assert [name for name in after if not torch.equal(after[name], before[name])] == ["norm.bias"]


def test_what_cannot_be_read_or_set_is_refused(tmp_path):
    model, alien = build("partly-frozen"), nn.Parameter(torch.ones(3))
    assert zeroxide.safe_get_full_fp32_param(alien) is None
    assert zeroxide.safe_get_local_grad(alien) is None
    one_line(ModelError, "belongs to no engine", zeroxide.safe_set_full_fp32_param, alien, torch.ones(3))
    with started(model, config=config_of(Mode(), tmp_path)):
        weight, frozen = model.h[2].up.weight, model.wte.weight
        assert zeroxide.safe_get_full_optimizer_state(frozen, "exp_avg") is None
        assert zeroxide.safe_get_full_grad(frozen) is None
        one_line(ConfigError, "got 'step'", zeroxide.safe_get_full_optimizer_state, weight, "step")
        one_line(ModelError, "7 elements.*expected 6912", zeroxide.safe_set_full_fp32_param, weight, torch.ones(7))
        one_line(ModelError, "this rank's|expected 6912", zeroxide.safe_set_local_grad, weight, torch.ones(7))
        one_line(ModelError, "frozen", zeroxide.safe_set_full_grad, frozen, torch.ones(61, 48))
    one_line(RuntimeError, "destroyed", zeroxide.safe_get_full_fp32_param, weight)


# State dicts ------------------------------------------------------------------------------------------------------


def test_state_dicts(mode, tmp_path):
    model = build("gpt")
    model.register_buffer("seen", torch.arange(3))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        same(engine.module.state_dict(), expected)
        got = engine.module_state_dict()
        same(got, expected)
        assert got["head.weight"] is got["wte.weight"]
        assert "x.seen" in engine.module_state_dict({"kept": 1}, "x.")
        one_line(ModelError, "engine.load_module_state_dict", engine.module.load_state_dict, expected)
        one_line(ModelError, "in an engine", engine.module.h[0].load_state_dict, engine.module.h[0].state_dict())
        with zero.GatheredParameters(model.h[0].parameters(), modifier_rank=0):
            model.h[0].load_state_dict({k: v + 1 for k, v in model.h[0].state_dict().items()})
        for name in expected:
            if name.startswith("h.0."):
                expected[name] = expected[name] + 1
        same(engine.module_state_dict(), expected)
        new = {name: value * 2 for name, value in expected.items()}
        engine.load_module_state_dict({"module": new})
        same(engine.module_state_dict(), new)
        part = {"norm.bias": torch.ones(48)}
        one_line(ModelError, "missing .and", engine.load_module_state_dict, part)
        one_line(
            ModelError,
            r"norm.bias: expected shape \(48,\)",
            engine.load_module_state_dict,
            {"norm.bias": torch.ones(4)},
            strict=False,
        )
        one_line(ModelError, "has no other", engine.load_module_state_dict, {**new, "other": torch.ones(1)})
        one_line(ConfigError, "custom_load_fn", engine.load_module_state_dict, new, custom_load_fn=print)
        engine.load_module_state_dict(part, strict=False)
        same(engine.module_state_dict(), {**new, "norm.bias": torch.ones(48)})


def test_state_dict_without_frozen_parameters(tmp_path):
    model = build("partly-frozen")
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        trainable = {name for name, param in model.named_parameters() if param.requires_grad}
        assert engine.module_state_dict(exclude_frozen_parameters=True).keys() == trainable


def test_empty_parameters_are_not_copied(tmp_path):
    model = build("gpt")
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        one_line(ModelError, "GatheredParameters", copy.deepcopy, model.h[0].up)
        one_line(ModelError, "GatheredParameters", pickle.dumps, model.norm.weight)
        with zero.GatheredParameters(model.h[0].up):
            twin = copy.deepcopy(model.h[0].up.weight)
            again = pickle.loads(pickle.dumps(model.h[0].up.weight))
            assert type(twin) is nn.Parameter
            assert torch.equal(twin, model.h[0].up.weight)
            assert torch.equal(again, twin)
    one_line(ModelError, "belongs to an engine", zeroxide.initialize, model=model, config=config_of(Mode(), tmp_path))
    del engine


# Autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt", "partly-frozen"])
def test_double_backward_is_refused(family, tmp_path):
    model = build(family)
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        before = exact(engine)
        one_line(ModelError, "create_graph=True", engine(ids()).backward, create_graph=True)
        loss = engine(ids())
        one_line(ModelError, "create_graph=True", torch.autograd.grad, loss, [model.norm.bias], create_graph=True)
        engine.zero_grad()
        engine.backward(engine(ids()))
        engine.step()
        assert_released(engine)
        assert not torch.equal(exact(engine)["norm.bias"], before["norm.bias"])


@dataclass
class Answer:
    hidden: torch.Tensor
    more: Any


class InContainers(Block):
    def forward(self, given):
        hidden = given["deep"][0].hidden if isinstance(given, dict) else given
        out = super().forward(hidden)
        out.mul_(0.9)
        return {"deep": (Answer(out, [None, "text"]), out.detach()), "number": 3}


class ContainersModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(61, 48)
        self.h = nn.ModuleList(InContainers() for _ in range(3))
        self.skip = None

    def forward(self, input_ids):
        hidden = self.wte(input_ids)
        for number, block in enumerate(self.h):
            if number != self.skip:
                hidden = block(hidden)
        return next_token_loss(hidden["deep"][0].hidden @ self.wte.weight.t(), input_ids)


def test_nested_outputs_and_skipped_modules(mode, tmp_path):
    torch.manual_seed(0)
    model = ContainersModel()
    plain = copy.deepcopy(model)
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        for step, skip in enumerate((None, 1, 0)):
            model.skip = plain.skip = skip
            loss = engine(ids(step))
            assert torch.equal(loss, plain(ids(step)))
            engine.backward(loss)
            plain.zero_grad()
            plain(ids(step)).backward()
            for (name, param), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
                got = zeroxide.safe_get_full_grad(mine)
                assert (got is None) == (param.grad is None), name
                assert got is None or torch.equal(got, param.grad), name
            engine.zero_grad()


def test_fp16(tmp_path):
    model = build("gpt")
    before = values_of(model)
    config = config_of(Mode(), tmp_path, "fp32") | {"bf16": {"enabled": False}, "fp16": {"enabled": True}}
    with started(model, config=config) as engine:
        weight = model.h[1].up.weight
        with zero.GatheredParameters(weight, modifier_rank=0), torch.no_grad():
            assert torch.equal(weight, before["h.1.up.weight"].half())
            weight[1] = 0.5
        before["h.1.up.weight"][1] = 0.5
        same(exact(engine), before)
        engine.backward(engine(ids()))
        assert zeroxide.safe_get_full_grad(weight).abs().max() > 0
        engine.step()


def test_an_engine_without_optimizer_only_computes(tmp_path):
    model = build("gpt").requires_grad_(False)
    config = config_of(Mode(), tmp_path, "fp32")
    del config["optimizer"]
    with started(model, config=config) as engine:
        assert engine.optimizer is None
        assert engine.get_lr() == []
        assert torch.equal(engine(ids()), build("gpt")(ids()))
        one_line(ModelError, "step: the engine was made without an optimizer", engine.step)
        one_line(ModelError, "save_checkpoint: the engine was made without", engine.save_checkpoint, tmp_path)


def test_a_save_in_the_background_is_told_before_values_are_set(tmp_path):
    model = build("gpt")
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        bias = model.norm.bias
        seen = []
        engine.training_state.on_change(lambda: seen.append(zeroxide.safe_get_full_fp32_param(bias)[0].item()))
        zeroxide.safe_set_full_fp32_param(bias, torch.full((48,), 2.0))
        zeroxide.safe_set_local_fp32_param(bias, torch.full((48,), 3.0))
        with zero.GatheredParameters(bias, modifier_rank=0):
            bias.data.fill_(4)
        zeroxide.safe_set_full_fp32_param(bias, torch.full((48,), 5.0))
        assert seen == [0.0, 2.0, 3.0, 4.0]
