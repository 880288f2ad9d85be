"""The FLOPs profiler against counts by hand, and training beside it against training without."""

from __future__ import annotations

import logging
import re
import time

import pytest
import torch
from running import started, state_of
from torch import nn
from torch.nn import functional as F

from zeroxide.errors import ModelError
from zeroxide.profiling import FlopsProfiler, get_model_profile
from zeroxide.profiling.numbers import number_to_string, params_to_string

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "train_micro_batch_size_per_gpu": 2}


def gpt2(**more):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_positions=16, vocab_size=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **more
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def gpt2_flops(tokens, sequence, width=32, layers=2, vocabulary=64):
    """Two operations a multiply-accumulate: 12 width**2 weights a block and token (4 of attention, 8 of the MLP),
    scores and their use over the whole square of the sequence, and the logits. Biases and norms are no products."""
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens * sequence * width
    return layers * block + 2 * tokens * width * vocabulary


def llama_flops(tokens, sequence, width=32, inner=48, layers=2, vocabulary=64, shared=2):
    """As for GPT-2, with keys and values `shared` times narrower and three matrices in the MLP. The rotary
    embedding is done element by element."""
    attention = 2 * width**2 + 2 * width * (width // shared)
    block = 2 * tokens * (attention + 3 * width * inner) + 2 * 2 * tokens * sequence * width
    return layers * block + 2 * tokens * width * vocabulary


FAMILIES = {"gpt2": (gpt2, gpt2_flops), "llama": (llama, llama_flops)}
BATCH, SEQUENCE = 2, 8


def ids():
    return torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % 64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_forward_flops_are_those_of_the_formula(family, implementation):
    """Catches: an operation counted twice, in a module and in what it is in, or not at all."""
    make, formula = FAMILIES[family]
    model = make()
    model.set_attn_implementation(implementation)
    flops, macs, params = get_model_profile(model, kwargs={"input_ids": ids()}, print_profile=False, as_string=False)
    expected = formula(BATCH * SEQUENCE, SEQUENCE)
    assert flops == expected
    assert macs == expected // 2
    assert params == sum(each.numel() for each in {id(p): p for p in model.parameters()}.values())


def test_each_module_has_its_own_and_what_is_in_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.conv = nn.Conv1d(2, 3, 3, padding=1)

        def forward(self, x):
            x = self.inner(self.inner(x))
            return self.conv(x) @ torch.ones(4, 5)

    model = Twice()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.ones(1, 2, 4))
    profiler.stop_profile()
    linear, conv, product = 2 * 2 * (2 * 4 * 4), 2 * (3 * 4) * (2 * 3), 2 * 3 * 4 * 5
    assert profiler.cost_of(model.inner).flops == linear
    assert profiler.cost_of(model.conv).flops == conv
    assert profiler.get_total_flops() == linear + conv + product
    assert profiler.cost_of(model.conv).params == 3 * 2 * 3 + 3
    assert profiler.cost_of(model.inner).seconds + profiler.cost_of(model.conv).seconds <= profiler.get_total_duration()


class Sleeps(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_latency_is_at_least_what_a_module_slept_and_at_most_what_went_by():
    model = nn.Sequential(Sleeps(0.02), Sleeps(0.05))
    profiler = FlopsProfiler(model)
    start = time.perf_counter()
    profiler.start_profile()
    model(torch.ones(1))
    profiler.stop_profile()
    whole = time.perf_counter() - start
    first, second = (profiler.cost_of(each).seconds for each in model)
    assert first >= 0.02
    assert second >= 0.05
    assert first + second <= profiler.get_total_duration() <= whole


def test_a_module_that_calls_itself_is_counted_once():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x, depth=2):
            return x if depth == 0 else self(F.linear(x, self.weight), depth - 1)

    model = nn.Sequential(Recursive())
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.ones(1, 3))
    profiler.stop_profile()
    assert profiler.get_total_flops() == profiler.cost_of(model[0]).flops == 2 * 2 * 9


def test_a_forward_that_fails_leaves_no_hook_behind():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("no")

    model = nn.Sequential(nn.Linear(2, 2), Fails())
    with pytest.raises(KeyError):
        get_model_profile(model, (1, 2), warm_up=0)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ModelError, match="start_profile"):
        FlopsProfiler(model).get_total_flops()


def test_types_that_are_ignored_count_for_what_they_are_in():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=[nn.Linear])
    model(torch.ones(1, 4))
    profiler.stop_profile()
    assert profiler.get_total_flops() == 32
    assert profiler.cost_of(model[0]).flops == 0
    profiler.end_profile()
    profiler.print_model_profile()


