#!/bin/sh
# torch 2.15.0: on the CPU, scaled_dot_product_attention keeps every score where values have another head size than keys.
#
# The fused kernel for the CPU takes heads of one size. Multi-head latent attention (DeepSeek-V2, V3 and their like) has
# keys of 192 and values of 128, so it falls to the composite path, which saves two tensors of heads x tokens x tokens for
# backward. Nothing says so: the call, its mask and its result are the same. What a layer keeps grows with the square of
# the sequence, and a plan of activations by the shapes of inputs is short by that.
#
# Seen: 2 heads, 1,024 tokens, keys of 48. Values of 48 save 1,544 KiB for backward, the largest tensor as large as the
# queries; values of 32 save 17,408 KiB, two tensors of 2 x 1,024 x 1,024 among them. transformers 5.23.0's DeepSeek-V3
# does not pad its values: a layer of it saves tensors of tokens x tokens, Llama's does not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

TOKENS = 1024


def saved(call):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: (found.append(each), each)[1], lambda each: each):
        result = call()
    squares = [tuple(each.shape) for each in found if each.shape[-2:] == (TOKENS, TOKENS) and each.is_floating_point()]
    return result, sum(each.nbytes for each in found) // 1024, squares


def attention(values):
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, TOKENS, 48, requires_grad=True) for _ in range(2))
    value = torch.randn(1, 2, TOKENS, values, requires_grad=True)
    return saved(lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True))


print("torch", torch.__version__, "transformers", transformers.__version__)
kib = {}
for values in (48, 32):
    _, kib[values], squares = attention(values)
    print(f"values of {values}: {kib[values]} KiB saved, {squares}")
    assert len(squares) == (0 if values == 48 else 2), squares
assert kib[32] > 10 * kib[48], kib

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
models = (
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=TOKENS)),
    DeepseekV3ForCausalLM(
        DeepseekV3Config(**sizes, **latent, num_key_value_heads=2, first_k_dense_replace=1, max_position_embeddings=TOKENS)
    ),
)
for model, expected in zip(models, (False, True)):
    model.config._attn_implementation = "sdpa"
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    _, all_kib, squares = saved(lambda: model(input_ids=ids, use_cache=False).logits)
    print(f"{type(model).__name__}: {all_kib} KiB saved, of scores {squares}")
    assert bool(squares) is expected, squares
PYTHON
