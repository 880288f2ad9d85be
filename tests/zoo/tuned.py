"""What the small configs of single types need beyond the rules for all: sizes that must fit one another."""

from __future__ import annotations

from typing import Any

RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
"""A backbone in the place of one that only timm has."""
LAST_STAGE = RESNET | {"out_features": ["stage4"]}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2}
FORECAST = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1}

SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
"""Rotations by section fill a head of 8."""
HALF = {"head_dim": 16, "rope_parameters": SECTIONS["rope_parameters"] | {"partial_rotary_factor": 0.5}}

TUNED: dict[str, dict[str, Any]] = {
    "autoformer": FORECAST,
    "bailing_hybrid": {"layer_group_size": 2, "num_expert_group": 1, "num_hidden_layers": 4},
    "bamba": SSM | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "conditional_detr": {"backbone_config": LAST_STAGE, "use_timm_backbone": False},
    "dab-detr": {"backbone_config": LAST_STAGE, "use_timm_backbone": False},
    "deformable_detr": {"backbone_config": RESNET, "num_feature_levels": 3, "use_timm_backbone": False},
    "detr": {"backbone_config": LAST_STAGE, "use_timm_backbone": False},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 63, "position_embedding_type": "rotary"},
    "gemma4_text": {
        "per_layer_config": {"2": {"head_dim": 16}}, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4v_moe_text": HALF,
    "glm4v_text": SECTIONS,
    "glm_image_text": SECTIONS,
    "glm_ocr_text": SECTIONS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": SSM | {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "informer": FORECAST,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "mimi": {"upsample_groups": 32},
    "mimi_decoder": {"upsample_groups": 32},
    "ministral": {"head_dim": 8},
    "mobilebert": {"embedding_size": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "reformer": {"is_decoder": True},
    "table-transformer": {"backbone_config": LAST_STAGE, "use_timm_backbone": False},
    "time_series_transformer": FORECAST,
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 3, "num_hidden_layers": 6, "num_key_value_heads": 4,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
}  # fmt: skip
"""Keyword arguments by model type, also where its config is a part of another."""
