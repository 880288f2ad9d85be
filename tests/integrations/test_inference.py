"""`deepspeed.init_inference`, against transformers by itself in the same dtype: the same operations and bits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from running import started
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from zeroxide.errors import ConfigError, ModelError
from zeroxide.integrations.deepspeed.inference import InferenceEngine, init_inference

SIZES = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
PROMPT = torch.tensor([[1, 2, 3]])
HOW = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))


@pytest.fixture
def own_group():
    """A process group of one rank is made by whoever asks, and ends with the test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("home", [None, "none", "cpu", "nvme"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "fp16", "torch.float32"])
def test_generation(model, dtype, home, tmp_path, own_group):
    """Catches: weights in another dtype, dropout that stays on, weights that are not there."""
    given = getattr(torch, {"fp16": "float16", "torch.float32": "float32"}.get(dtype, "bfloat16"))
    plain = copy.deepcopy(model).to(given).eval()
    zero = {"zero": {"offload_param": {"device": home, "nvme_path": str(tmp_path)}}} if home else {}
    engine = init_inference(model, dtype=dtype, **zero)
    assert isinstance(engine, InferenceEngine)
    assert isinstance(engine.module, GPT2LMHeadModel)
    assert not engine.training
    with torch.no_grad():
        assert torch.equal(engine(PROMPT).logits, plain(PROMPT).logits)
        assert torch.equal(engine.generate(PROMPT, **HOW), plain.generate(PROMPT, **HOW))
    assert engine.config.n_embd == 32
    assert home is None or sum(param.numel() for param in model.parameters()) == 0
    engine.destroy()


def test_configs(model, tmp_path, caplog):
    """Catches: a key with two values of which one is taken, an unknown key, a key without effect that says nothing."""
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"dtype": "bf16", "max_tokens": 4}))
    engine = init_inference(model, config=str(path), kernel_inject=True, tensor_parallel={"tp_size": 1})
    assert next(model.parameters()).dtype is torch.bfloat16
    assert "replace_with_kernel_inject has no effect: layers are not replaced" in caplog.text
    engine.generate(torch.ones(1, 4, dtype=torch.long), **HOW)
    with pytest.raises(ModelError, match="a prompt of 5 tokens, and max_out_tokens is 4"):
        engine.generate(torch.ones(1, 5, dtype=torch.long), **HOW)
    assert next(init_inference(nn.Linear(2, 2)).parameters()).dtype is torch.float16


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"config": {"max_tokens": 4}, "max_out_tokens": 5}, "max_out_tokens is 4 in one place and 5 in another"),
        ({"tensor_parallel": {"tp_size": 2}}, "tensor_parallel={'tp_size': 2} is not built"),
        ({"mp_size": 2}, "mp_size=2 is not built"),
        ({"enable_cuda_graph": True}, "enable_cuda_graph=True is not built"),
        ({"checkpoint": "x.json"}, "checkpoint='x.json' is not built"),
        ({"dtype": torch.int8}, "dtype: expected fp32, fp16 or bf16, got torch.int8"),
        ({"dtype": "int8"}, "dtype: expected fp32, fp16 or bf16, got 'int8'"),
        ({"dtyp": "fp16"}, "unknown key 'dtyp'"),
        ({"config": "/missing.json"}, "/missing.json"),
        ({"config": 3}, "expected a dict or a path, got int"),
        ({"max_out_tokens": None}, "expected a number above 0, got None"),
        ({"zero": "yes"}, "expected a section for stage 3, got 'yes'"),
        ({"zero": {"stage": 2}}, "expected a section for stage 3"),
    ],
)
def test_what_is_refused(model, given, line):
    with pytest.raises(ConfigError) as caught:
        init_inference(model, **given)
    assert line in str(caught.value)
    assert next(model.parameters()).dtype is torch.float32


def test_a_model_that_an_engine_has_is_left_alone(model):
    """Catches: weights that are cast under an engine, whose every later step would fail."""
    with started(model, config={"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}) as engine:
        with pytest.raises(ModelError, match="has its values in an engine"):
            init_inference(model)
        engine.backward(engine(PROMPT, labels=PROMPT).loss)
        engine.step()


def test_its_state_dict_is_the_modules(model, own_group):
    """Catches: weights under two names."""
    engine = init_inference(model, dtype="fp32", zero={"offload_param": {"device": "cpu"}})
    assert set(engine.state_dict()) == {f"module.{name}" for name in model.state_dict()}
    engine.destroy()
