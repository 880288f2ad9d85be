"""One run of Lightning's after another with zeroxide's strategy, for `test_lightning.py`: what an engine keeps, gives
back, saves and refuses. Numbers are compared with those of Lightning's DDP; tolerance: see `test_trainer.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning_model import Model, loader, network, trainer
from torch import nn

import zeroxide
from zeroxide.errors import CheckpointError, ConfigError, ModelError
from zeroxide.integrations.lightning import ZeroxideFabricStrategy, ZeroxidePrecision, ZeroxideStrategy
from zeroxide.integrations.lightning.settings import NAMES, NVME_PATH, Settings

CLOSE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def own_group():
    """Lightning makes a process group of one rank, which ends with this file."""
    assert not torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def fit():
    """Fits a model, and ends the engines of the test."""
    runs: list[Any] = []

    def run(model: Model, strategy: Any = "zeroxide_stage_3", ckpt_path: Any = None, **more: Any) -> Any:
        runs.append(trainer(strategy, **more))
        runs[-1].fit(model, loader(), loader(), ckpt_path=ckpt_path)
        return runs[-1]

    yield run
    for each in runs:
        if isinstance(each.strategy, ZeroxideStrategy) and each.strategy._owner and each.strategy._owner.engine:
            each.strategy.engine.destroy()


@pytest.fixture(scope="module")
def plain():
    """Losses of two epochs in one run, with the optimizer's state of before, and of two runs, each with a new one."""
    once, twice = Model(), Model()
    trainer("ddp", max_epochs=2).fit(once, loader())
    for _ in range(2):
        trainer("ddp").fit(twice, loader())
    return once.losses, twice.losses


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


