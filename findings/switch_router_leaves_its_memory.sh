#!/bin/sh
# transformers 5.23.0: the router of Switch Transformers casts its weight in every forward, in place of the module's own.
#
# In a model of bf16 weights the first forward makes the router's weight fp32 for good: the parameter is the same object,
# its `.data` is another tensor. Whoever keeps parameters as views of a flat buffer (sharded engines, flat optimizers)
# has from then on a buffer that nothing reads: an update there changes no output, and nothing says so. State dicts saved
# before and after the first forward differ in dtype.
#
# Seen: one parameter changes from bfloat16 to float32, no longer shares memory with the buffer, and a buffer set to
# zero leaves the router's logits as they were; in fp32 it stays where it was.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration


def run(dtype):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).to(dtype).eval()
    params = dict(model.named_parameters())
    flat = torch.cat([param.detach().reshape(-1) for param in params.values()])
    start, views = 0, {}
    for name, param in params.items():
        views[name] = flat[start : start + param.numel()].view(param.shape)
        param.data = views[name]
        start += param.numel()
    ids = torch.arange(8).reshape(1, 8)
    model(input_ids=ids, decoder_input_ids=ids)
    gone = [name for name, param in params.items() if param.data_ptr() != views[name].data_ptr()]
    assert all(dict(model.named_parameters())[name] is params[name] for name in gone)
    logits = []
    for name in gone:
        router = model.get_submodule(name.removesuffix(".classifier.weight"))
        given = torch.ones(1, 4, 16, dtype=dtype)
        before = router(given)[2]
        views[name].zero_()
        logits.append(torch.equal(before, router(given)[2]) and bool(before.any()))
    return gone, sorted({str(params[name].dtype) for name in gone}), logits


print("torch", torch.__version__, "transformers", transformers.__version__)
for dtype in (torch.bfloat16, torch.float32):
    gone, dtypes, unread = run(dtype)
    print(dtype, "gone from the buffer:", gone, "now", dtypes, "buffer without effect:", unread)
    if dtype is torch.bfloat16:
        assert gone and all(name.endswith("router.classifier.weight") for name in gone), gone
        assert dtypes == ["torch.float32"] and all(unread), (dtypes, unread)
    else:
        assert not gone, gone
PYTHON
