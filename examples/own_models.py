"""Small models with random weights. In a script of your own, `from_pretrained` stands here."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase, T5Config

HEAD = 32
"""Width of an attention head."""


def config_of(
    family: str, tokenizer: PreTrainedTokenizerBase, width: int, layers: int, length: int, **more: Any
) -> PreTrainedConfig:
    """The config of a "gpt2", "llama", "bert" or "t5" of this width, for texts of so many tokens."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    known = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}, **more}
    heads = max(1, width // HEAD)
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=length, **known)
    if family == "t5":
        # T5 has no limit of its own: places are told by their distance. Decoding begins with the padding's token.
        sizes = {"d_model": width, "d_ff": 4 * width, "d_kv": HEAD, "num_layers": layers, "num_heads": heads}
        return T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id, **known)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes["max_position_embeddings"] = length
    if family == "bert":
        return BertConfig(**sizes, intermediate_size=4 * width, **known)
    return LlamaConfig(**sizes, intermediate_size=3 * width, **known)