@pytest.mark.parametrize("strategy", ["zeroxide_stage_2", "zeroxide_stage_3"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_is_evaluated_trained_and_trained_again(fit, plain, strategy, precision):
    """Catches: an evaluation that leaves a model rounded, frozen or empty, a second fit that begins from rounded
    weights or with the optimizer of before, and a test with other weights than those of the fit."""
    model = Model()
    before = weights_of(model)
    trainer(strategy, precision=precision).validate(model, loader(), verbose=False)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert all(param.requires_grad for param in model.parameters())
    fit(model, strategy, precision=precision)
    last = fit(model, strategy, precision=precision)
    # Each weight, activation and loss of bf16 has 8 bits: a loss of 3.5 is off by a few of its roundings of 2**-9.
    close = CLOSE if precision == "32-true" else 2**-7
    assert model.losses == pytest.approx(plain[1], rel=close)
    exact = last.strategy.lightning_module_state_dict()
    assert {values.dtype for values in exact.values()} == {torch.float32}
    again = trainer(strategy, precision=precision)
    assert again.test(model, loader(), verbose=False) == last.test(model, loader(), verbose=False)
    assert again.strategy.engine is last.strategy.engine
    # The exact weights go into the next engine: half of them are no bf16 numbers.
    last.strategy._owner.give_back()
    assert all(torch.equal(values, exact[name]) for name, values in model.state_dict().items())
    assert any(not torch.equal(values, values.bfloat16().float()) for values in exact.values())


def test_a_module_built_late_is_in_slices(fit, plain):
    seen = []

    class Late(Model):
        def configure_optimizers(self) -> Any:
            seen.append([each.numel() for each in self.parameters()])
            return super().configure_optimizers()

    model = Late(late=True)
    fit(model, max_epochs=2)
    assert seen == [[0, 0, 0, 0]]
    assert model.losses == pytest.approx(plain[0], rel=CLOSE)


@pytest.mark.parametrize(
    ("precision", "weights", "computes"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
    ],
)
def test_precisions(fit, precision, weights, computes):
    """Catches: an autocast around the engine, a module that is not cast before, a loss without its scale."""
    seen = []

    class Seen(Model):
        def loss(self, batch: Any) -> torch.Tensor:
            seen.append((self.net[1](self.net[0](batch[0])).dtype, torch.is_autocast_enabled("cpu")))
            return super().loss(batch)

        def configure_optimizers(self) -> Any:
            seen.append({each.dtype for each in self.parameters()})
            return super().configure_optimizers()

    # Lightning makes bf16 of "16-mixed" on CPUs, unless it is asked by the object.
    run = fit(Seen(), plugins=[ZeroxidePrecision(precision)])
    assert seen[0] == {weights}
    assert set(seen[1:]) == {(computes, False)}
    assert run.precision == precision
    assert run.strategy.engine.loss_scale() == (2**16 if precision == "16-mixed" else 1)


def test_a_folder_and_a_file(fit, plain, tmp_path: Path):
    """Catches: optimizer state of a plain checkpoint that is not taken over, weights in a file that are rounded or
    those of another step, a hook of the module's that is not asked."""

    class Noted(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["note"] = torch.tensor(7)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.note = checkpoint["note"]

    first = fit(Noted(), precision="bf16-mixed")
    first.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    first.save_checkpoint(tmp_path / "all.ckpt")
    first.save_checkpoint(tmp_path / "all.ckpt")
    assert len(list((tmp_path / "all.ckpt").glob("lightning-*.pt"))) == 1
    exact = first.strategy.lightning_module_state_dict()
    loaded = Noted.load_from_checkpoint(tmp_path / "weights.ckpt", rate=0.5)
    assert all(torch.equal(values, exact[name]) for name, values in loaded.state_dict().items())
    for place in ("weights.ckpt", "all.ckpt"):
        other = Noted()
        found = trainer("zeroxide_stage_3").test(other, loader(), ckpt_path=tmp_path / place, verbose=False)
        # It trains in bf16, and is looked at in fp32.
        expected = first.test(first.lightning_module, loader(), verbose=False)
        assert found[0]["test"] == pytest.approx(expected[0]["test"], 0.01)
        assert other.note == 7
    # What Lightning's DDP has saved, with its optimizer state.
    begun = trainer("ddp")
    begun.fit(Noted(), loader())
    begun.save_checkpoint(tmp_path / "ddp.ckpt")
    model = Noted()
    fit(model, ckpt_path=tmp_path / "ddp.ckpt", max_epochs=2)
    assert model.losses == pytest.approx(plain[0][5:], rel=CLOSE)


@pytest.mark.parametrize("kept_at_once", [1, -1])
def test_saving_in_the_background(fit, tmp_path: Path, kept_at_once):
    """Catches: a run that ends before its last checkpoint is there, and one that is removed while it is written."""
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=kept_at_once)
    strategy = ZeroxideStrategy(config={"zero_optimization": {"stage": 3}, "zeroxide": {"checkpoint_background": True}})
    run = fit(Model(), strategy, callbacks=[kept], enable_checkpointing=True)
    saved = ["epoch=0-step=5.ckpt"] if kept_at_once == 1 else [f"epoch=0-step={step}.ckpt" for step in range(1, 6)]
    assert sorted(each.name for each in tmp_path.iterdir()) == saved
    # Nothing is under way any more.
    assert run.strategy.engine.wait_for_checkpoint() is None
    other = Model()
    fit(other, ckpt_path=tmp_path / "epoch=0-step=5.ckpt", max_epochs=2)
    assert len(other.losses) == 5
    assert run.global_step == 5


def test_saving_between_two_micro_batches(fit, tmp_path: Path):
    """Catches: a save that is refused there, or that takes the gradients away."""

    class Saves(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / f"{len(self.losses)}.ckpt")

    model, plain = Saves(), Model()
    fit(model, accumulate_grad_batches=3, max_epochs=2)
    trainer("ddp", accumulate_grad_batches=3, max_epochs=2).fit(plain, loader())
    assert model.losses == pytest.approx(plain.losses, rel=CLOSE)
    assert len(list(tmp_path.iterdir())) == 10
    trainer("zeroxide_stage_1").test(Model(), loader(), ckpt_path=tmp_path / "4.ckpt", verbose=False)


def test_what_is_in_a_checkpoint_before_it_is_saved(fit, tmp_path: Path):
    """Catches: gathering the model for a dict that is thrown away, and empty weights in it."""

    class Looks(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["net.0.weight"]

    run = fit(Looks())
    with pytest.raises(ModelError, match=r"net\.0\.weight is not in this dict: at stage 3 the engine saves"):
        run.save_checkpoint(tmp_path / "one.ckpt")
    run = fit(Looks(), "zeroxide_stage_2")
    run.save_checkpoint(tmp_path / "one.ckpt")


def test_optimization_by_hand(fit, plain):
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, at: int) -> None:
            optimizer, loss = self.optimizers(), self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()
            self.losses.append(loss.item())

    model = Manual()
    run = fit(model, max_epochs=2)
    assert model.losses == pytest.approx(plain[0], rel=CLOSE)
    assert run.global_step == 10


def test_hooks_of_the_module(fit, plain):
    """Catches: a backward of the module's own that is not called, or a loss that is not scaled for it; clipping that
    the module does itself, at some steps alone."""
    called = []

    class Hooks(Model):
        def backward(self, loss: torch.Tensor) -> None:
            called.append(self.global_step)
            loss.backward()

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            if self.global_step < 2:
                # A hundredth of what it is: the moments of those after it show it.
                self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")

    model, expected = Hooks(), Hooks()
    trainer("ddp", max_epochs=2).fit(expected, loader())
    assert expected.losses[4:] != pytest.approx(plain[0][4:], rel=2e-3)
    fit(model, max_epochs=2)
    assert model.losses == pytest.approx(expected.losses, rel=CLOSE)
    low = Hooks()
    fit(low, max_epochs=2, plugins=[ZeroxidePrecision("16-mixed")])
    assert called == [*range(10)] * 3
    # Numbers of fp16 have 11 bits.
    assert low.losses == pytest.approx(expected.losses, rel=2**-10)


def test_callbacks_and_flags(fit, plain):
    """EarlyStopping by a logged value, anomaly detection, optimizers that zeroxide describes."""

    class Ours(Model):
        def configure_optimizers(self) -> Any:
            optimizer = zeroxide.optim.DeepSpeedCPUAdam(self.parameters(), lr=1e-2, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    run = fit(Model(), max_epochs=9, callbacks=[EarlyStopping("val", patience=1, mode="max")])
    assert run.current_epoch == 2
    model = Ours()
    fit(model, detect_anomaly=True)
    assert model.losses == pytest.approx(plain[0][:5], rel=CLOSE)
    assert model.rates == pytest.approx([1e-2 * 0.9**step for step in range(5)])


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(fit, plain, whole):
    model = Model()
    if not whole:
        model.net = torch.compile(model.net, backend="eager")
    fit(torch.compile(model, backend="eager") if whole else model)
    assert model.losses == pytest.approx(plain[0][:5], rel=CLOSE)


def test_steps_that_evaluate_leave_inference_mode():
    """Lightning enters it unless its process group is gloo's alone. Catches: weights that no later step can train."""
    with torch.inference_mode(), ZeroxidePrecision("32-true").val_step_context():
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    with ZeroxidePrecision("32-true").train_step_context():
        assert torch.is_grad_enabled()


def test_an_optimizer_and_a_schedule_of_the_config(fit):
    """Catches: a schedule that nobody steps, or two do, or that callbacks cannot see."""
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"}
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR", "params": params}}
    model = Model()
    run = fit(model, ZeroxideStrategy(config=config))
    # DeepSpeed's schedules begin a step later than torch's.
    assert model.rates == pytest.approx([0.0, 0.0, 0.0025, 0.005, 0.0075])
    assert run.lr_scheduler_configs[0].interval == "step"


class Two(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(each.parameters()) for each in (self.net[0], self.net[1])]


@pytest.mark.parametrize(
    ("options", "model", "line"),
    [
        ({"sync_batchnorm": True}, Model, "sync_batchnorm=True does not go with"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, Model, "gradient_clip_algorithm="),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, Model, "StochasticWeightAveraging does not go"),
        ({}, Two, "2 optimizers does not go"),
        ({"strategy": ZeroxideStrategy(config={"gradient_clipping": 1.0}), "gradient_clip_val": 0.5}, Model, "say one"),
        ({"strategy": ZeroxideStrategy(config={"gradient_accumulation_steps": 2})}, Model, "accumulate_grad_batches=1"),
        (
            {"strategy": ZeroxideStrategy(config={"fp16": {"enabled": True}}), "precision": "bf16-mixed"},
            Model,
            "say one",
        ),
    ],
)
def test_what_is_refused(options, model, line):
    made = model()
    before = weights_of(made)
    with pytest.raises(ConfigError, match=line):
        trainer(**{"strategy": "zeroxide_stage_3", **options}).fit(made, loader())
    assert all(torch.equal(values, before[name]) for name, values in made.state_dict().items())


def test_what_is_asked_for(monkeypatch, tmp_path: Path):
    """Catches: an option without effect, and contradictions that one side wins silently."""
    monkeypatch.delenv(NVME_PATH, raising=False)
    with pytest.raises(ConfigError, match=r"precision='64-true' does not go with .* expected one of 32-true"):
        trainer("zeroxide_stage_3", precision="64-true")
    with pytest.raises(ConfigError, match=rf"in which directory.* set {NVME_PATH}"):
        trainer("zeroxide_stage_3_nvme")
    with pytest.raises(ConfigError, match="stage and config were both given"):
        ZeroxideStrategy(stage=2, config={})
    with pytest.raises(ConfigError, match='expected "none", "cpu", "nvme" or "nvme:DIRECTORY", got \'disk\''):
        ZeroxideFabricStrategy(offload="disk")
    monkeypatch.setenv(NVME_PATH, str(tmp_path))
    for name, asked in NAMES.items():
        zero = Settings(**asked).config_for(1)["zero_optimization"]
        homes = [zero.get(each, {}).get("device", "none") for each in ("offload_optimizer", "offload_param")]
        both = asked["stage"] == 3
        assert (zero["stage"], homes) == (asked["stage"], [asked["offload"], asked["offload"] if both else "none"]), (
            name
        )
    assert Settings(offload="nvme:/a").given["zero_optimization"]["offload_param"]["nvme_path"] == "/a"
    (tmp_path / "config.json").write_text('{"train_batch_size": 32, "zero_optimization": {"stage": 1}, "fp16": "auto"}')
    settings = Settings(config=tmp_path / "config.json")
    assert settings.stage == 1
    with pytest.raises(ConfigError, match="is not a multiple of"):
        settings.config_for(2, 3)
    assert settings.config_for(2, 4)["train_micro_batch_size_per_gpu"] == 4


def test_an_engine_is_there_when_it_is_asked_for(fit, tmp_path: Path):
    strategy = ZeroxideStrategy(stage=1)
    with pytest.raises(ModelError, match="the strategy has no engine"):
        strategy.engine  # noqa: B018
    run = fit(Model(), strategy)
    run.strategy.engine.save_checkpoint(tmp_path, "checkpoint")
    with pytest.raises(CheckpointError, match="was not saved by Lightning"):
        fit(Model(), ckpt_path=tmp_path)
    assert network()[0].weight.shape == (32, 16)


def test_norms_between_backward_and_step():
    """Against torch's own. Catches: a norm that waits for the step or changes it, and numbers that clip nothing."""
    plain, model = nn.Linear(4, 4), nn.Linear(4, 4)
    model.load_state_dict(plain.state_dict())
    oracle = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.ones(2, 4)).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    oracle.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = zeroxide.initialize(model=model, optimizer=optimizer, gradient_clipping=0.0)
    try:
        engine.backward(engine(torch.ones(2, 4)).square().sum())
        assert engine.measure_grad_norm().item() == pytest.approx(norm.item(), rel=1e-6)
        engine.set_gradient_clipping(0.5)
        assert engine.gradient_clipping() == 0.5
        engine.step()
        assert engine.get_global_grad_norm().item() == pytest.approx(norm.item(), rel=1e-6)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(zeroxide.safe_get_full_fp32_param(one), other, rtol=1e-6, atol=1e-7)
        for wrong in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="expected a finite number of at least 0"):
                engine.set_gradient_clipping(wrong)
    finally:
        engine.destroy()


