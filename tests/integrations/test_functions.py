"""What lies behind names of `deepspeed` and is more than another name."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from running import started
from safetensors.torch import load_file
from torch import nn

import zeroxide
from zeroxide.errors import ConfigError, ModelError, StorageError
from zeroxide.integrations.deepspeed import checkpointing, comm, entry, fused, tensors, zero_to_fp32
from zeroxide.params.absent import AbsentValues


@pytest.fixture
def own_group():
    """A process group of one rank is made by whoever asks, and ends with the test."""
    assert not torch.distributed.is_initialized()
    yield
    torch.distributed.destroy_process_group()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x):
        return self.last(self.first(x)) * self.scale


def test_weights_out_of_a_checkpoint(tmp_path):
    """Catches: weights rounded to bf16, a tied weight under one name alone, a part of a weight left out."""
    with started(Tied(), config={"bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}}) as engine:
        engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16)).sum())
        engine.step()
        expected = {name: zeroxide.safe_get_full_fp32_param(each) for name, each in engine.module.named_parameters()}
        engine.save_checkpoint(tmp_path)
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert set(found) == {"first.weight", "first.bias", "last.weight", "last.bias", "scale"}
    assert found["first.weight"] is found["last.weight"]
    for name, values in expected.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], values), name
    model = zero_to_fp32.load_state_dict_from_zero_checkpoint(Tied(), tmp_path)
    assert torch.equal(model.last.weight, expected["first.weight"])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        zero_to_fp32.load_state_dict_from_zero_checkpoint(nn.Linear(4, 4), tmp_path)
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model", safe_serialization=True)
    assert torch.equal(load_file(tmp_path / "model/model.safetensors")["first.weight"], expected["first.weight"])
    with pytest.raises(ConfigError, match="lazy_mode is not built"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)


def test_pickled_weights_as_scripts_of_deepspeed_load_them(tmp_path):
    """Against torch.load. Catches: another file name by default, a tensor written twice because it is tied, a limit
    that cuts nothing, an index of an earlier model that stays (each tried)."""
    with started(Tied(), config={"bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}}) as engine:
        expected = {name: zeroxide.safe_get_full_fp32_param(each) for name, each in engine.module.named_parameters()}
        engine.save_checkpoint(tmp_path)
    out = tmp_path / "model"
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, out, max_shard_size="64B")
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())
    # first.weight has 64 bytes, the rest 16 each, and last.weight is first.weight.
    assert index["metadata"]["total_size"] == 112
    assert sorted(set(index["weight_map"].values())) == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert index["weight_map"]["first.weight"] == index["weight_map"]["last.weight"]
    found = {}
    for name in set(index["weight_map"].values()):
        found |= torch.load(out / name)
    assert set(found) == {*expected, "last.weight", "scale"} == set(index["weight_map"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, out)
    assert [each.name for each in out.iterdir()] == ["pytorch_model.bin"]
    loaded = Tied()
    loaded.load_state_dict(torch.load(out / "pytorch_model.bin"))
    assert torch.equal(loaded.last.weight, expected["first.weight"])
    with pytest.raises(ConfigError, match="max_shard_size 'much': expected a size in bytes"):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, out, max_shard_size="much")
    with pytest.raises(StorageError, match="nothing was written"):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, out / "pytorch_model.bin" / "x")


def test_collectives_take_their_arguments_by_deepspeeds_names(tmp_path):
    """On one rank, which is enough to see what is taken. Catches: torch's names for the same."""
    given, taken = torch.arange(4.0), torch.empty(4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for call in (comm.all_gather_into_tensor, comm.reduce_scatter_tensor):
            call(output_tensor=taken.zero_(), tensor=given)
            assert torch.equal(taken, given)
        comm.all_to_all_single(output=taken.zero_(), tensor=given)
        assert torch.equal(taken, given)
        assert comm.get_global_rank() == 0
    finally:
        dist.destroy_process_group()


def test_checkpointed_functions_take_keywords():
    """Catches: keywords that are torch's own, and are not given to the function."""
    x = torch.ones(2, requires_grad=True)
    checkpointing.checkpoint(lambda a, use_reentrant: a * use_reentrant, x, use_reentrant=3).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("decoupled", [True, False])
def test_an_optimizer_for_gpus_is_taken_over(decoupled):
    """Against torch's own in fp32: one update of at most lr, rounded. Catches: a decay of the other kind."""
    plain, model = nn.Linear(4, 4), nn.Linear(4, 4)
    model.load_state_dict(plain.state_dict())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    oracle = kind(plain.parameters(), lr=0.1, weight_decay=0.5)
    plain(torch.ones(2, 4)).square().sum().backward()
    oracle.step()
    optimizer = fused.FusedAdam(model.parameters(), lr=0.1, adam_w_mode=decoupled, weight_decay=0.5)
    with started(model, optimizer=optimizer, gradient_clipping=0.0) as engine:
        engine.backward(engine(torch.ones(2, 4)).square().sum())
        engine.step()
        for one, other in zip(engine.module.parameters(), plain.parameters(), strict=True):
            # A few roundings of an update of 0.1 and of weights below 1.
            assert (zeroxide.safe_get_full_fp32_param(one) - other).abs().max() <= 1e-6
        with pytest.raises(RuntimeError, match=r"call engine\.step"):
            optimizer.step()


def test_keys_that_deepspeed_does_not_read_are_left_out(caplog, own_group):
    """TRL 1.16.0 writes such keys. Catches: refusing them, or taking them for the section's own."""
    config = {"zero_optimization": {"stage": 3}, "zero_optimization.stage": 1, "optimizer": {"type": "AdamW"}}
    engine, *_ = entry.initialize(model=nn.Linear(4, 4), config=config)
    assert engine.zero_optimization_stage() == 3
    assert "'zero_optimization.stage' has no effect, as with DeepSpeed" in caplog.text
    engine.destroy()
    with pytest.raises(ConfigError, match=r'unknown key "fp15\.enabled"'):
        entry.initialize(model=nn.Linear(4, 4), config={"fp15.enabled": True})
    with pytest.raises(ConfigError, match=r'unknown key "zero_optimization\.stage"'):
        zeroxide.initialize(model=nn.Linear(4, 4), config=config)


def test_copies_keep_what_is_tied():
    tied = torch.ones(3)
    found = tensors.clone_tensors_for_torch_save({"a": tied, "b": [tied, torch.zeros(2)], "c": (1, "x")})
    assert found["a"] is found["b"][0]
    assert found["a"] is not tied
    assert found["c"] == (1, "x")


def test_a_mistake_in_a_second_config_leaves_the_engine(own_group):
    """Catches: an engine that ends, with its optimizer's state, before the config of the next one is read."""
    model = nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
    engine, *_ = entry.initialize(model=model, config=config)
    with pytest.raises(ConfigError, match="train_batch_sizes"):
        entry.initialize(model=model, config={"train_batch_sizes": 1})
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    assert engine.global_steps == 1
    engine.destroy()
    assert "names and shapes alone" in " ".join((entry.initialize.__doc__ or "").split())


@pytest.mark.parametrize(
    "use",
    [
        lambda absent, own: own.add_(absent, alpha=0.1),
        lambda absent, own: own.mul_(absent),
        lambda absent, own: torch._foreach_add_([own], [absent]),
        lambda absent, own: own.copy_(absent),
        lambda absent, own: absent + own,
        lambda absent, own: absent.numpy(),
        lambda absent, own: absent.tolist(),
        lambda absent, own: absent.sum().item(),
        lambda absent, own: absent[0].cpu(),
        lambda absent, own: f"{absent.norm():.3f}",
        lambda absent, own: bool(absent.any()),
        lambda absent, own: absent.__dlpack__(),
    ],
)
def test_values_that_are_absent_are_never_taken_for_nothing(use):
    """Catches: a moving average that decays, since torch adds nothing where it has a tensor on the meta device."""
    own, absent = torch.ones(2, 3), AbsentValues.of("a.weight", torch.Size([2, 3]), torch.float32)
    with pytest.raises(ModelError, match=r"a\.weight was asked for its values"):
        use(absent, own)
    assert torch.equal(own, torch.ones(2, 3))
    assert [list(each.shape) for each in torch.cat([absent, absent]).chunk(2, 1)] == [[4, 2], [4, 1]]
