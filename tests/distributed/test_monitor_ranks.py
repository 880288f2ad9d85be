"""Monitors of several ranks: rank 0 alone writes, its own loss, and what it cannot open all ranks hear of."""

from __future__ import annotations

import csv

from launching import run_ranks

JOB = """
from torch import nn
import zeroxide
from zeroxide.errors import ConfigError

folder = sys.argv[1]
place = {"enabled": True, "output_path": f"{folder}/rank{ranks.rank}", "job_name": "job"}
config = {
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": 2,
    "csv_monitor": place,
    "zeroxide": {"log": f"{folder}/{ranks.rank}.jsonl"},
}
engine, *_ = zeroxide.initialize(model=nn.Linear(4, 1), config=config, lr=0.1)
for _ in range(2):
    loss = engine(torch.full((2, 4), 1.0 + ranks.rank)).sum()
    engine.backward(loss)
    engine.step()
    engine.monitor.write_events([("own", ranks.rank, engine.global_samples)])
    say("LOSS", loss.item())
say("enabled", engine.monitor.enabled)
engine.destroy()
if ranks.rank == 0:
    place["output_path"] = "/dev/null/x"
try:
    zeroxide.initialize(model=nn.Linear(4, 1), config=config, lr=0.1)
except ConfigError as error:
    say("ERROR", error)
"""


def test_rank_0_alone_writes_and_all_hear_of_what_it_cannot(tmp_path):
    """Catches: files of a second rank, a mean that nobody asked for, ranks that wait for one that has given up."""
    results = run_ranks(2, JOB, [str(tmp_path)])
    assert [result.code for result in results] == [0, 0], results[0].err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jsonl", "rank0"]
    rows = list(csv.reader((tmp_path / "rank0" / "job" / "Train_Samples_train_loss.csv").open(newline="")))
    losses = [line.split()[1] for line in results[0].out.splitlines() if line.startswith("LOSS")]
    # Two ranks of two samples a step.
    assert rows == [["step", "train_loss"], ["4", losses[0]], ["8", losses[1]]]
    own = list(csv.reader((tmp_path / "rank0" / "job" / "own.csv").open(newline="")))
    assert own == [["step", "own"], ["4", "0"], ["8", "0"]]
    for result in results:
        assert "enabled True" in result.out
        (line,) = (each for each in result.out.splitlines() if each.startswith("ERROR"))
        assert line.startswith("ERROR csv_monitor: it cannot be written to: ")
