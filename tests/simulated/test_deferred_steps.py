"""What scripts do while an optimizer step on a device goes on under what follows it: the bits are those of steps that
end before `step` returns, and those of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import zeroxide
from simulated import engines

MODES = {
    "resident": {"offload_optimizer": {"device": "cpu"}},
    "transient": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "half": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "disk": {"offload_optimizer": {"device": "nvme"}},
}
PLACES = ["deferred", "ended", "cpu"]
Values = list[object]


class Sometimes(nn.Module):
    """The layer in the middle is left out where `skips`: no forward ends its update."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden if self.skips else self.middle(hidden).tanh())


class Wide(Sometimes):
    """With a last layer whose update takes longer than what a step does after it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 1 << 18)


class Run:
    """One engine, and what is seen of it."""

    def __init__(self, mode: str, place: str, folder, precision: dict, model: type[nn.Module] = Sometimes) -> None:
        self.mode, self.place, self.folder = mode, place, folder
        torch.manual_seed(0)
        zero = {"stage": 3, **MODES[mode]}
        zero = {
            key: {**value, "nvme_path": str(folder)} if isinstance(value, dict) and value["device"] == "nvme" else value
            for key, value in zero.items()
        }
        if place == "cpu":
            zero["offload_optimizer"] = {k: v for k, v in zero["offload_optimizer"].items() if k != "ratio"}
        config = {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "gradient_clipping": 0.05,
            "zero_optimization": zero,
            "zeroxide": {"device": "cpu" if place == "cpu" else "sim", "threads": 1},
            **precision,
        }
        self.engine = zeroxide.initialize(model=model(), config=config)[0]
        self.params = dict(self.engine.module.named_parameters())
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.engine.resolved_config.precision.dtype]
        self.number = 0

    def batch(self) -> torch.Tensor:
        self.number += 1
        values = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.number))
        return values.to(self.engine.device, self.dtype)

    def backward(self) -> float:
        loss = self.engine(self.batch()).float().square().mean()
        self.engine.backward(loss)
        return loss.item()

    def step(self) -> None:
        self.engine.step()
        if self.place == "ended":
            self.engine.finish_step()

    def train(self, steps: int = 1) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(self.backward())
            self.step()
        return found

    def values(self) -> Values:
        found: Values = [float(self.engine.get_global_grad_norm() or 0.0)]
        for param in self.params.values():
            found.append(zeroxide.safe_get_full_fp32_param(param).clone())
            for part in ("exp_avg", "exp_avg_sq"):
                found.append(zeroxide.safe_get_full_optimizer_state(param, part).clone())
        return found


def reads(run: Run) -> Values:
    """The last unit first, whose update nothing has asked for."""
    return [
        zeroxide.safe_get_full_fp32_param(run.params["last.weight"]).clone(),
        (2 * run.params["first.bias"]).detach().cpu(),
    ]


def evaluates(run: Run) -> Values:
    with torch.no_grad():
        return [run.engine(torch.ones(2, 8, device=run.engine.device, dtype=run.dtype)).cpu()]


def saves(run: Run) -> Values:
    run.engine.save_checkpoint(run.folder / run.place)
    found = run.train()
    run.engine.load_checkpoint(run.folder / run.place)
    return [*found, *run.values()]


def loads(run: Run) -> Values:
    """Over an update that is still to come."""
    run.engine.save_checkpoint(run.folder / run.place)
    run.train()
    run.engine.load_checkpoint(run.folder / run.place)
    return run.values()


def edits(run: Run) -> Values:
    with zeroxide.zero.GatheredParameters([run.params["last.weight"]], modifier_rank=0), torch.no_grad():
        run.params["last.weight"].mul_(2)
    run.train()
    zeroxide.safe_set_full_fp32_param(run.params["middle.weight"], torch.linspace(-1, 1, 64).view(8, 8))
    run.train()
    zeroxide.safe_set_full_optimizer_state(run.params["last.bias"], torch.full((8,), 0.25), "exp_avg")
    return run.values()


def loads_a_state_dict(run: Run) -> Values:
    state = {name: value.clone() * 2 for name, value in run.engine.module_state_dict().items()}
    run.train()
    run.engine.load_module_state_dict(state)
    kept = run.engine.optimizer.state_dict()
    saved = {**kept, "state": {at: {k: v.clone() for k, v in each.items()} for at, each in kept["state"].items()}}
    run.train()
    run.engine.optimizer.load_state_dict(saved)
    return run.values()


def sets_a_gradient(run: Run) -> Values:
    """In the place of one that the update still needs."""
    if run.dtype is torch.float16:
        # Which is refused where no loss was scaled.
        run.backward()
    zeroxide.safe_set_full_grad(run.params["last.weight"], torch.full((8, 8), 0.5))
    found = [zeroxide.safe_get_full_grad(run.params["last.weight"]).clone()]
    run.step()
    return [*found, *run.values()]


def forgets_gradients(run: Run) -> Values:
    run.engine.zero_grad()
    run.backward()
    run.engine.zero_grad()
    return run.values()


def changes_the_rate(run: Run) -> Values:
    """The update that goes on has the rate of its step."""
    run.engine.set_lr(1.0)
    run.engine.optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    return run.values()


def leaves_a_layer_out(run: Run) -> Values:
    run.engine.module.skips = True
    found = run.train(2)
    run.engine.module.skips = False
    return [*found, *run.train()]


def steps_again(run: Run) -> Values:
    run.step()
    run.step()
    return run.values()


def fails(run: Run) -> Values:
    handle = run.engine.module.middle.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.engine(run.batch())
    handle.remove()
    return []


def counts(run: Run) -> Values:
    """What a second copy of the model, in the middle of it, has."""
    with zeroxide.zero.GatheredParameters(list(run.params.values())):
        return [param.detach().cpu().clone() for param in run.params.values()]


ACTS = [
    reads, evaluates, saves, loads, edits, loads_a_state_dict, sets_a_gradient, forgets_gradients, changes_the_rate,
    leaves_a_layer_out, steps_again, fails, counts,
]  # fmt: skip
PRECISIONS = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}},
}


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 50, seed=8)
    with engines.followed(kernels=True):
        yield
    assert [str(each) for each in sim.races()] == []


def same(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def found(act: Callable[[Run], Values], mode: str, place: str, folder, precision: str) -> Values:
    run = Run(mode, place, folder, PRECISIONS[precision])
    try:
        first = run.train(4 if precision == "fp16" else 2)
        return [*first, *act(run), *run.train(2), *run.values(), run.engine.skipped_steps]
    finally:
        run.engine.destroy()


@pytest.mark.parametrize(("mode", "precision"), [*((mode, "bf16") for mode in MODES), ("resident", "fp16")])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_what_follows_a_step_finds_it_done(act, mode, precision, tmp_path):
    """Catches: values of before the step, an update with what was changed after it, one that is lost or made twice."""
    results = {place: found(act, mode, place, tmp_path, precision) for place in PLACES}
    if precision == "fp16":
        assert 0 < results["cpu"][-1] < 6, "some steps overflow, and some do not"
    for place in PLACES[:2]:
        assert len(results[place]) == len(results["cpu"])
        differing = [at for at, value in enumerate(results["cpu"]) if not same(value, results[place][at])]
        assert differing == [], place


def under_way(run: Run) -> bool:
    """Whether a step had still to update the last unit when it returned."""
    run.backward()
    window = run.engine.parts.units[-1].memory.window
    before = window.clone()
    run.step()
    found = torch.equal(window, before)
    run.engine.finish_step()
    assert not torch.equal(window, before)
    return found


def test_a_step_is_under_way_when_it_returns(tmp_path):
    """Without which the tests above say nothing, and an end comes in the middle of it. The core's thread may be quicker
    than a look at the window, but not at every one of 50 steps. Catches: a step that ends before it returns."""
    run = Run("resident", "deferred", tmp_path, PRECISIONS["bf16"], Wide)
    run.train()
    assert any(under_way(run) for _ in range(50))
    run.train()
    run.engine.destroy()
