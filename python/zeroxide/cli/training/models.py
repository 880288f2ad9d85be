"""From `--model` to a model on the meta device: presets, and Hugging Face model directories.

On the meta device a model has shapes and no storage, so a model of any size is built in a few megabytes. Buffers that
no checkpoint holds (rotary frequencies, for one) are small and get their values here; parameters get theirs unit by
unit, from a weight source.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroxide.cli.paths import written_path
from zeroxide.cli.quiet import quiet
from zeroxide.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["PRESETS", "ModelChoice", "build_model", "choose_model", "num_parameters", "preset"]

_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    # Dropout is for many passes over little data; pre-training makes few, and its masks cost memory.
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e5}}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_GPT2, "vocab_size": 512, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 2},
    "tiny-llama": {
        **_LLAMA,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-1b": {
        **_LLAMA,
        "vocab_size": 65536,
        "max_position_embeddings": 4096,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    # The shapes of Llama 3 70B (arXiv 2407.21783, table 3), and of DeepSeek-V3 (arXiv 2412.19437, section 4.2).
    "llama-70b": {
        **_LLAMA,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "deepseek-671b": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "max_position_embeddings": 4096,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
    },
}
"""Name -> the fields of a `transformers` config. The tokenizer of a preset is trained on the run's own corpus."""

_NOT_THE_MODEL = frozenset({"transformers_version", "_name_or_path"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ModelChoice:
    """A model that can be built: its name and its config, and the directory it came from, if it is no preset."""

    name: str
    config: PretrainedConfig
    directory: Path | None
    has_weights: bool
    has_tokenizer: bool

    @property
    def vocabulary_size(self) -> int:
        """Number of rows in the model's token embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence the model can take, where its config names one."""
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(longest) if longest else None

    def own_config(self) -> PretrainedConfig:
        """A copy of the config for a model of its own: transformers writes into the one that a model is built from."""
        return copy.deepcopy(self.config)

    def digest(self) -> str:
        """Return a hash of the config: equal exactly where the same model would be built."""
        fields = {key: value for key, value in self.config.to_dict().items() if key not in _NOT_THE_MODEL}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def choose_model(name: str) -> ModelChoice:
    """Resolve a preset's name or a model directory. Raises `ModelError` where it is neither, or of no use."""
    try:
        directory = written_path(name)
    except OSError as error:
        raise ModelError(f"--model {name}: {error.strerror}") from None
    if name in PRESETS and not directory.is_dir():
        return preset(name, PRESETS[name])
    if not directory.is_dir():
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        what = "is a file, not" if directory.exists() else "is neither a preset nor"
        raise ModelError(f"--model {name} {what} a model directory{hint} (presets: {', '.join(PRESETS)})")
    if not (directory / "config.json").is_file():
        raise ModelError(f"no config.json in the model directory {name}")
    from transformers import AutoConfig

    with quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # What a config says goes into transformers' checks and arithmetic, where anything may come of it.
        except Exception as error:
            raise ModelError(f"{name}/config.json: {error}") from None
    has_weights = any(directory.glob("*.safetensors")) or (directory / "model.safetensors.index.json").exists()
    if not has_weights and any(directory.glob("*.bin")):
        raise ModelError(
            f"{name} holds weights that are not safetensors; convert them first (pickled files can run code)"
        )
    has_tokenizer = any((directory / file).is_file() for file in _TOKENIZER_FILES)
    return ModelChoice(directory.resolve().name, config, directory.resolve(), has_weights, has_tokenizer)


def preset(name: str, fields: Mapping[str, Any]) -> ModelChoice:
    """A model with the `fields` of a `transformers` config, its type among them, and nothing else."""
    given = dict(fields)
    return ModelChoice(name, _config(given.pop("model_type"), given), None, False, False)


def build_model(choice: ModelChoice, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model: parameters on the meta device, buffers real. Raises `ModelError`."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    choice.own_config(), dtype=dtype, trust_remote_code=False
                )
        except Exception as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ModelError(f"{choice.name} cannot be built as a language model: {line[:200]}") from None
    if not any(True for _ in model.parameters()):
        raise ModelError(f"{choice.name} has no parameters")
    _materialize_buffers(model)
    return model


def num_parameters(model: torch.nn.Module) -> int:
    """Number of elements in all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _config(model_type: str, fields: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    with quiet():
        config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
    return config


def _materialize_buffers(model: PreTrainedModel) -> None:
    """Give every meta buffer storage and the value that the model's own initialisation writes into it."""
    import torch

    filled: list[tuple[str, torch.Tensor]] = []
    for name, module, initializer in modules_with_initializers(model):
        meta = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not meta:
            continue
        for key, buffer in meta.items():
            real = torch.empty_like(buffer, device="cpu")
            # NaN marks what nobody writes: the check below would otherwise have to trust whatever memory held.
            if real.is_floating_point():
                real.fill_(float("nan"))
            module._buffers[key] = real
            filled.append((f"{name}.{key}" if name else key, real))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            initializer(module)
    for name, buffer in filled:
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            raise ModelError(f"the buffer {name} is not set by the model's initialisation", name=name)


def modules_with_initializers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    """Yield (name, module, `_init_weights` of the innermost pre-trained model around it) for every module."""
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        parent = owners.get(name.rpartition(".")[0]) if name else None
        owners[name] = module._init_weights if isinstance(module, PreTrainedModel) else parent
        yield name, module, owners[name]
