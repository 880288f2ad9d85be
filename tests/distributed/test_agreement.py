"""Ranks that were started differently are told what differs, where, by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from launching import run_ranks
from torch import nn

from zeroxide.config import CommsLogging, Config, FlopsProfile, Offload, Optimizer, load
from zeroxide.config.facts import config_facts, reason_to_differ
from zeroxide.config.sections.mesh import Mesh
from zeroxide.config.sections.pipeline import Pipeline
from zeroxide.config.sections.zero import Zero
from zeroxide.distributed import Ranks, agree, model_facts, name_ranks, sampler_facts, version_facts
from zeroxide.errors import RanksError

# One job tries them all: every rank states facts, catches the line, and goes on with the next.
CASES = """
import dataclasses, json
from torch import nn
from torch.utils.data import DistributedSampler
import zeroxide._core
from zeroxide.config import load
from zeroxide.errors import RanksError
from zeroxide.config.facts import config_facts
from zeroxide.distributed import agree, model_facts, sampler_facts, version_facts

odd = ranks.rank == 2
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}}
optimizer = {"type": "AdamW", "params": {"lr": 0.1 + 0.2 if odd else 0.3}}

def model(width=4, **more):
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, width, **more))

def frozen():
    made = model()
    made[1].bias.requires_grad_(not odd)
    return made

def sampler(length=10, **more):
    return DistributedSampler(range(length), num_replicas=3, rank=ranks.rank, **more)

class Counting:
    def __init__(self, inner):
        self.inner, self.alone, self.sent = inner, False, 0
    def gather_objects(self, value):
        self.sent += len(json.dumps(value))
        return self.inner.gather_objects(value)

cases = {
    "same": lambda: version_facts() | config_facts(load(config)) | model_facts(model()) | sampler_facts(sampler()),
    "config": lambda: config_facts(load({**config, "train_micro_batch_size_per_gpu": 8 if odd else 4})),
    "float": lambda: config_facts(load({**config, "optimizer": optimizer})),
    "optimizer": lambda: config_facts(load({**config, **({} if odd else {"optimizer": optimizer})})),
    "threads": lambda: config_facts(load({**config, "zeroxide": {"threads": ranks.rank + 1}})),
    "shape": lambda: model_facts(model(5 if odd else 4)),
    "dtype": lambda: model_facts(model(dtype=torch.bfloat16 if odd else torch.float32)),
    "missing": lambda: model_facts(model(bias=not odd)),
    "frozen": lambda: model_facts(frozen()),
    "seed": lambda: sampler_facts(sampler(seed=ranks.rank)),
    "length": lambda: sampler_facts(sampler(10 + odd)),
    "unstated": lambda: {"a": 1, **({"b": 2} if odd else {})},
    "nan": lambda: {"a": float("nan")},
    "order": lambda: {"a": 1, "b": 2} if odd else {"b": 2, "a": 1},
}
said = {}
for name, facts in cases.items():
    try:
        agree(ranks, facts())
        said[name] = None
    except RanksError as error:
        said[name] = [str(error), list(error.ranks)]
torch.__version__ = "9.9" if odd else torch.__version__
try:
    agree(ranks, version_facts())
except RanksError as error:
    said["version"] = [str(error), list(error.ranks)]