@pytest.fixture
def fabric():
    """Fabric of one rank, whose engines end with the test."""
    made = lightning.Fabric(accelerator="cpu", devices=1, strategy="zeroxide_stage_3", precision="bf16-mixed")
    made.launch()
    yield made
    for engine in made.strategy.engines:
        engine.destroy()


def tokens() -> torch.Tensor:
    return torch.arange(12).view(2, 6)


def test_models_of_fabric(fabric, tmp_path: Path):
    """Catches: outputs in bf16, a backward of another model, weights in a file that are rounded, an evaluation with the
    weights of before, a compiled model that is no engine's."""
    made = [network(), network()]
    models = [
        fabric.setup(torch.compile(each, backend="eager"), torch.optim.AdamW(each.parameters(), lr=0.1))
        for each in made
    ]
    (one, first), (other, _) = models
    loss = one(tokens()).square().mean()
    assert loss.dtype is torch.float32
    with pytest.raises(ModelError, match="2 models are trained: say which"):
        fabric.backward(loss)
    before = fabric.strategy.get_module_state_dict(_engine(other))
    fabric.backward(loss, model=one)
    assert first.step(closure=lambda: 7) == 7
    after = fabric.strategy.get_module_state_dict(_engine(one))
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert {values.dtype for values in after.values()} == {torch.float32}
    fabric.save(tmp_path / "whole", {"model": one, "optimizer": first, "epoch": 3})
    looks = fabric.setup(network())
    rest = fabric.load(tmp_path / "whole", {"model": looks})
    assert rest == {"epoch": 3}
    assert torch.equal(looks(tokens()), one(tokens()))
    fabric.save(tmp_path / "weights.pt", {"model": looks})
    fabric.load(tmp_path / "weights.pt", {"model": other})
    assert torch.equal(looks(tokens()), other(tokens()))
    state = {"model": other, "epoch": 0}
    assert fabric.load(tmp_path / "whole", state) == {}
    assert state["epoch"] == 3
    with pytest.raises(KeyError, match="has no 'more'"):
        fabric.load(tmp_path / "whole", {"model": other, "more": 1})