def test_words():
    assert get_model_profile(nn.Linear(1000, 1000, bias=False), (1, 1000), print_profile=False) == (
        "2 M",
        "1 MMACs",
        "1 M",
    )
    assert number_to_string(0) == "0 "
    assert number_to_string(1.5e-5) == "15 u"
    assert params_to_string(7.24e9) == "7.24 B"
    with pytest.raises(ValueError, match="mode"):
        get_model_profile(nn.Linear(1, 1), (1, 1), mode="backward")
    with pytest.raises(ValueError, match="needs input_shape, args or kwargs"):
        get_model_profile(nn.Linear(1, 1))


# --- in an engine ----------------------------------------------------------------------------------------------------


def train(config, steps=3, accumulation=2):
    losses = []
    with started(gpt2(), config=config | {"gradient_accumulation_steps": accumulation}) as engine:
        for _ in range(steps * accumulation):
            loss = engine(input_ids=ids(), labels=ids()).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, state_of(engine)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_step_that_is_profiled_has_the_same_bits_and_is_told_once(tmp_path, stage):
    """Catches: parameters counted as empty, a profile at every micro-batch or at the wrong step, changed numbers."""
    path = tmp_path / "folder" / "profile.txt"
    plain = ADAM | {"zero_optimization": {"stage": stage}, "bf16": {"enabled": stage == 3}}
    wanted = {"enabled": True, "profile_step": 1, "output_file": str(path), "recompute_fwd_factor": 1.0}
    losses, state = train(plain | {"flops_profiler": wanted})
    expected_losses, expected = train(plain)
    assert losses == expected_losses
    for name, values in expected.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(state[name], values, strict=True)), name
    text = path.read_text()
    assert text.count("FLOPs profile at step 1") == 1
    flops = gpt2_flops(BATCH * SEQUENCE, SEQUENCE)
    assert re.search(rf"^fwd flops +{re.escape(number_to_string(flops))}$", text, re.MULTILINE)
    params = sum(each.numel() for each in gpt2().parameters())
    assert re.search(rf"^params +{re.escape(params_to_string(params))}$", text, re.MULTILINE)
    assert "bwd FLOPS = 3 * fwd flops / bwd latency" in text
    assert "samples/second" in text
    # A line for every module.
    assert text.count("(GPT2Block)") == 2
    assert re.search(r"lm_head \(Linear\) +2\.05 K +\d", text)


def test_forward_is_measured_at_the_step_that_is_asked_for_alone(tmp_path, monkeypatch):
    began = []
    start = FlopsProfiler.start_profile
    monkeypatch.setattr(FlopsProfiler, "start_profile", lambda self: (began.append(len(calls)), start(self)))
    calls = []
    config = ADAM | {"flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "a")}}
    with started(nn.Linear(4, 2), config=config | {"gradient_accumulation_steps": 2}) as engine:
        for step in range(4):
            for _ in range(2):
                loss = engine(torch.ones(2, 4)).sum()
                calls.append(step)
                engine.backward(loss)
                engine.step()
            assert (tmp_path / "a").exists() == (step >= 2)
    assert began == [4]


def test_evaluation_is_not_what_is_measured(capsys):
    config = ADAM | {"flops_profiler": {"enabled": True, "profile_step": 0, "detailed": False, "module_depth": 0}}
    with started(nn.Sequential(nn.Linear(4, 2)), config=config) as engine:
        engine.eval()
        engine(torch.ones(64, 4))
        engine.train()
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
    out = capsys.readouterr().out
    assert re.search(rf"^fwd flops +{2 * 2 * 4 * 2} $|^fwd flops +{2 * 2 * 4 * 2}$", out, re.MULTILINE)
    assert "depth 0" in out
    assert "depth 1" not in out
    assert "every module" not in out


def test_a_file_that_cannot_be_written_is_said_and_the_profile_printed(tmp_path, capsys, caplog):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "x" / "y")
    config = ADAM | {"flops_profiler": {"enabled": True, "profile_step": 0, "output_file": place}}
    with started(nn.Linear(4, 2), config=config) as engine, caplog.at_level(logging.WARNING, "zeroxide"):
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
        assert engine.was_step_applied()
    assert "FLOPs profile at step 0" in capsys.readouterr().out
    assert [each for each in caplog.messages if each.startswith("flops_profiler.output_file: cannot write to")]
