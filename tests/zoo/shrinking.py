"""Small configs of any model type of transformers, made from the type's own defaults by the names of its fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from tuned import TUNED

VOCABULARY = 256
ORDINARY = range(10, 150)
"""Token ids that are words in every small model; special ones lie outside."""
SPECIAL = 160
"""From here on are the special tokens whose own ids are beyond the small vocabulary."""
LAYERS = 3

SMALL: list[tuple[str, int]] = [
    (r"(^|_)vocab_size($|_per)|^vocab_size", VOCABULARY),
    (r"(mamba_n_heads|mamba_num_heads)$", 8),
    (r"(mamba_d_head|mamba_head_dim)$", 8),
    (r"^(n_groups|mamba_n_groups)$", 1),
    (r"char_vocab_size", 64),
    (r"(^|_)(num|n)_(hash|mtp|nextn)", 0),
    (r"num_key_value_heads$|num_kv_heads$|kv_heads$|n_head_kv$|num_key_value_groups$", 2),
    (r"linear_num_key_heads$", 2),
    (r"(^|_)(num_.*heads|n_heads?|.*attention_heads|heads|nheads|encoder_heads|resampler_heads|index_n_heads)$", 4),
    (r"qk_head_dim$", 16),
    (r"(d_kv|d_head|head_dim|key_length)$", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank)$", 16),
    (r"(intermediate|ffn|feedforward|feed_forward|inner)_?(size|dim|hidden_size)?$", 64),
    (r"(ffn_dim|d_ff|n_inner|mlp_dim|dim_feedforward|d_inner|ff_dim|mlp_hidden_dim)$", 64),
    (r"(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|embedding_dim|projection_dim|hidden_dimension"
     r"|emb_dim|feature_size|proj_size|output_size|embed_size|model_dim|width|d_embed|d_out|dim_model|backbone_dim"
     r"|query_dim|codevector_dim|out_dim|output_dim|channels_dim|latent_dim|pooler_output_size|_hidden_dim|output_channels"
     r"|fusion_dim|mask_feature_size|proj_dim|output_proj_dims)$", 32),
    (r"^dim$", 32),
    (r"(codebook_size|num_embeddings|num_codevectors_per_group)$", 64),
    (r"(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts|topk_experts|num_selected_experts)$", 2),
    (r"(n_group|topk_group)$", 1),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$", 4),
    (r"(first_k_dense_replace|num_dense_layers|interleave_moe_layer_step)$", 1),
    (r"(max_window_layers|num_kv_shared_layers)$", 1),
    (r"(num_.*layers|n_layers?|.*_layers|num_blocks|num_.*blocks|depth|layers|num_layers)$", LAYERS),
    (r"^num_queries$|num_query_tokens$|num_denoising$|train_num_points$", 8),
    (r"(image_size|img_size|input_resolution)$", 32),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_(source|target)_positions|max_seq_length)$", 128),
    (r"(sliding_window|sliding_window_size|attention_chunk_size|local_attention|window_attn)$", 8),
    (r"(context_length|prediction_length)$", 16),
    (r"(mamba_d_state|state_size|ssm_state_size|mamba_chunk_size|chunk_size)$", 16),
    (r"(mamba_dt_rank|time_step_rank)$", 8),
    (r"(linear_key_head_dim|linear_value_head_dim|linear_head_dim)$", 8),
]  # fmt: skip
"""What an integer field becomes at most, by its name; the first pattern that is found decides."""

KEPT = re.compile(r"attn_layer|layers_block|insert_layer|vision_feature_layer|mel_bins|eval_idx")
WIDTH = re.compile(r"size|dim|channels|width|filters|d_model|n_embd|units|d_ff|n_inner|rank$")
NOT_WIDTH = re.compile(
    r"patch|image_size|kernel|vocab|window|stride|in_channels$|num_channels|input_channels|type_vocab|audio_channels"
    r"|tubelet|position|codebook|chunk|head_dim|rotary|batch|pool|block_size|feat_sizes|group_size|state|merge"
)
DEPTHS = re.compile(r"depth|num_blocks|blocks|layers|repeats")


def small_config(config_class: type, recipe: str) -> Any:
    """A config of the class, shrunk by a recipe.

    "named": each size is what `SMALL` says; "over 16", "over 8", "over 4": widths divided, so that sizes that belong
    together stay in proportion; "shallow": only fewer layers and a smaller vocabulary.
    """
    return config_class(**_shrunk(config_class(), recipe))


RECIPES = ("named", "over 16", "over 8", "over 4", "shallow")


def _fields(config: Any) -> dict[str, Any]:
    names = (
        [each.name for each in dataclasses.fields(config) if each.init]
        if dataclasses.is_dataclass(config)
        else list(inspect.signature(type(config).__init__).parameters)[1:]
    )
    found = {}
    for name in names:
        try:
            found[name] = getattr(config, name)
        except Exception:
            continue
    return found


def _shrunk(config: Any, recipe: str) -> dict[str, Any]:
    """Keyword arguments for the config's class: every field that is smaller than its default."""
    fields = _fields(config)
    changed: dict[str, Any] = {}
    special = _special_tokens()
    for name in getattr(config, "sub_configs", {}):
        value = getattr(config, name, None)
        if value is not None and hasattr(value, "to_dict"):
            changed[name] = type(value)(**_shrunk(value, recipe))
    for name, value in fields.items():
        if name in changed or name.startswith("_") or value is None or isinstance(value, bool):
            continue
        if re.search(r"token_id|token_index|_token$|mask_index|unk_index|lang_id", name):
            if isinstance(value, int) and value >= VOCABULARY:
                changed[name] = next(special)
            elif isinstance(value, list) and any(isinstance(each, int) and each >= VOCABULARY for each in value):
                changed[name] = [next(special) for _ in value]
        elif isinstance(value, int):
            changed[name] = _integer(name, value, recipe)
        elif isinstance(value, list | tuple) and value and all(type(each) is int for each in value):
            changed[name] = type(value)(_integers(name, list(value), recipe))
    _take_layers(fields, changed)
    if recipe == "named":
        _fit_heads(fields, changed)
    tuned = TUNED.get(getattr(config, "model_type", ""), {})
    if "num_hidden_layers" in tuned:
        # Lists with an entry a layer follow from it.
        changed = {name: value for name, value in changed.items() if not isinstance(value, list) or "layer" not in name}
    return changed | tuned