def _engine(model: Any) -> Any:
    return getattr(model._forward_module, "_orig_mod", model._forward_module)


def test_what_fabric_is_refused(fabric, tmp_path: Path):
    made = network()
    optimizers = [torch.optim.AdamW(made.parameters()), torch.optim.AdamW(made[1].parameters())]
    with pytest.raises(ConfigError, match="2 optimizers does not go with"):
        fabric.setup(made, *optimizers)
    with pytest.raises(ModelError, match=r"call fabric\.setup\(model, optimizer\)"):
        fabric.setup_optimizers(optimizers[0])
    model, optimizer = fabric.setup(made, optimizers[0])
    with pytest.raises(ConfigError, match=r"clip_val=1\.0 does not go with"):
        fabric.clip_gradients(model, optimizer, clip_val=1.0)
    with pytest.raises(ConfigError, match=r"norm_type=inf does not go with"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=float("inf"))
    with pytest.raises(ConfigError, match="filter does not go with"):
        fabric.save(tmp_path / "a", {"model": model}, filter={"model": lambda *_: True})
    fabric.backward(model(tokens()).sum() * float("inf"))
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.save(tmp_path / "a", {"model": model})
    with pytest.raises(ModelError, match=r"is an engine's: pass the model"):
        fabric.load(tmp_path / "a")
