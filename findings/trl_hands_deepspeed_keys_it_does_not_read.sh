#!/bin/sh
# trl 1.16.0 beside deepspeed 0.19.8: bucket sizes that TRL means to set for a reference model reach nothing.
#
# trl.models.utils.prepare_deepspeed, which DPO, KTO, GRPO and others call for their second model, computes sizes of
# buckets from the model's hidden size and puts them into the config under names with a dot,
# "zero_optimization.reduce_bucket_size" and two more, at its top. accelerate resolves such names in its own values;
# deepspeed.initialize is given the dict as it is. DeepSpeed looks for the section alone, and says nothing of the rest.
#
# Seen: the config has the three names at its top, and DeepSpeed's parsed config the sizes that it has without them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.15.0 numpy==2.4.6 setuptools wheel
DS_BUILD_OPS=0 venv/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8 trl==1.16.0 transformers==5.23.0
cat > show.py <<'PYTHON'
import os
from types import SimpleNamespace

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from trl.models.utils import prepare_deepspeed

given = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
handed = []
deepspeed.initialize = lambda model, config: (handed.append(config), (model,))[1]
model = torch.nn.Linear(8, 8)
model.config = SimpleNamespace(hidden_size=64)
plugin = SimpleNamespace(deepspeed_config=given)
prepare_deepspeed(model, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
dotted = {key: value for key, value in handed[0].items() if "." in key}
print("at the top of the config:", dotted)
with_them, without = (DeepSpeedConfig(dict(config)).zero_config for config in (handed[0], given))
names = ("reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold")
found = {name: (getattr(with_them, name), getattr(without, name)) for name in names}
print("what DeepSpeed takes, with and without them:", found)
assert len(dotted) == 3 and dotted["zero_optimization.reduce_bucket_size"] == 64 * 64
assert all(one == other for one, other in found.values())
PYTHON
venv/bin/python show.py 2>/dev/null
