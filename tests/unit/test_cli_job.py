"""The training loop over a fake engine: what it reports, keeps, repeats and refuses."""

import json
import os
import signal
import sys

import pytest
import torch
from cli_fake_engine import FakeInitialize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zeroxide.cli.training.job import run
from zeroxide.cli.training.options import TrainOptions
from zeroxide.errors import CheckpointError, ConfigError, DataError

STEPS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number:02}.py").write_text(
            "".join(f"def function_{i}(a, b={number}):\n    return a * {i} + b\n\n\n" for i in range(20))
        )
    return folder


@pytest.fixture
def options(tmp_path, text):
    def make(**changes):
        values = {
            "model": "tiny",
            "data": (str(text),),
            "steps": STEPS,
            "batch_size": 2,
            "seq_len": 32,
            "lr": 3e-3,
            "dtype": "fp32",
            "threads": 1,
            "sample_tokens": 6,
            "eval_batches": 2,
            "out": str(tmp_path / "run"),
            **changes,
        }
        return TrainOptions(**values)

    return make


def events(path, kind):
    return [event for event in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if event["event"] == kind]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def losses(path):
    return {event["step"]: event["loss"] for event in events(path, "step")}


def stop_at(step, number=signal.SIGINT):
    return lambda applied: os.kill(os.getpid(), number) if applied == step else None


def test_a_whole_run(options, tmp_path, capsys):
    fake = FakeInitialize()
    assert run(options(save_every=3, eval_every=4), initialize=fake) == 0
    assert fake.engine.destroyed
    path = tmp_path / "run"
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == STEPS
    for field in ("loss", "norm", "lr", "tok/s", "rss 1.00/2.00 GiB", "disk r", "GB/s", "hidden  75%"):
        assert field in steps[3]
    assert list(losses(path)) == list(range(1, STEPS + 1))
    assert losses(path)[STEPS] < losses(path)[1] - 0.1
    assert [event["step"] for event in events(path, "eval")] == [4, STEPS]
    assert [event["step"] for event in events(path, "checkpoint")] == [3, 6, 8]
    assert checkpoints(path) == ["step-6", "step-8"]
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    sample = events(path, "sample")[0]
    assert sample["prompt"]
    assert any(line.startswith("  | ") for line in lines)
    step = events(path, "step")[0]
    assert step["io_hidden"] == 0.75
    assert step["tokens"] == 64


def test_the_model_folder_loads_in_transformers(options, tmp_path, text):
    fake = FakeInitialize()
    run(options(), initialize=fake)
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    saved = load_file(folder / "model.safetensors")
    assert saved["transformer.wte.weight"].equal(fake.engine.module.transformer.wte.weight.detach().bfloat16())
    prompt = (text / "00.py").read_text()[:30]
    assert model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt


def test_what_the_engine_is_asked_for(options):
    fake = FakeInitialize()
    run(
        options(dtype="bf16", clip=0.5, weight_decay=0.2, accumulate=2, offload="cpu", host_memory="2GiB"),
        initialize=fake,
    )
    config = fake.arguments["config"]
    assert config["bf16"] == {"enabled": True}
    assert config["zeroxide"] == {"format": "split", "io_engine": "auto", "threads": 1, "recompute": "none"}
    assert config["gradient_clipping"] == 0.5
    assert config["gradient_accumulation_steps"] == 2
    assert fake.arguments["offload"] == "cpu"
    assert fake.arguments["host_memory"] == "2GiB"
    decayed, *plain = fake.arguments["model_parameters"]
    assert decayed["weight_decay"] == 0.2
    assert {group["weight_decay"] for group in plain} == {0.0}
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for group in plain for parameter in group["params"]} == {1}


def test_the_config_is_one_that_zeroxide_takes(options):
    from zeroxide.config import load

    fake = FakeInitialize()
    run(options(), initialize=fake)
    config = load(fake.arguments["config"], offload="cpu", host_memory="2GiB")
    assert config.zeroxide.threads == 1
    assert config.report.steps_per_print is None
    assert config.no_effect == []


