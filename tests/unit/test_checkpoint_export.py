"""Models as transformers loads them."""

import json
from pathlib import Path

import pytest
import torch
from checkpointing import VOCABULARY, Model, freeze, train
from safetensors import safe_open
from safetensors.torch import load_file

from zeroxide.checkpoint.format import cutting

# Exported models ---------------------------------------------------------------------------------------------------


def hugging_face(kind):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=3, n_head=2))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("offload", ["none", "nvme"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("limit", [1 << 31, 9000])
def test_transformers_loads_what_was_exported(make, tmp_path, monkeypatch, kind, offload, dtype, limit):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    torch.manual_seed(0)
    engine = make(offload, dtype=dtype, model=hugging_face(kind).eval())
    x = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        engine.backward(engine(input_ids=x, labels=x).loss)
        engine.step()
    folder = tmp_path / "model"
    path = engine.save_16bit_model(folder)
    sharded = limit == 9000
    assert path.name == ("model.safetensors.index.json" if sharded else "model.safetensors")
    names = {file.name for file in folder.iterdir()}
    if sharded:
        assert len(names) > 4
        index = json.loads(path.read_text())
        keys = {}
        for name in set(index["weight_map"].values()):
            with safe_open(folder / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                keys.update(dict.fromkeys(file.keys(), name))
        assert keys == index["weight_map"]
        total = sum(tensor.nbytes for name in set(keys.values()) for tensor in load_file(folder / name).values())
        assert index["metadata"]["total_size"] == total
    else:
        assert names == {"model.safetensors"}
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert ("lm_head.weight" in stored) == (kind == "llama")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}

    engine.module.config.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=next(iter(stored.values())).dtype, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert loaded.eval()(input_ids=x).logits.equal(engine(input_ids=x).logits)


def test_exported_bits_are_the_live_ones(make, tmp_path):
    """Trained until many weights lie between two bf16 numbers; the export must round them as the live ones were."""
    engine = make("nvme", "fp32", model=freeze(Model()))
    train(engine, 0, 5)
    path = engine.save_16bit_model(tmp_path / "model")
    stored = load_file(path)
    core = engine.parts.core()
    for unit in engine.parts.units:
        core.gather(unit.index)
        unit.show()
        for name, param in zip(unit.names, unit.params, strict=True):
            assert param.equal(stored.pop(name)), name
        unit.hide()
        core.release(unit.index)
    assert stored.keys() == {
        "mask",
        "empty",
        "turned",
        "seen.running_mean",
        "seen.running_var",
        "seen.num_batches_tracked",
    }
    assert stored["seen.num_batches_tracked"].item() == 5
    assert stored["seen.running_mean"].equal(engine.module.seen.running_mean)


def test_exact_ties_are_exported_as_they_are_computed_with(make, tmp_path):
    model = Model()
    with torch.no_grad():
        model.blocks[0].up.weight.fill_(1 + 2**-8)  # halfway between two bf16 numbers
    engine = make("none", "fp32", model=model)
    stored = load_file(engine.save_16bit_model(tmp_path))["blocks.0.up.weight"]
    assert (stored == 1 + 2**-7).all()
    unit = next(unit for unit in engine.parts.units if "blocks.0.up.weight" in unit.names)
    engine.parts.gatherer.gather(unit)
    assert engine.module.blocks[0].up.weight.equal(stored)
    engine.parts.gatherer.release(unit)


def test_exports_replace_one_another(make, tmp_path, monkeypatch):
    engine = make()
    (tmp_path / "config.json").write_text("{}")
    engine.save_16bit_model(tmp_path)
    monkeypatch.setattr(cutting, "FILE_BYTES", 9000)
    engine.save_16bit_model(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    many = {path.name for path in tmp_path.glob("model-*")}
    monkeypatch.setattr(cutting, "FILE_BYTES", 20000)
    index = engine.save_16bit_model(tmp_path)
    few = {path.name for path in tmp_path.glob("model-*")}
    assert 1 < len(few) < len(many)
    assert few == set(json.loads(index.read_text())["weight_map"].values())
    monkeypatch.undo()
    engine.save_16bit_model(tmp_path)
    engine.save_16bit_model(tmp_path, "other.safetensors")
    (tmp_path / "scratch").rmdir()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "other.safetensors"}


@pytest.mark.parametrize("name", ["model.ckpt", "a/b.safetensors", ".safetensors", ""])
def test_other_names_for_exports_are_refused(make, tmp_path, name):
    from zeroxide.errors import ConfigError

    with pytest.raises(ConfigError, match=r"expected one file name that ends in \.safetensors"):
        make().save_16bit_model(tmp_path, name)


def test_paths_may_be_strings(make, tmp_path):
    engine = make()
    assert engine.save_checkpoint(str(tmp_path / "out")) == Path(tmp_path / "out" / "global_step0")
    assert engine.load_checkpoint(str(tmp_path / "out"))[1] == {}
