"""Methods of DeepSpeed's engine beside those of training: loaders, getters, older names, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import started
from torch import nn

import zeroxide
from zeroxide.engine.deepspeed_methods import ABSENT, OffloadHome
from zeroxide.errors import ConfigError, ModelError

SIGNATURES = Path(__file__).parents[1] / "integrations" / "deepspeed_signatures.json"
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "zeroxide": {"threads": 1},
}


def made(**more):
    torch.manual_seed(0)
    return started(nn.Linear(4, 2), config=CONFIG | more)


def test_a_loader_of_any_data_set():
    """Catches: evaluation in another order, the batch size of training for it, a sampler or a collate_fn left out."""
    data = torch.arange(10.0)
    with made() as engine:
        assert [batch.tolist() for batch in engine.deepspeed_io(data, route="eval")] == [
            [2.0 * at, 2.0 * at + 1] for at in range(5)
        ]
        assert [len(batch) for batch in engine.deepspeed_io(data, batch_size=4, route="predict")] == [4, 4, 2]
        torch.manual_seed(1)
        shuffled = torch.cat(list(engine.deepspeed_io(data))).tolist()
        assert shuffled != data.tolist()
        assert sorted(shuffled) == data.tolist()
        taken = engine.deepspeed_io(data, data_sampler=[3, 1], collate_fn=lambda samples: sum(samples).item())
        assert list(taken) == [4.0]
        with pytest.raises(ConfigError, match="expected a route of train, eval, predict, got 'test'"):
            engine.deepspeed_io(data, route="test")


def test_getters_say_what_the_config_says(tmp_path):
    with made(
        bf16={"enabled": True},
        dataloader_drop_last=True,
        zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}},
    ) as engine:
        assert engine.optimizer_name() == "adamw"
        assert engine.optimizer_params() == {"lr": 0.01}
        assert engine.scheduler_name() == "WarmupLR"
        assert engine.scheduler_params() == {"warmup_num_steps": 5}
        assert engine.get_data_types() == (torch.bfloat16, torch.bfloat16)
        assert engine.dataloader_drop_last()
        assert engine.managed_gradient_accumulation()
        assert engine.zero_offload_optimizer() == OffloadHome("nvme", tmp_path)
        assert engine.zero_offload_param() is None
        assert not engine.zero_cpu_offload()
        assert engine.zero_use_cpu_optimizer()
        assert engine.get_data_parallel_rank() == 0
    with made(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}) as engine:
        assert engine.zero_cpu_offload()
        assert engine.get_data_types() == (torch.float32, torch.float32)
        assert not engine.dataloader_drop_last()
    with started(nn.Linear(4, 2), lr=0.1) as engine:
        assert engine.optimizer_name() is engine.optimizer_params() is engine.scheduler_name() is None
        assert not engine.zero_use_cpu_optimizer()


def test_compiling_the_engine_compiles_its_model_once():
    """Catches: the engine's own call compiled, arguments for torch.compile left out, a second graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with made() as engine:
        plain = engine(torch.ones(2, 4))
        assert not engine.is_compiled
        engine.compile(backend=backend, compile_kwargs={"dynamic": False, "backend": "eager"})
        engine.compile(backend="eager")
        assert engine.is_compiled
        assert torch.equal(engine(torch.ones(2, 4)), plain)
        assert len(graphs) == 1
        with pytest.raises(ConfigError, match="schedule is DeepCompile's"):
            engine.compile(schedule=[])
        with pytest.raises(ConfigError, match="compiled_autograd_enabled is DeepCompile's"):
            engine.compile(compiled_autograd_enabled=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_a_model_saved_as_torch_pickles_it(tmp_path, stage, name):
    """Against torch.load into a plain module. Catches: fp32 instead of the live weights, a name that is not kept."""
    with made(bf16={"enabled": True}, zero_optimization={"stage": stage}) as engine:
        expected = engine.module_state_dict()
        path = engine.save_fp16_model(tmp_path, name)
        with pytest.raises(ConfigError, match="expected one file name"):
            engine.save_16bit_model(tmp_path, "a/b.bin")
        (tmp_path / "file").touch()
        with pytest.raises(zeroxide.errors.StorageError, match="the model was not written"):
            engine.save_16bit_model(tmp_path / "file", name)
    assert path == tmp_path / name
    found = torch.load(path)
    assert found.keys() == expected.keys()
    assert all(found[key].dtype is torch.bfloat16 and torch.equal(found[key], expected[key]) for key in found)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["file", name])


def test_state_dicts_with_deepspeeds_further_arguments():
    """Catches: a missing name that is let through unasked, or not let through."""
    with made() as engine:
        whole = engine.module_state_dict(None, "a.")
        assert set(whole) == {"a.weight", "a.bias"}
        part = {"weight": torch.full((2, 4), 3.0)}
        with pytest.raises(ModelError, match="bias is missing"):
            engine.load_module_state_dict({"module": part})
        engine.load_module_state_dict({"module": part}, allowed_missing_keys=["bias"])
        assert torch.equal(engine.module_state_dict()["weight"], part["weight"])
        for call in (
            lambda: engine.load_module_state_dict(part, custom_load_fn=print),
            lambda: engine.load_checkpoint("nowhere", custom_load_fn=print),
            lambda: engine.module_state_dict(keep_vars=True),
        ):
            with pytest.raises(ConfigError, match=r"custom_load_fn is not supported|keep_vars"):
                call()
        engine.allreduce_gradients()


def test_what_else_deepspeeds_engine_has_is_refused_by_name():
    """The names are DeepSpeed's own, written down from it. Catches: a name in the table that the engine has, or that is
    not DeepSpeed's."""
    theirs = json.loads(SIGNATURES.read_text())["names"]["deepspeed.DeepSpeedEngine"]["methods"]
    assert set(ABSENT) <= set(theirs)
    with made() as engine:
        for name in ABSENT:
            with pytest.raises(AttributeError, match=f"{name!r}, which DeepSpeed's engine has: "):
                getattr(engine, name)
        with pytest.raises(AttributeError, match=r"has an attribute 'nothing'$"):
            engine.nothing  # noqa: B018


def test_a_plan_is_printed_in_lines_for_people():
    """What `dump_state` refers to. Catches: the fields of everything that a plan refers to."""
    with made() as engine:
        lines = str(engine.plan()).splitlines()
    assert lines == engine.plan().describe()
    assert lines[0].startswith("0.0 M parameters (100 % trainable) in 1 units; float32 weights at home in host memory")
    assert max(map(len, lines)) < 200


def test_observers_hear_of_the_samples_of_this_step(monkeypatch):
    """Catches: the config's number after a script has changed it, none where the config gives the micro-batch alone."""
    with made() as engine, monkeypatch.context() as patched:
        heard = []
        patched.setattr(engine.parts.observers, "after_step", lambda facts, timers, samples: heard.append(samples))
        for size in (2, 4):
            engine.set_train_batch_size(size)
            for _ in range(size // 2):
                engine.backward(engine(torch.ones(2, 4)).sum())
                engine.step()
    assert heard == [2, 4]
    with started(nn.Linear(4, 2), lr=0.1) as engine:
        assert engine.parts.accumulation.samples_of_step is None