def _special_tokens() -> Iterator[int]:
    yield from range(SPECIAL, VOCABULARY)


def _integer(name: str, value: int, recipe: str) -> int:
    if KEPT.search(name) or value <= 0:
        return value
    for pattern, size in SMALL:
        if re.search(pattern, name):
            depth = size == LAYERS
            if recipe == "named" or depth or size == VOCABULARY:
                return min(value, size)
            break
    if recipe.startswith("over") and WIDTH.search(name) and not NOT_WIDTH.search(name):
        factor = int(recipe.split()[1])
        return value // factor if value % factor == 0 and value >= 2 * factor else value
    if recipe == "shallow" and re.search(r"num_.*experts$|n_routed_experts$", name) and value > 8:
        return 8
    return value


def _integers(name: str, values: list[int], recipe: str) -> list[int]:
    if DEPTHS.search(name):
        return [min(value, 2) for value in values] if max(values) > 2 and min(values) > 0 else values
    if recipe != "shallow" and WIDTH.search(name) and not NOT_WIDTH.search(name):
        factor = 8 if recipe == "named" else int(recipe.split()[1])
        if all(value % factor == 0 for value in values) and max(values) > 32:
            return [value // factor for value in values]
    return values


def _fit_heads(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Where every head has keys and values of its own, it still does."""
    heads, groups = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if isinstance(groups, int) and heads == groups:
        changed["num_key_value_heads"] = changed.get("num_attention_heads", heads)


COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def _take_layers(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Where lists have an entry a layer, takes one layer of every kind, and as many more as make `LAYERS`."""
    count = next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), None)
    if not count:
        return
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count and not name.startswith("_")
    }
    if not lists:
        return
    kinds: dict[Any, int] = {}
    for at, kind in enumerate(zip(*(map(str, value) for value in lists.values()), strict=True)):
        kinds.setdefault(kind, at)
    first = sorted(kinds.values())[:6]
    rest = [at for at in range(count) if at not in first]
    taken = sorted([*first, *rest[: max(0, LAYERS - len(first))]])
    for name, value in lists.items():
        changed[name] = type(value)(value[at] for at in taken)
    for name in COUNTS:
        if fields.get(name) == count:
            changed[name] = len(taken)
