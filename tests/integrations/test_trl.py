"""TRL's trainers and PEFT's adapters with a DeepSpeed config: the packages as they are, on one rank and on two.

Compared with TRL's own in fp32 on the same data, on two ranks with DDP's. Tolerance: see `test_trainer.py`; what is a
difference of such numbers, or is near zero, may be off by that much of the numbers themselves, which are below 32.
"""

from __future__ import annotations

import pytest
import torch
from programs import run_cases
from safetensors.torch import load_file

CLOSE = 2e-6
DIFFERENCE = 32 * CLOSE

ONE_RANK = [
    ("plain sft", "sft", None, "none", []),
    ("plain sft lora", "sft", None, "none", ["lora", "modules_to_save"]),
    ("plain dpo", "dpo", None, "none", []),
    ("plain dpo lora", "dpo", None, "none", ["lora"]),
    ("plain grpo", "grpo", None, "none", []),
    ("plain grpo lora", "grpo", None, "none", ["lora"]),
    ("sft", "sft", 2, "cpu", []),
    ("sft lora", "sft", 3, "nvme", ["lora", "modules_to_save", "checkpointing"]),
    ("dpo", "dpo", 3, "nvme", []),
    ("dpo lora", "dpo", 3, "cpu", ["lora"]),
    ("grpo", "grpo", 3, "none", []),
    ("grpo lora", "grpo", 3, "cpu", ["lora"]),
]
TWO_RANKS = [
    ("plain grpo of ranks", "grpo", None, "none", ["two ranks"]),
    ("sft lora of ranks", "sft", 3, "cpu", ["two ranks", "lora", "modules_to_save"]),
    ("dpo of ranks", "dpo", 3, "none", ["two ranks"]),
    ("grpo of ranks", "grpo", 3, "cpu", ["two ranks"]),
]
PAIRS = [
    *((name, f"plain {name}") for name, _, stage, *_ in ONE_RANK if stage),
    ("sft lora of ranks", "plain sft lora"),
    ("dpo of ranks", "plain dpo"),
    ("grpo of ranks", "plain grpo of ranks"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    tokens = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**tokens, **sizes, **heads)).save_pretrained(place / "begun")
    return place


@pytest.fixture(scope="module")
def found(folder):
    alone = run_cases("trl_program.py", folder, ONE_RANK)
    return alone | run_cases("trl_program.py", folder, TWO_RANKS, "--ranks", "2")


@pytest.mark.parametrize(("name", "plain"), PAIRS)
def test_numbers_are_those_of_the_trainer_alone(found, name, plain):
    """Catches: a generation with weights of before a step, a reference model that is trained, an adapter left out."""
    ours, theirs = found[name], found[plain]
    assert ours["engine"] == "zeroxide.engine.engine"
    assert len(ours["loss"]) == 4
    for key, values in theirs.items():
        if key != "checkpoint":
            assert ours[key] == pytest.approx(values, rel=CLOSE, abs=0 if key == "grad_norm" else DIFFERENCE), key


@pytest.mark.parametrize(("name", "plain"), PAIRS)
def test_what_is_saved(found, folder, name, plain):
    """Whole models, and adapters with the modules that were to be saved. Catches: empty tensors, parts, old weights."""
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert {"global_step4", "latest", file} <= set(found[name]["checkpoint"])
    ours, theirs = (load_file(folder / f"{each}-model/{file}") for each in (name, plain))
    assert ours.keys() == theirs.keys()
    assert any("lm_head" in key for key in ours) == ("lora" not in name or name.startswith("sft"))
    # A weight whose gradient is nothing but roundings may move by a full rate at each of the four steps; all together
    # are off by a hundredth of one rate.
    apart = torch.cat([(ours[key] - values).flatten() for key, values in theirs.items()])
    assert apart.abs().max() <= 4 * 2e-3
    assert apart.square().mean().sqrt() <= 1e-5
