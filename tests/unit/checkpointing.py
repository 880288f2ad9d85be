"""A model with everything that a checkpoint must keep, and every bit that training depends on."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

import zeroxide
from zeroxide.device.placement import spec
from zeroxide.optim import schedules

VOCABULARY, WIDTH = 50, 32
FP32_BUFFERS = {"data_types": {"buffer_dtype": "fp32"}}
PARTS = ("weights", "exp_avg", "exp_avg_sq")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH + 1)
        self.down = nn.Linear(3 * WIDTH + 1, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied embeddings, repeated blocks, batch statistics, buffers of several dtypes."""

    def __init__(self, tied=True, layers=3, vocabulary=VOCABULARY):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.seen = nn.BatchNorm1d(WIDTH, affine=False)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("turned", torch.rand(2, 3).t())
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        h = self.seen(h.flatten(0, 1).float()).to(h.dtype)
        return nn.functional.cross_entropy(self.head(h).float(), x.roll(1).flatten())


@pytest.fixture
def make(tmp_path):
    """Makes engines and destroys them at the end."""
    made = []

    def build(offload="none", fmt=None, *, dtype="bf16", model=None, seed=0, zeroxide_config=None, config=None, **more):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        model = model or Model()
        section = {"threads": 2, **({"format": fmt} if fmt else {}), **(zeroxide_config or {})}
        if offload == "nvme":
            offload = f"nvme:{tmp_path / 'scratch'}"
        engine, *_ = zeroxide.initialize(
            model=model,
            config={"zeroxide": section, **FP32_BUFFERS, **(config or {})},
            **{"lr": 1e-2, "weight_decay": 0.1, "gradient_clipping": 1.0, **more},
            offload=offload,
            dtype=dtype,
        )
        made.append(engine)
        return engine

    (tmp_path / "scratch").mkdir()
    yield build
    for engine in made:
        engine.destroy()


def train(engine, first, last):
    losses = []
    for step in range(first, last):
        x = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state(engine):
    """Every bit that training depends on, read whole."""
    found = {}
    core = engine.parts.core()
    for unit in engine.parts.units:
        for at, name in enumerate(unit.names):
            for part in PARTS:
                values = torch.empty(unit.shapes[at].numel())
                core.read_param(unit.index, at, part, 0, spec(values))
                found[name, part] = values.view(torch.int32)
            found[name, "updates"] = core.updates(unit.index, at)
    for name, buffer in engine.module.named_buffers():
        found[name, "buffer"] = buffer.clone()
    found["groups"] = [dict(group) for group in engine.optimizer.hyperparameters()]
    found["counters"] = (engine.global_steps, engine.parts.counters.samples, engine.micro_steps, engine.skipped_steps)
    if engine.lr_scheduler is not None:
        found["scheduler"] = dict(engine.lr_scheduler.state_dict())
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype, key
            assert value.equal(other[key]), key
        else:
            assert value == other[key], key


def freeze(model):
    """Freezes some of a unit and all of another one."""
    for name, param in model.named_parameters():
        if name.startswith("blocks.0.up") or name.startswith("blocks.1"):
            param.requires_grad_(False)
    return model


SCHEDULES = {
    "WarmupLR": lambda o: schedules.WarmupLR(o, 0.0, 1e-2, 3),
    "WarmupCosineLR": lambda o: schedules.WarmupCosineLR(o, 6, warmup_num_steps=2),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
}


def assemble(path, part):
    """All tensors of a family of files, pieces put together, by the reference library."""
    found, cut = {}, {}
    for file in sorted(path.glob(f"{part}-*.safetensors")):
        for key, tensor in load_file(file).items():
            if "[" in key:
                name, _, span = key.partition("[")
                cut.setdefault(name, []).append((int(span.split(":")[0]), tensor))
            else:
                found[key] = tensor
    for name, pieces in cut.items():
        found[name] = torch.cat([tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])])
    return found