def test_the_same_seed_gives_the_same_run(options, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(options(out=str(tmp_path / name), seed=seed, sample_tokens=0), initialize=FakeInitialize())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_is_as_never_stopped(options, tmp_path, capsys, number, text):
    """Dropout is on, accumulation is 2 and the schedule decays, so all three must resume."""
    model = tmp_path / "model"
    model.mkdir()
    from zeroxide.cli.training.models import choose_model

    config = choose_model("tiny").config
    config.resid_pdrop = config.embd_pdrop = 0.2
    config.save_pretrained(model)
    wanted = options(model=str(model), accumulate=2, out=str(tmp_path / "straight"))
    straight = FakeInitialize()
    assert run(wanted, initialize=straight) == 0

    stopped = options(model=str(model), accumulate=2, out=str(tmp_path / "halves"))
    assert run(stopped, initialize=FakeInitialize(stop_at(3, number))) == 128 + number
    assert losses(tmp_path / "halves").keys() == {1, 2, 3}
    assert not (tmp_path / "halves" / "model").exists()
    assert "go on with: zeroxide train --resume" in capsys.readouterr().out
    resumed = FakeInitialize()
    given = TrainOptions(out=str(tmp_path / "halves"))
    assert run(given, resume=True, explicit=frozenset({"out"}), initialize=resumed) == 0
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    for (name, one), two in zip(
        straight.engine.module.named_parameters(), resumed.engine.module.parameters(), strict=True
    ):
        assert one.equal(two), name
    assert events(tmp_path / "halves", "eval")[-1]["loss"] == events(tmp_path / "straight", "eval")[-1]["loss"]


def test_every_micro_batch_is_another_part_of_the_text(options):
    seen = []

    class Watching(FakeInitialize):
        def __call__(self, **arguments):
            made = super().__call__(**arguments)
            forward = self.engine.forward

            def watch(**batch):
                if torch.is_grad_enabled():
                    seen.extend(map(tuple, batch["input_ids"].tolist()))
                return forward(**batch)

            self.engine.forward = watch
            return made

    run(options(accumulate=3, sample_tokens=0), initialize=Watching())
    assert len(seen) == len(set(seen)) == STEPS * 3 * 2


def test_handlers_are_given_back(options):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(options(sample_tokens=0), initialize=FakeInitialize())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_ends_the_run_at_once(options, tmp_path):
    def twice(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    fake = FakeInitialize(twice)
    with pytest.raises(KeyboardInterrupt):
        run(options(save_every=1), initialize=fake)
    assert fake.engine.destroyed
    assert losses(tmp_path / "run").keys() == {1}
    assert checkpoints(tmp_path / "run") == ["step-1"]


def test_resume_takes_free_options_and_refuses_the_others(options, tmp_path, text):
    run(options(), initialize=FakeInitialize(stop_at(2)))
    out = str(tmp_path / "run")
    changed = TrainOptions(out=out, lr=1e-4, seed=9, batch_size=2, steps=20)
    with pytest.raises(ConfigError) as caught:
        run(changed, resume=True, explicit=frozenset({"out", "lr", "seed", "batch_size", "steps"}))
    message = caught.value.message
    assert "--lr (run: 0.003, now: 0.0001)" in message
    assert "--seed (run: 0, now: 9)" in message
    assert "--steps (run: 8, now: 20)" in message
    assert "--batch-size" not in message
    free = TrainOptions(out=out, eval_every=1, threads=2, offload="cpu")
    fake = FakeInitialize()
    assert run(free, resume=True, explicit=frozenset({"out", "eval_every", "threads", "offload"}), initialize=fake) == 0
    assert fake.arguments["offload"] == "cpu"
    assert [event["step"] for event in events(tmp_path / "run", "eval")] == list(range(3, STEPS + 1))


def test_resume_needs_the_text_only_when_it_is_named(options, tmp_path, text):
    source = tmp_path / "text.txt"
    source.write_text((text / "00.py").read_text() * 20)
    run(options(data=(str(source),)), initialize=FakeInitialize(stop_at(2)))
    source.write_text("other text\n" * 2000)
    out = str(tmp_path / "run")
    with pytest.raises(ConfigError, match="--data is not what the run began with"):
        run(TrainOptions(out=out, data=(str(source),)), resume=True, explicit=frozenset({"out", "data"}))
    source.unlink()
    assert run(TrainOptions(out=out), resume=True, explicit=frozenset({"out"}), initialize=FakeInitialize()) == 0


def test_resume_refuses_a_changed_model(options, tmp_path):
    from zeroxide.cli.training.models import choose_model

    model = tmp_path / "model"
    config = choose_model("tiny").config
    config.save_pretrained(model)
    run(options(model=str(model)), initialize=FakeInitialize(stop_at(2)))
    config.n_layer = 3
    config.save_pretrained(model)
    with pytest.raises(ConfigError, match="the config of --model"):
        run(TrainOptions(out=str(tmp_path / "run")), resume=True, explicit=frozenset({"out"}))


def test_a_finished_run_has_nothing_to_resume(options, tmp_path):
    run(options(save_every=4), initialize=FakeInitialize())
    with pytest.raises(ConfigError, match="at step 8 of 8 already"):
        run(
            TrainOptions(out=str(tmp_path / "run")),
            resume=True,
            explicit=frozenset({"out"}),
            initialize=FakeInitialize(),
        )


def test_results_are_not_overwritten(options, tmp_path):
    run(options(), initialize=FakeInitialize())
    with pytest.raises(ConfigError, match="already holds a run"):
        run(options(), initialize=FakeInitialize())


def test_default_folders_do_not_collide(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(options(out=None, sample_tokens=0), initialize=FakeInitialize())
    assert (tmp_path / "runs" / "tiny" / "model").is_dir()
    assert (tmp_path / "runs" / "tiny-2" / "model").is_dir()
    run(options(out=None), initialize=FakeInitialize(stop_at(1)))
    fake = FakeInitialize()
    assert run(TrainOptions(model="tiny"), resume=True, initialize=fake) == 0
    assert (tmp_path / "runs" / "tiny-3" / "model").is_dir()


def test_resume_without_a_run_or_a_checkpoint(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run of tiny under runs"):
        run(TrainOptions(model="tiny"), resume=True)
    with pytest.raises(ConfigError, match="holds no run"):
        run(TrainOptions(out="nowhere"), resume=True)
    assert not (tmp_path / "nowhere").exists()
    run(options(), initialize=FakeInitialize())
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(TrainOptions(out="run"), resume=True, explicit=frozenset({"out"}), initialize=FakeInitialize())


def test_fine_tuning_starts_from_the_weights_and_their_tokenizer(options, tmp_path, capsys):
    run(options(dtype="bf16"), initialize=FakeInitialize())
    capsys.readouterr()
    folder = tmp_path / "run" / "model"
    seen = {}

    def look(step):
        if step == 1:
            seen.update({key: value.detach().clone() for key, value in fake.engine.module.named_parameters()})

    fake = FakeInitialize(look)
    assert run(options(model=str(folder), out=str(tmp_path / "tuned"), steps=1, warmup=0), initialize=fake) == 0
    saved = load_file(folder / "model.safetensors")
    assert all(value.equal(saved[key].float()) for key, value in seen.items())
    assert "fine-tuned" in capsys.readouterr().out
    ours, theirs = (
        json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        for path in (tmp_path / "tuned" / "model", folder)
    )
    assert ours == theirs


def rates(fake):
    """The peak rate of every parameter, by name, in the engine that the run made."""
    names = {id(parameter): name for name, parameter in fake.engine.module.named_parameters()}
    groups = fake.engine.optimizer.param_groups
    return {names[id(p)]: (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_biases_have_a_rate_of_their_own_until_they_are_loaded(options, tmp_path, capsys):
    fake = FakeInitialize()
    run(options(lr=1e-3, bias_lr=2e-2, weight_decay=0.5, dtype="bf16"), initialize=fake)
    assert "lr 0.001 (biases 0.02) cosine" in capsys.readouterr().out
    drawn = rates(fake)
    assert drawn.keys() == dict(fake.engine.module.named_parameters()).keys()
    for name, rate in drawn.items():
        expected = (2e-2, 0.0) if name.endswith(".bias") else (1e-3, 0.0 if ".ln_" in name else 0.5)
        assert rate == expected, name
    folder, fake = str(tmp_path / "run" / "model"), FakeInitialize()
    run(options(model=folder, out=str(tmp_path / "tuned"), steps=1, lr=1e-3, bias_lr=2e-2), initialize=fake)
    assert {rate for rate, _ in rates(fake).values()} == {1e-3}
    assert "(biases" not in capsys.readouterr().out


def test_activation_checkpointing_gives_the_same_numbers(options, tmp_path):
    for name, on in (("off", False), ("on", True)):
        fake = FakeInitialize()
        run(options(out=str(tmp_path / name), activation_checkpointing=on, sample_tokens=0), initialize=fake)
        assert fake.engine.module.transformer.gradient_checkpointing is on
    assert losses(tmp_path / "off") == losses(tmp_path / "on")


def test_a_prompt_is_continued(options, tmp_path):
    run(options(sample_prompt="def function_1("), initialize=FakeInitialize())
    assert events(tmp_path / "run", "sample")[0]["prompt"] == "def function_1("


def test_too_little_data_and_too_long_sequences(options, tmp_path):
    with pytest.raises(DataError, match="too little data: one batch of 4096 x 32 needs 131,072 tokens"):
        run(options(batch_size=4096), initialize=FakeInitialize())
    with pytest.raises(ConfigError, match="--seq-len 300 is longer than tiny can take"):
        run(options(seq_len=300), initialize=FakeInitialize())
    with pytest.raises(DataError, match="--sample-prompt holds no tokens"):
        run(options(sample_prompt=""), initialize=FakeInitialize())


def test_a_missing_plotting_library_costs_only_the_picture(options, tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(blocked), *sys.path]))
    assert run(options(), initialize=FakeInitialize()) == 0
    assert "no loss plot: " in capsys.readouterr().out
    assert (tmp_path / "run" / "model").exists()


def test_the_loop_keeps_no_graph_alive(options):
    """The number of live tensors is the same after each step."""
    import gc

    counts = []

    def count(step):
        gc.collect()
        counts.append(sum(isinstance(item, torch.Tensor) for item in gc.get_objects()))

    run(options(sample_tokens=0), initialize=FakeInitialize(count))
    assert len(set(counts[2:])) == 1
