"""What a pass takes, found without values, beside what torch's allocator is asked for in a real one."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from zeroxide.cli.planning.passes import rehearse_training
from zeroxide.cli.training.loss import causal_lm_loss
from zeroxide.cli.training.models import choose_model
from zeroxide.plan.recompute import first_blocks
from zeroxide.profiling.rehearsal import LARGE, PART, Operation, TensorForm, rehearse
from zeroxide.profiling.replay import replay
from zeroxide.zero.activation_file import ActivationFile
from zeroxide.zero.activations_on_disk import ActivationsOnDisk
from zeroxide.zero.recompute import recompute
from zeroxide.zero.reduce import large_weights

transformers = pytest.importorskip("transformers")

BATCH, SEQUENCE = 2, 64
MARK = 12_345_679
"""Bytes of an allocation that stands between forward and backward in the profiler's record."""


def real_model(name: str, *, checkpointing: bool):
    model = transformers.AutoModelForCausalLM.from_config(choose_model(name).config, dtype=torch.bfloat16)
    model.loss_function = causal_lm_loss
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def allocated(model) -> tuple[int, int]:
    """Bytes that are allocated at the end of forward, and at the most, in a pass whose gradients go at once."""
    live = peak = kept = 0
    for size in asked(model):
        if abs(size) == MARK:
            kept = live if size > 0 else kept
        else:
            live += size
            peak = max(peak, live)
    return kept, peak


