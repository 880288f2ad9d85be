"""The formats that round, in an engine and in a plain loop: at any home, resumed, loaded into others, refused."""

import re

import pytest
import torch
from checkpointing import assert_same, make, state, train  # noqa: F401

import zeroxide
from zeroxide.errors import ConfigError
from zeroxide.optim import Adagrad, AdamW

ROUNDING = ("split-bf16", "compact")


@pytest.mark.parametrize("fmt", ROUNDING)
def test_bits_do_not_depend_on_where_state_is_or_on_threads(make, fmt):  # noqa: F811
    plain = make("none", fmt)
    losses = train(plain, 0, 4)
    for offload, more in (("cpu", {"threads": 1}), ("nvme", {"tile_bytes": 8192}), ("nvme", {"threads": 3})):
        other = make(offload, fmt, zeroxide_config=more)
        assert train(other, 0, 4) == losses
        assert_same(state(other), state(plain))


@pytest.mark.parametrize("fmt", ROUNDING)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(make, fmt, tmp_path):  # noqa: F811
    saver = make("nvme", fmt)
    train(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    loader = make("none", fmt, seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), state(saver))
    assert train(loader, 3, 6) == train(saver, 3, 6)
    assert_same(state(loader), state(saver))


def differences(found, exact, part):
    for key, value in exact.items():
        if key[1] == part:
            yield found[key].view(torch.float32).double(), value.view(torch.float32).double()


def test_checkpoints_load_into_other_formats(make, tmp_path):  # noqa: F811
    exact = make("none", "split")
    train(exact, 0, 3)
    exact.save_checkpoint(tmp_path / "exact")
    low, compact = make("none", "split-bf16", seed=7), make("nvme", "compact", seed=7)
    for engine in (low, compact):
        engine.load_checkpoint(tmp_path / "exact")
    wanted = state(exact)
    assert all(torch.equal(a, b) for a, b in differences(state(low), wanted, "weights"))
    for part in ("exp_avg", "exp_avg_sq"):
        for a, b in differences(state(low), wanted, part):
            # Rounded to the nearest of 8 bits.
            assert ((a - b).abs() <= b.abs() * 2.0**-8).all()
    for a, b in differences(state(compact), wanted, "weights"):
        # To the nearest of 16 bits.
        assert ((a - b).abs() <= b.abs() * 2.0**-16).all()
    for part, codes in (("exp_avg", 127), ("exp_avg_sq", 255)):
        for a, b in differences(state(compact), wanted, part):
            # Codes next to one another are (2 c + 1) units apart, at the most 2 codes - 1; values below the first
            # unsigned code are rounded up to it. The unit is the largest value over codes^2, rounded up by 2^-7.
            unit = b.abs().max() / codes**2 * (1 + 2.0**-7)
            assert ((a - b).abs() <= (2 * codes - 1) / 2 * unit + unit).all()
    # The other way nothing is rounded.
    compact.save_checkpoint(tmp_path / "compact")
    back = make("none", "split", seed=9)
    back.load_checkpoint(tmp_path / "compact")
    assert_same(state(back), state(compact))


def test_full_state_is_read_and_written_as_fp32(make):  # noqa: F811
    engine = make("none", "compact")
    train(engine, 0, 2)
    param = engine.module.blocks[0].up.weight
    moment = zeroxide.safe_get_full_optimizer_state(param, "exp_avg")
    assert moment.dtype == torch.float32
    assert moment.shape == (97, 32)
    assert moment.any()
    weight = zeroxide.safe_get_full_fp32_param(param)
    zeroxide.safe_set_full_optimizer_state(param, moment, "exp_avg")
    zeroxide.safe_set_full_fp32_param(param, weight)
    assert torch.equal(zeroxide.safe_get_full_optimizer_state(param, "exp_avg"), moment)
    assert torch.equal(zeroxide.safe_get_full_fp32_param(param), weight)


def test_random_bits_come_from_the_seed_and_the_name(make):  # noqa: F811
    first, again, other = (make("none", "compact", zeroxide_config={"rounding_seed": seed}) for seed in (1, 1, 2))
    for engine in (first, again, other):
        train(engine, 0, 2)
    assert_same(state(first), state(again))
    key = "blocks.0.up.weight", "exp_avg"
    assert not torch.equal(state(first)[key], state(other)[key])


def test_a_group_may_have_its_own_format_and_takes_its_bytes(make):  # noqa: F811
    engine = make("none", "compact")
    exact = make("none", "split")
    used = [each.parts.core().usage()["optimizer"][0] for each in (engine, exact)]
    # 3 bytes and a scale of 2 for 64 elements twice, beside 10; the core takes whole pages of each tensor of a unit.
    elements = used[1] / 10
    assert used[0] <= elements * (3 + 4 / 64) + 3 * 4096 * len(engine.parts.plan.units)


def test_plain_loops_have_the_formats():
    torch.manual_seed(0)
    start = torch.randn(1000)
    moved = {}
    for fmt in ("split", *ROUNDING):
        param = torch.nn.Parameter(start.to(torch.bfloat16))
        optimizer = AdamW([param], lr=1e-2, format=fmt)
        for step in range(20):
            param.grad = torch.sin(param.detach() * 3 + step)
            optimizer.step()
        saved = optimizer.state_dict()
        loaded = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
        other = AdamW([loaded], lr=1e-2, format=fmt)
        other.load_state_dict(saved)
        assert torch.equal(loaded, param)
        for mine in ((param, optimizer), (loaded, other)):
            mine[0].grad = torch.ones(1000, dtype=torch.bfloat16)
            mine[1].step()
        assert torch.equal(loaded, param)
        moved[fmt] = param.detach().float() - start
    # Twenty steps of 0.01 each: formats that round are within a few per cent of that.
    for fmt in ROUNDING:
        assert (moved[fmt] - moved["split"]).abs().max() <= 0.02


def test_what_cannot_be_kept_is_refused(make):  # noqa: F811
    def refused(line, act):
        with pytest.raises(ConfigError, match=re.escape(line)) as caught:
            act()
        assert "\n" not in str(caught.value)

    for fmt in ROUNDING:
        refused(
            f"optimizer group 0: state format `{fmt}` keeps sum rounded, which must start from 0 then",
            lambda fmt=fmt: Adagrad(
                [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))],
                lr=0.1,
                initial_accumulator_value=0.1,
                format=fmt,
            ),
        )
        refused(f'zeroxide.format: "{fmt}" keeps a weight as', lambda fmt=fmt: make("none", fmt, dtype="fp32"))
    refused(
        "format 'bf16': expected one of split, fp32, split-bf16, compact",
        lambda: AdamW([torch.nn.Parameter(torch.zeros(3))], lr=0.1, format="bf16"),
    )
