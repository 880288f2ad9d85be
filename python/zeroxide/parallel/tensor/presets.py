"""Rules for models that bring none of their own, by `config.model_type`."""

from __future__ import annotations

from zeroxide.parallel.tensor.spec import TPLayerSpec

__all__ = ["PRESETS"]

_GPT2 = (
    TPLayerSpec([r".*\.crossattention\.c_attn\.weight$"], "column", (2, -1)),
    TPLayerSpec([r".*\.crossattention\.q_attn\.weight$"], "column"),
    TPLayerSpec([r".*\.attn\.c_attn\.weight$"], "column", (3, -1)),
    TPLayerSpec([r".*\.mlp\.c_fc\.weight$"], "column"),
    TPLayerSpec([r".*\.(attn|crossattention|mlp)\.c_proj\.weight$", r"(.*\.)?wte\.weight$"], "row"),
    TPLayerSpec([r"lm_head\.weight$"], "column", gather_output=True),
)
_T5 = (
    TPLayerSpec([r".*Attention\.(q|k|v)\.weight$", r".*\.relative_attention_bias\.weight$"], "column"),
    TPLayerSpec([r".*\.DenseReluDense\.wi(_[01])?\.weight$"], "column"),
    TPLayerSpec([r".*Attention\.o\.weight$", r".*\.DenseReluDense\.wo\.weight$"], "row"),
    TPLayerSpec([r"shared\.weight$", r"(.*\.)?embed_tokens\.weight$"], "row"),
    TPLayerSpec([r"lm_head\.weight$"], "column", gather_output=True),
)
_LLAMA = (
    TPLayerSpec([r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight$"], "column"),
    TPLayerSpec([r".*\.(o_proj|down_proj)\.weight$", r"(.*\.)?embed_tokens\.weight$"], "row"),
    TPLayerSpec([r"lm_head\.weight$"], "column", gather_output=True),
)

PRESETS: dict[str, tuple[TPLayerSpec, ...]] = {
    "gpt2": _GPT2,
    "t5": _T5,
    "mt5": _T5,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""What `tensor_parallel.preset_model` may name."""
