"""Checkpoints that do not fit, and what cannot be saved: refused in one line."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from checkpointing import SCHEDULES, VOCABULARY, WIDTH, Model, assert_same, state, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zeroxide.checkpoint.format.json_codec import decode, encode
from zeroxide.errors import CheckpointError


class Changed(Model):
    """One parameter renamed, one added, one buffer added."""

    def __init__(self):
        super().__init__()
        self.blocks[1].more = nn.Linear(3, 3)
        self.blocks[0].renamed = self.blocks[0].down
        del self.blocks[0].down
        self.blocks[0].forward = lambda x: x + self.blocks[0].renamed(self.blocks[0].up(x))
        self.register_buffer("added", torch.ones(3))


@pytest.mark.parametrize("here", [("none", "fp32"), ("nvme", "split")], ids="-".join)
def test_names_that_differ(make, tmp_path, here):
    saver = make()
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(*here, model=Changed(), seed=7)
    x = torch.zeros(2, 8, dtype=torch.long)
    loader.backward(loader(x))
    loader.step()
    before = state(loader)
    with pytest.raises(CheckpointError) as caught:
        loader.load_checkpoint(tmp_path / "out")
    line = str(caught.value)
    assert "it lacks blocks.0.renamed.weight, blocks.0.renamed.bias, blocks.1.more.weight and 1 more" in line
    assert "it also holds blocks.0.down.weight, blocks.0.down.bias" in line
    assert "load_module_strict=False" in line
    assert_same(state(loader), before)
    loader.load_checkpoint(tmp_path / "out", load_module_strict=False)
    there, after = state(saver), state(loader)
    for key, value in after.items():
        source = there if key in there else before
        assert_same({key: value}, {key: source[key]})


def test_shapes_that_differ_are_refused_in_any_case(make, tmp_path):
    saver = make()
    saver.save_checkpoint(tmp_path / "out")
    model = Model()
    model.blocks[1].up = nn.Linear(WIDTH, 11)
    model.blocks[1].down = nn.Linear(11, WIDTH)
    loader = make(model=model)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"blocks\.1\.up\.weight \(97x32 there, 11x32 here\)"):
            loader.load_checkpoint(tmp_path / "out", load_module_strict=strict)


def test_other_buffers_are_refused(make, tmp_path):
    saver = make()
    saver.save_checkpoint(tmp_path / "out")
    model = Model()
    model.mask = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(CheckpointError, match=r"among the buffers.*mask \(torch.bool 3 there, torch.bool 4 here\)"):
        make(model=model).load_checkpoint(tmp_path / "out")
    model = Model()
    model.mask = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"mask \(torch.bool 3 there, torch.float32 3 here\)"):
        make(model=model).load_checkpoint(tmp_path / "out")
    model = Model()
    model.mask = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"mask \(torch.bool 3 there, torch.int32 3 here\)"):
        make(model=model).load_checkpoint(tmp_path / "out")


def test_floating_buffers_are_converted(make, tmp_path):
    saver = make()
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(seed=7, config={"data_types": {"buffer_dtype": "bf16"}})
    loader.load_checkpoint(tmp_path / "out")
    for name in ("running_mean", "running_var"):
        found = getattr(loader.module.seen, name)
        assert found.dtype == torch.bfloat16
        assert found.equal(getattr(saver.module.seen, name).bfloat16())


def test_another_depth_names_the_first_few(make, tmp_path):
    make().save_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"it also holds blocks\.1\.norm\.weight, .* and 9 more"):
        make(model=Model(layers=1)).load_checkpoint(tmp_path / "out")


def test_sharing_that_differs(make, tmp_path):
    make(model=Model(tied=True)).save_checkpoint(tmp_path / "tied")
    make(model=Model(tied=False)).save_checkpoint(tmp_path / "untied")
    tied, untied = make(seed=7), make(model=Model(tied=False), seed=7)
    with pytest.raises(CheckpointError, match=r"head\.weight \(one parameter with embed\.weight there, two here\)"):
        untied.load_checkpoint(tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"embed\.weight \(2 parameters there, one here\)"):
        tied.load_checkpoint(tmp_path / "untied")
    untied.load_checkpoint(tmp_path / "tied", load_module_strict=False)
    found = state(untied)
    assert found["embed.weight", "weights"].equal(found["head.weight", "weights"])


def test_a_shared_parameter_is_found_by_any_of_its_names(make, tmp_path):
    class Aliased(Model):
        def __init__(self):
            super().__init__()
            modules = dict(self._modules)
            self._modules.clear()
            self.first = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.first.weight = modules["embed"].weight
            self._modules.update(reversed(modules.items()))

    saver = make()
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(model=Aliased(), seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert state(loader)["first.weight", "exp_avg"].equal(state(saver)["embed.weight", "exp_avg"])


def groups_of(model, swap=False):
    decayed = [param for name, param in model.named_parameters() if param.ndim > 1]
    rest = [param for name, param in model.named_parameters() if param.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return groups[::-1] if swap else groups


def test_groups_must_be_the_same(make, tmp_path):
    model = Model()
    saver = make(model=model, model_parameters=groups_of(model))
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    model = Model()
    same = make(model=model, model_parameters=groups_of(model), seed=7)
    same.load_checkpoint(tmp_path / "out")
    assert_same(state(same), state(saver))
    model = Model()
    swapped = make(model=model, model_parameters=groups_of(model, swap=True))
    with pytest.raises(CheckpointError, match=r"other optimizer groups: embed\.weight \(group 0 there, 1 here\)"):
        swapped.load_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="saved with 2 optimizer groups, this engine has 1"):
        make().load_checkpoint(tmp_path / "out")
    swapped.load_checkpoint(tmp_path / "out", load_module_only=True)


def test_schedules_must_be_the_same(make, tmp_path):
    make(lr_scheduler=SCHEDULES["StepLR"]).save_checkpoint(tmp_path / "with")
    make().save_checkpoint(tmp_path / "without")
    with pytest.raises(CheckpointError, match="lr_scheduler StepLR, this engine has ExponentialLR"):
        make(lr_scheduler=SCHEDULES["ExponentialLR"]).load_checkpoint(tmp_path / "with")
    with pytest.raises(CheckpointError, match="an lr_scheduler, this engine has none"):
        make().load_checkpoint(tmp_path / "with")
    with pytest.raises(CheckpointError, match="no lr_scheduler, this engine has one"):
        make(lr_scheduler=SCHEDULES["StepLR"]).load_checkpoint(tmp_path / "without")
    make().load_checkpoint(tmp_path / "with", load_lr_scheduler_states=False)


# Refusals ----------------------------------------------------------------------------------------------------------


def test_saving_within_accumulation_is_refused(make, tmp_path):
    engine = make(gradient_accumulation_steps=2)
    train(engine, 0, 1)
    with pytest.raises(CheckpointError, match="cannot be saved after micro-batch 1 of 2"):
        engine.save_checkpoint(tmp_path / "out")
    engine.zero_grad()
    with pytest.raises(CheckpointError, match="cannot be saved after micro-batch 1 of 2"):
        engine.save_checkpoint(tmp_path / "out")
    train(engine, 1, 2)
    engine.save_checkpoint(tmp_path / "out")
    engine.backward(engine(torch.zeros(2, 8, dtype=torch.long)))
    with pytest.raises(CheckpointError, match="gradients that no step has used"):
        engine.save_checkpoint(tmp_path / "out")
    engine.set_gradient_accumulation_boundary(False)
    engine.step()
    with pytest.raises(CheckpointError, match="gradients that no step has used"):
        engine.save_checkpoint(tmp_path / "out")
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    engine.save_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": [1, torch.ones(20000)]}, r"client_state\['a'\]\[1\] has 80000 bytes"),
        ({"a": {2: {1}}}, r"client_state\['a'\]\[2\] is a set"),
        ({b"k": 1}, "a key of client_state is a bytes"),
        ([1], "client_state must be a dict, got list"),
        ({"a": np.int64(3)}, r"client_state\['a'\] is a numpy.int64"),
    ],
)
def test_client_state_that_is_not_json_is_named(make, tmp_path, value, line):
    with pytest.raises(CheckpointError, match=line):
        make().save_checkpoint(tmp_path / "out", client_state=value)
    assert not (tmp_path / "out").exists()


def test_a_circular_client_state_is_refused(make, tmp_path):
    value = {}
    value["self"] = value
    with pytest.raises(CheckpointError, match="nested more than 100 deep"):
        make().save_checkpoint(tmp_path / "out", client_state=value)


def test_a_schedule_that_is_not_json_is_named(make, tmp_path):
    engine = make(lr_scheduler=SCHEDULES["StepLR"])
    engine.lr_scheduler.extra = open  # lands in its state_dict
    with pytest.raises(CheckpointError, match=r"StepLR.state_dict\(\)\['extra'\] is a builtin_function_or_method"):
        engine.save_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden", "latest", "a\nb", "x" * 300])
def test_tags_that_are_no_names_are_refused(make, tmp_path, tag):
    engine = make()
    for act in (lambda: engine.save_checkpoint(tmp_path / "out", tag), lambda: engine.load_checkpoint(tmp_path, tag)):
        with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
            act()


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_directory_that_is_no_checkpoint_is_not_replaced(make, tmp_path, monkeypatch, when):
    from zeroxide.checkpoint.save import save

    def thesis():
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")

    written = []
    write = save.Save.write

    def act(*args):
        written.append(when)
        report = write(*args)
        thesis()
        return report

    monkeypatch.setattr(save.Save, "write", act)
    if when == "before":
        thesis()
    with pytest.raises(CheckpointError, match="exists and is not a zeroxide checkpoint"):
        make().save_checkpoint(tmp_path, "mine")
    assert written == ([] if when == "before" else [when])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.text() | st.sampled_from(["$tuple", "$dict"]) | st.integers(), inner)
            | st.lists(st.integers()).map(Counter)
        ),
        max_leaves=20,
    )
)
def test_plain_values_survive_json(value):
    def same(one, other):
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == list(other)
            for (key, item), (other_key, other_item) in zip(one.items(), other.items(), strict=True):
                same(key, other_key)
                same(item, other_item)
        elif isinstance(one, list | tuple):
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                same(*pair)
        else:
            assert repr(one) == repr(other)

    same(decode(json.loads(json.dumps(encode(value, "value")))), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.1),
        torch.arange(6).view(2, 3).t(),
        torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
        torch.empty(0, 3, dtype=torch.bool),
        torch.tensor([1 - 2j]),
        nn.Parameter(torch.ones(2)),
    ],
)
def test_small_tensors_survive(tensor):
    """Catches: another dtype or shape, rounding, elements in the order of memory."""
    found = decode(json.loads(json.dumps(encode({"a": [tensor]}, "value"))))["a"][0]
    assert type(found) is torch.Tensor
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.requires_grad is False
    one, other = (each.detach().reshape(-1).view(torch.uint8) for each in (found, tensor))
    assert torch.equal(one, other)


def test_tensors_that_are_no_text():
    with pytest.raises(CheckpointError, match=r"value\['w'\] has 65540 bytes: at most 65536 are saved as JSON"):
        encode({"w": torch.zeros(16385)}, "value")
    with pytest.raises(CheckpointError, match="value has layout sparse_coo"):
        encode(torch.eye(2).to_sparse(), "value")
    for wrong in (["float32", [2], "AAAA"], ["float33", [1], "AAAAAA=="], ["float32", [1], "no"], 7, ["cuda", [1], ""]):
        with pytest.raises(ValueError, match="no tensor"):
            decode({"$tensor": wrong})
