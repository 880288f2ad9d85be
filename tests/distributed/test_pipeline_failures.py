"""What goes wrong in a pipeline is named on every rank, and none waits for ever."""

from __future__ import annotations

import json

from launching import Job, run_ranks

from zeroxide.distributed import EXIT_CODE

ENGINE = """
import json, os, signal
from torch import nn
import zeroxide
from zeroxide.parallel.pipe import LayerSpec, PipelineModule

class Layer(nn.Linear):
    hook = None
    def forward(self, value):
        if Layer.hook is not None:
            Layer.hook()
        return super().forward(value)

torch.manual_seed(0)
module = PipelineModule([LayerSpec(Layer, 4, 4) for _ in range(2)], num_stages=2, loss_fn=nn.functional.mse_loss)
engine, _, _, _ = zeroxide.initialize(model=module, config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3, "optimizer": {"type": "AdamW"},
    "zeroxide": {"rank_timeout": 6},
})
def pairs(count):
    return iter([(torch.ones(1, 4), torch.ones(1, 4)) for _ in range(count)])
engine.train_batch(pairs(3))
"""


def test_a_rank_that_is_killed_is_named_with_what_it_was_doing() -> None:
    """Catches: a wait for a stage that the watch does not know of, and words without stage and micro-batch."""
    source = ENGINE + (
        """
if ranks.rank == 1:
    def die():
        # What it does is told within a quarter of a second.
        time.sleep(2)
        say("here")
        time.sleep(60)
    Layer.hook = die
try:
    engine.train_batch(pairs(3))
except Exception as error:
    say(type(error).__name__, error)
    raise
"""
    )
    with Job(2, source, timeout=60) as job:
        job.until(1, "here")
        job.kill(1)
        results = job.wait()
    assert results[0].code != 0
    assert "RanksError rank 1 was killed" in results[0].out
    assert "computing forward of micro-batch 0 in stage 1" in results[0].out
    assert "rank 0 waiting for gradients from stage 1 for micro-batch 0" in results[0].out


def test_a_stage_that_fails_is_quoted_by_the_others() -> None:
    """Catches: ranks that wait for what a stage that failed would have sent, where the script goes on after it."""
    source = ENGINE + (
        """
if ranks.rank == 0:
    calls = []
    def fail():
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("as told")
    Layer.hook = fail
try:
    engine.train_batch(pairs(3))
except Exception as error:
    say(type(error).__name__, error)
if ranks.rank == 0:
    time.sleep(3)
"""
    )
    first, second = run_ranks(2, source, timeout=60)
    assert "ValueError as told" in first.out
    # It waits in a call that nothing ends, and the watch ends the process.
    assert second.code == EXIT_CODE
    assert "rank 0 failed while computing forward of micro-batch 1 in stage 0: ValueError: as told" in second.err


def test_ranks_that_ask_for_different_things_are_told_so() -> None:
    """Catches: a rank that goes on without those whose data has ended, or that waits for a batch of another kind."""
    source = ENGINE + (
        """
def told(act):
    try:
        act()
    except (Exception, StopIteration) as error:
        say(type(error).__name__, error)

told(lambda: engine.train_batch(pairs(3 - ranks.rank)))
told(lambda: engine.train_batch(pairs(3)) if ranks.rank else engine.eval_batch(pairs(3)))
def others(samples):
    return iter([(torch.ones(1, 4), torch.full((1, 4), float(each))) for each in samples])
told(lambda: engine.train_batch(others([1, 2, 3] if ranks.rank else [1, 3, 2])))
engine.set_train_batch_size(2 + ranks.rank)
told(lambda: engine.train_batch(pairs(3)))
engine.set_train_batch_size(2)
say("loss", engine.train_batch(pairs(2)).item() > 0, engine.global_steps)
engine.destroy()
ranks.close()
"""
    )
    for result in run_ranks(2, source, timeout=60):
        assert result.code == 0, result.err
        assert result.out.splitlines() == [
            "StopIteration train_batch: the data of rank 1 ended before step 2: 2 of 3 micro-batches were left over",
            "RanksError rank 1 called train_batch and rank 0 eval_batch: the ranks of a pipeline call the same",
            "RanksError train_batch: rank 1 has other samples than rank 0 in step 2, and both have stages of one "
            "pipeline: give them the same data in the same order",
            "RanksError train_batch: rank 1 runs 3 micro-batches and rank 0 2: call engine.set_train_batch_size alike "
            "on every rank",
            "loss True 2",
        ]


def test_stages_that_were_laid_out_otherwise_are_refused() -> None:
    """Catches: ranks that wait for what others never send, since each believes in another partition."""
    source = """
from torch import nn
import zeroxide
from zeroxide.parallel.pipe import LayerSpec, PipelineModule

layers = [LayerSpec(nn.Linear, 4, 4) for _ in range(3)]
method = "uniform" if ranks.rank else "parameters"
module = PipelineModule(layers + [LayerSpec(nn.Linear, 4, 64)], num_stages=2, partition_method=method)
try:
    zeroxide.initialize(model=module, config={"optimizer": {"type": "AdamW"}})
except Exception as error:
    say(type(error).__name__, error)
ranks.close()
"""
    for result in run_ranks(2, source, timeout=60):
        assert result.out.startswith("RanksError"), result.out + result.err
        assert "stages" in result.out


def test_a_step_that_overflows_is_left_out_on_every_stage() -> None:
    """Catches: a stage that takes its loss for one that was not scaled, and one that updates while another does not:
    over the same batch the loss then changes."""
    source = """
from torch import nn
import zeroxide
from zeroxide.parallel.pipe import LayerSpec, PipelineModule

torch.manual_seed(0)
module = PipelineModule([LayerSpec(nn.Linear, 4, 4) for _ in range(2)], num_stages=2, loss_fn=nn.functional.mse_loss)
engine, _, _, _ = zeroxide.initialize(model=module, lr=1e-2, config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "optimizer": {"type": "AdamW"},
    "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1},
})
losses, skipped = [], []
for _ in range(14):
    losses.append(engine.train_batch(iter([(torch.ones(1, 4).half(), torch.ones(1, 4).half())] * 2)).item())
    skipped.append(engine.skipped_steps)
say(json.dumps([losses, skipped, engine.optimizer.cur_scale]))
engine.destroy()
ranks.close()
"""
    results = run_ranks(2, "import json\n" + source, timeout=60)
    for result in results:
        assert result.code == 0, result.err
        losses, skipped, scale = json.loads(result.out)
        left_out = skipped[-1]
        assert 1 <= left_out < 12
        assert skipped == [min(at, left_out) for at in range(1, 15)]
        assert scale == 2.0 ** (24 - left_out)
        # The loss of the first update's own step is of the weights before it.
        assert len(set(losses[: left_out + 1])) == 1
        assert losses[left_out + 1] < losses[left_out]
    assert results[0].out == results[1].out
