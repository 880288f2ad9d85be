"""What `initialize` compares of the ranks' data, and the order in which they then read it."""

from __future__ import annotations

import json

from launching import run_ranks

JOB = """
import json
from torch import nn
import zeroxide
from zeroxide.errors import RanksError

odd = ranks.rank
config = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 1000}

def start(data):
    return zeroxide.initialize(model=nn.Linear(4, 1), config=config, lr=0.1, training_data=data)

said = {}
for name, data in {
    "length": torch.randn(10 + 2 * odd, 4),
    "presence": torch.randn(10, 4) if odd else None,
}.items():
    try:
        start(data)[0].destroy()
        said[name] = None
    except RanksError as error:
        said[name] = str(error)
engine, _, loader, _ = start(torch.arange(12.0).view(12, 1).expand(12, 4))
said["samples"] = [int(each) for batch in loader for each in batch[:, 0]]
engine.destroy()
say(json.dumps(said))
"""


def test_ranks_with_other_data_are_told():
    """Catches: a comparison that leaves out the length or who has data; a sampler that gives two ranks one sample."""
    results = run_ranks(2, JOB)
    for result in results:
        assert result.code == 0, result.err
    said = [json.loads(result.out) for result in results]
    for each in said:
        assert each["length"].startswith("ranks do not agree on sampler.samples in the data set: 10 on rank 0, 12 on")
        assert each["presence"].startswith('ranks do not agree on sampler.training_data: "none" on rank 0, "given"')
    assert sorted(said[0]["samples"] + said[1]["samples"]) == list(range(12))
    assert len(said[0]["samples"]) == 6