def asked(model) -> list[int]:
    """Bytes of all blocks that are allocated, and negative where they are freed, in order: forward, a block of `MARK`
    bytes, backward."""

    def take(param):
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(take)
    tokens = torch.zeros((BATCH, SEQUENCE), dtype=torch.int64)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        mark = torch.empty(MARK, dtype=torch.uint8)
        del mark
        loss.backward()
        del loss
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    return [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_bytes_are_those_of_a_real_pass(name, checkpointing):
    found = rehearse_training(choose_model(name), torch.bfloat16, BATCH, SEQUENCE, checkpointing=checkpointing)
    kept, peak = allocated(real_model(name, checkpointing=checkpointing))
    # Small tensors of the model's code that end with the pass, and what recomputation keeps of generators.
    assert found.kept == pytest.approx(kept, rel=0.05)
    # Operations have memory of their own inside: the log-sum-exp of fp32 logits as much as its input.
    inside = BATCH * SEQUENCE * choose_model(name).vocabulary_size * 4
    assert peak - 1.1 * inside <= found.peak <= 1.02 * peak


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_bytes_are_those_of_a_real_pass_that_recomputes_a_block(name):
    """Catches: a block that keeps what it computes again."""
    found = rehearse_training(choose_model(name), torch.bfloat16, BATCH, SEQUENCE, checkpointing=False, recompute=1)
    model = real_model(name, checkpointing=False)
    recompute(first_blocks(model, 1).modules)
    kept, peak = allocated(model)
    assert found.kept == pytest.approx(kept, rel=0.05)
    assert peak - 1.1 * BATCH * SEQUENCE * choose_model(name).vocabulary_size * 4 <= found.peak <= 1.02 * peak


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_blocks_that_are_asked_for_are_those_of_a_real_pass(name, recomputed):
    """Catches: blocks that are counted once where they are asked for again, or in the wrong pass."""
    found = rehearse_training(
        choose_model(name), torch.bfloat16, BATCH, SEQUENCE, checkpointing=False, recompute=recomputed
    )
    model = real_model(name, checkpointing=False)
    recompute(first_blocks(model, recomputed).modules)
    sizes = asked(model)
    backward = sizes.index(MARK)
    for work, real in ((found.forward, sizes[:backward]), (found.backward, sizes[backward:])):
        for least in (1 << 14, 1 << 16):
            together = sum(size for size in real if size >= least and size != MARK)
            # Operations ask for more inside: for two copies of fp32 logits, and at these sizes two fifths of the rest.
            inside = 2 * BATCH * SEQUENCE * choose_model(name).vocabulary_size * 4
            assert 0.6 * (together - inside) <= work.made_from(least) <= 1.02 * together
    assert found.forward.made_from(1 << 40) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_what_leaves_memory_is_what_the_disk_gets(name, checkpointing, tmp_path):
    """The oracle is the store itself, over tensors that have values. Catches: weights that leave, what leaves twice,
    memory that is counted while it is on disk."""
    shape = BATCH, SEQUENCE
    found, plain = (
        rehearse_training(choose_model(name), torch.bfloat16, *shape, checkpointing=checkpointing, stowed=stowed)
        for stowed in (True, False)
    )
    file = ActivationFile(tmp_path, 1 << 20, None, "threads", 4)
    store = ActivationsOnDisk(file, tuple, None)
    model, saved = real_model(name, checkpointing=checkpointing), []
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        kept = None if tensor.untyped_storage().data_ptr() in weights else store.keep(tensor.detach())
        saved.append(kept)
        return tensor

    tokens = torch.zeros(shape, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    stored = sum({id(each.stowed): each.stowed.nbytes for each in saved if each is not None}.values())
    assert found.stowed == pytest.approx(stored, rel=0.02)
    assert plain.stowed == 0
    assert found.peak <= plain.peak
    assert found.kept <= plain.kept - 0.9 * found.stowed or checkpointing
    assert found.forward.flops == plain.forward.flops
    assert found.backward.flops == plain.backward.flops
    del loss
    file.close()


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    def peak(batch, *, checkpointing=False):
        return rehearse_training(choose_model("tiny"), torch.bfloat16, batch, 64, checkpointing=checkpointing).peak

    assert peak(1) < peak(2) < peak(4)
    assert peak(4, checkpointing=True) < peak(4)


def test_flops_are_those_of_torchs_counter():
    model = real_model("tiny", checkpointing=False)
    tokens = torch.zeros((BATCH, SEQUENCE), dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = rehearse_training(choose_model("tiny"), torch.bfloat16, BATCH, SEQUENCE, checkpointing=False)
    assert found.forward.flops == forward.get_total_flops()
    assert found.backward.flops == backward.get_total_flops()


def test_a_large_weights_gradient_counts_as_a_part():
    rows = LARGE // 1024
    with torch.device("meta"):
        layer = torch.nn.Linear(1024, rows, bias=False)
    inputs = torch.zeros((1, 1024))
    found = rehearse(layer, lambda: layer(inputs).sum())
    # Outputs, their gradient and the part; the whole gradient alone would be LARGE elements.
    assert PART * 4 <= found.peak < PART * 4 + 4 * rows * 4


def test_nothing_of_the_model_is_allocated():
    with torch.device("meta"):
        layers = torch.nn.Sequential(*(torch.nn.Linear(1 << 15, 1 << 15, bias=False) for _ in range(8)))
    inputs = torch.zeros((2, 1 << 15))
    found = rehearse(layers, lambda: layers(inputs).sum())  # 32 GiB of weights
    assert found.forward.flops == 8 * 2 * 2 * (1 << 30)


def test_tied_weights_stay_tied():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    rehearse(model, lambda: model(torch.zeros((1, 8))).sum())
    assert model[1].weight is model[0].weight


def test_an_operation_is_run_again_by_itself():
    form = TensorForm((64, 64), (64, 1), torch.float32)
    ran = []

    def add(first, second, *, alpha=1):
        ran.append((first.shape, second.stride(), first is second))
        return first

    assert replay(Operation("aten.add.Tensor", "add", add, (form, form), {"alpha": 2}, nbytes=3 * 64 * 64 * 4)) > 0
    assert len(ran) >= 4
    assert set(ran) == {(torch.Size([64, 64]), (64, 1), True)}


def test_what_an_operation_writes_to_is_no_argument_beside():
    form = TensorForm((8,), (1,), torch.float32)
    same = []

    def add_(first, second):
        same.append(first is second)

    replay(Operation("aten.add_.Tensor", "add_", add_, (form, form), {}, nbytes=64))
    assert not any(same)


def test_large_is_what_it_is_for_the_engine():
    assert (LARGE, PART) == (large_weights.LARGE, large_weights.PART)
