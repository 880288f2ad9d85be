#!/bin/sh
# DeepSpeed 0.19.8: parameters of a tied pipeline layer that tied_weight_attr does not name become different weights.
#
# TiedLayerSpec layers of one key are one module where they are on one stage. Over several stages each has a copy, and of
# its parameters those alone are summed and kept equal that `tied_weight_attr` names ("weight" unless given). A layer with
# a bias, or with positions beside words, is so another model on two stages than on one: every stage trains its own bias,
# and nothing is said. Checkpoints of one cut and another then hold different values under one name.
#
# Seen: a linear layer tied between the first and the last stage of two, two steps of SGD: the weights of both ranks are
# equal, their biases are not. On one stage the same script has one bias.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6 setuptools==80.9.0 wheel==0.45.1 ninja==1.13.0
DS_ACCELERATOR=cpu "$folder/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cat > "$folder/ranks.py" <<'PYTHON'
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

deepspeed.init_distributed(dist_backend="gloo")
ends = [TiedLayerSpec("ends", nn.Linear, 4, 4) for _ in range(2)]
module = PipelineModule(
    [ends[0], LayerSpec(nn.Tanh), LayerSpec(nn.Linear, 4, 4), ends[1]],
    num_stages=2,
    loss_fn=nn.functional.mse_loss,
    partition_method="uniform",
    seed_layers=True,
)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}
engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
torch.manual_seed(0)
data = [(torch.randn(2, 4), torch.randn(2, 4)) for _ in range(4)]
rows = iter(data)
for _ in range(2):
    engine.train_batch(data_iter=rows)
tied = dict(module.tied_modules["ends"].named_parameters())
found = {name: [torch.empty_like(param) for _ in range(2)] for name, param in tied.items()}
for name, param in tied.items():
    dist.all_gather(found[name], param.detach().contiguous())
equal = {name: torch.equal(*both) for name, both in found.items()}
if dist.get_rank() == 0:
    print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "equal on both stages:", equal)
assert equal == {"weight": True, "bias": False}, equal
PYTHON
DS_ACCELERATOR=cpu PATH="$folder/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions" \
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/ranks.py"