large = Counting(ranks)
agree(large, model_facts(nn.Sequential(*[nn.Linear(1, 1) for _ in range(500)])))
assert large.sent < 200, large.sent
say(json.dumps(said))
"""

EXPECTED = {
    "same": None,
    "config": (
        "ranks do not agree on config.train_batch_size: 4 on ranks 0-1, 8 on rank 2; start every rank "
        "with the same config"
    ),
    "float": "ranks do not agree on config.optimizer.lr: 0.3 on ranks 0-1, 0.30000000000000004 on rank 2; start",
    "threads": None,
    "shape": (
        "ranks do not agree on model.parameters[2]: 1.weight float32 [4, 4] trained on ranks 0-1, 1.weight float32 "
        "[5, 4] trained on rank 2; build the same model in the same way on every rank"
    ),
    "dtype": (
        "ranks do not agree on model.parameters[2]: 1.weight float32 [4, 4] trained on ranks 0-1, 1.weight bfloat16 "
        "[4, 4] trained on rank 2"
    ),
    "missing": (
        "ranks do not agree on model.parameters[3]: 1.bias float32 [4] trained on ranks 0-1, (the list ends before) "
        "on rank 2"
    ),
    "frozen": (
        "ranks do not agree on model.parameters[3]: 1.bias float32 [4] trained on ranks 0-1, 1.bias float32 [4] frozen "
        "on rank 2"
    ),
    "seed": "ranks do not agree on sampler.seed: 0 on rank 0, 1 on rank 1, 2 on rank 2; give every rank's sampler",
    "length": "ranks do not agree on sampler.samples in the data set: 10 on ranks 0-1, 11 on rank 2",
    "unstated": "ranks do not agree on b: (not stated) on ranks 0-1, 2 on rank 2; start every rank in the same way",
    "nan": None,
    "order": None,
    "version": "ranks do not agree on version.torch: ",
}


def test_what_differs_is_named_on_every_rank():
    results = run_ranks(3, CASES)
    for result in results:
        assert result.code == 0, result.err
    first, *others = [json.loads(result.out) for result in results]
    assert others == [first, first]
    for name, words in EXPECTED.items():
        if words is None:
            assert first[name] is None, name
        else:
            assert first[name][0].startswith(words), name
            assert "\n" not in first[name][0]
            assert first[name][1] == ([1, 2] if name == "seed" else [2]), name
    assert "config.optimizer" in first["optimizer"][0]
    assert '"9.9" on rank 2; install the same version on every rank' in first["version"][0]


MAY_DIFFER = {
    *(f"activations.{name}" for name in ("buffers", "disk", "home", "path")),
    "activation_checkpointing.cpu_checkpointing",
    "zeroxide.device_memory",
    *(
        "zeroxide.gradients",
        "zeroxide.host_memory",
        "zeroxide.staging_bytes",
        "zeroxide.tile_bytes",
        "zeroxide.disks",
        "zeroxide.io_engine",
    ),
    *("zeroxide.device", "zeroxide.threads", "zeroxide.trim_libraries", "zeroxide.rank_timeout", "aio.queue_depth"),
    *("report.steps_per_print", "report.wall_clock_breakdown"),
    *(f"comms_logger.{field.name}" for field in dataclasses.fields(CommsLogging)),
    *(f"flops_profiler.{field.name}" for field in dataclasses.fields(FlopsProfile)),
    *("monitor.tensorboard", "monitor.wandb", "monitor.csv_monitor", "zeroxide.log"),
}
"""What may differ between hosts without changing a number; adding to it takes a look at what the field decides."""


WATCHES = {"report", "monitor", "flops_profiler", "comms_logger"}
"""Sections that only say what training shows of itself."""


def test_every_field_of_the_config_must_agree_or_says_why_not():
    """Changing a field changes a fact, unless the field is one of those that ranks may differ in."""
    warm_up = load({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}).scheduler
    plain = Config(optimizer=Optimizer(), scheduler=warm_up, mesh=Mesh(dp_replicate=2, dp_shard=2), pipeline=Pipeline())
    without = set()
    for section in dataclasses.fields(plain):
        inside = getattr(plain, section.name)
        if not dataclasses.is_dataclass(inside):
            assert reason_to_differ(section), section.name
            continue
        for field in dataclasses.fields(inside):
            other = Offload("cpu") if field.name.startswith("offload_") else "another value"
            changed = dataclasses.replace(plain, **{section.name: dataclasses.replace(inside, **{field.name: other})})
            same = config_facts(changed) == config_facts(plain)
            assert same == (reason_to_differ(field) is not None), field.name
            if same:
                without.add(f"{section.name}.{field.name}")
        absent = dataclasses.replace(plain, **{section.name: None})
        assert config_facts(absent) != config_facts(plain) or section.name in WATCHES, section.name
    assert without == MAY_DIFFER


def test_facts_have_the_names_that_a_user_can_look_for():
    names = config_facts(load({"zeroxide": {"unit_bytes": "1MiB"}}, lr=0.1))
    assert {
        *("config.train_batch_size", "config.zero_optimization.stage", "config.zero_optimization.offload_param.kind"),
        *("config.optimizer.lr", "config.precision.dtype", "config.zeroxide.unit_bytes", "config.scheduler"),
    } <= names.keys()


def test_directories_may_differ(tmp_path):
    one = Config(zero=Zero(offload_param=Offload("nvme", tmp_path / "a")))
    two = Config(zero=Zero(offload_param=Offload("nvme", tmp_path / "b")))
    assert config_facts(one) == config_facts(two)


def test_a_single_rank_agrees_with_itself():
    agree(Ranks(), {"a": 1})


def test_model_facts_need_no_values():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    assert model_facts(module) == {"model.parameters": ["weight float32 [2, 3] trained", "bias float32 [2] trained"]}


def test_sampler_facts_are_those_that_the_sampler_has():
    assert sampler_facts(object()) == {}
    stream = torch.utils.data.DataLoader(iter([]))
    assert "sampler.samples in the data set" not in sampler_facts(stream)


def test_versions_are_texts():
    facts = version_facts()
    assert list(facts) == ["version.zeroxide", "version.torch", "version.python"]
    assert all(isinstance(each, str) for each in facts.values())


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([0, 2, 3, 4, 9], "ranks 0, 2-4, 9"),
        (list(range(0, 40, 2)), "ranks 0, 2, 4, 6, 8, 10, 12, 14, ..."),
    ],
)
def test_ranks_in_words(ranks, text):
    assert name_ranks(ranks) == text


def test_many_values_are_cut():
    class Many(Ranks):
        def gather_objects(self, value):
            return [[["a", str(rank) * 200]] for rank in range(9)]

    with pytest.raises(RanksError) as caught:
        agree(Many(world=9), {"a": 1})
    assert "and 5 more values" in str(caught.value)
    assert len(str(caught.value)) < 700
