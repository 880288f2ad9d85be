"""`zeroxide plan`: its bytes beside a real run's, what it recommends, and what it says where nothing fits."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zeroxide import _core
from zeroxide.cli import main
from zeroxide.cli.planning import measure
from zeroxide.cli.planning.estimate import Estimate
from zeroxide.cli.planning.measured import Disk, Machine, Measurements, age, cache_file, machine_key
from zeroxide.cli.planning.request import Request
from zeroxide.cli.planning.search import recommended
from zeroxide.cli.planning.show import how_to_run
from zeroxide.cli.planning.work import Workbench, base_config, formats_of, threads_of
from zeroxide.cli.training.models import PRESETS, choose_model, preset

pytest.importorskip("transformers")

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that was measured an hour ago: 100 MiB a process, a GFLOP/s, and a disk a hundred times slower than
    memory."""
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "time_operations", lambda *_: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    known = Machine(
        process_bytes=100 * MIB,
        start_bytes=0,
        operation_seconds=1e-6,
        update_seconds=dict.fromkeys(_core.formats(), 1e-9),
        flops=1e9,
        bytes_per_second=1e10,
        taken=time.time() - 3700,
    )
    found = Measurements(known, {str(disk): Disk(read=1e8, write=1e8, update=1e8, taken=time.time() - 90_000)})
    found.save(cache_file(), machine_key(threads_of({})))
    return disk


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def without_early(folder: Path) -> str:
    """A config in which backward does not update."""
    (folder / "late.json").write_text(
        json.dumps({"zeroxide": {"update_in_backward": False}, "bf16": {"enabled": True}})
    )
    return str(folder / "late.json")


def by_name(found: dict) -> dict:
    return {each["option"]["name"]: each for each in found["options"]}


@pytest.mark.parametrize("offload", ["cpu", "nvme", "mixed"])
@pytest.mark.parametrize("format", _core.formats())
def test_bytes_are_those_of_a_real_run(offload, format, machine, capsys):
    import zeroxide
    from zeroxide.cli.training.options import TrainOptions

    options = TrainOptions(model="tiny", format=format, batch_size=2, seq_len=64)
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(choose_model("tiny").config, dtype=torch.bfloat16)
    home = f"nvme:{machine}"
    param, state = {"cpu": ("cpu", "cpu"), "nvme": (home, home), "mixed": ("cpu", home)}[offload]
    engine, *_ = zeroxide.initialize(
        model=model,
        lr=1e-4,
        dtype="bf16",
        offload_param=param,
        offload_optimizer=state,
        config={"zeroxide": {"format": format}},
    )
    tokens = torch.zeros((options.batch_size, options.seq_len), dtype=torch.int64)
    counts = []
    for _ in range(5):
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
        engine.finish_step()
        io = engine.io()
        counts.append((io["read_bytes"], io["write_bytes"]))
    moved = [after - before for before, after in zip(counts[-2], counts[-1], strict=True)]
    buckets = engine.plan().buckets
    engine.destroy()
    found = by_name(planned(capsys, "tiny", "--disk", str(machine), "--batch", "2", "--sequence", "64"))
    each = found[f"{offload}, {format}"]
    assert each["buckets"] == buckets
    assert each["written"] == moved[1]
    assert each["read"] == moved[0]
    assert each["wear_of_1000_steps"]["bytes"] == 1000 * moved[1]


def test_process_is_payload_activations_and_what_every_process_takes(machine, capsys):
    each = by_name(planned(capsys, "tiny"))["cpu, split"]
    steady = 100 * MIB + sum(each["buckets"].values()) + each["activations"]
    assert each["process"] == steady + steady // 40


def test_formats_are_those_that_the_core_has_for_the_dtype():
    bf16 = {"bf16": {"enabled": True}}
    assert "split" in formats_of(bf16, 1)
    assert formats_of({}, 1) == ["fp32"]
    assert set(formats_of(bf16, 1)) <= set(_core.formats())


def test_the_fastest_is_recommended_and_a_small_budget_moves_state_to_disk(machine, capsys):
    # 100 MiB a process, and 12 bytes a parameter of 124 million in memory: 2 GiB hold that, 1 GiB does not.
    words = ("gpt2", "--disk", str(machine), "--batch", "1", "--sequence", "64", "--config", without_early(machine))
    free, tight = planned(capsys, *words), planned(capsys, *words, "--host-memory", "1GiB")
    assert free["recommended"] == "cpu, split"
    # What the budget leaves beside weights, gradients and the rest is taken by state that need not be on disk.
    assert tight["recommended"].startswith("mixed, split, ")
    assert tight["recommended"].endswith(" MiB kept")
    assert "offload_optimizer" in tight["run"]
    kept, none = by_name(tight)[tight["recommended"]], by_name(tight)["mixed, split"]
    assert f'"state_in_memory": {kept["option"]["in_memory"]}' in tight["run"]
    assert none["process"] < kept["process"] <= 1 << 30
    # Beside the state, 10 bytes a parameter, its gradients stay, 2 bytes; the two last ones stay in any case.
    spared = none["written"] - kept["written"]
    assert kept["buckets"]["optimizer"] <= spared <= 12 * kept["buckets"]["optimizer"] // 10
    assert kept["phases"]["total"] < none["phases"]["total"]
    assert not by_name(tight)["cpu, split"]["fits"]
    tighter = planned(capsys, *words, "--host-memory", "520MiB")
    assert tighter["recommended"].startswith("nvme, split")
    assert "nvme:" in tighter["run"]


def test_more_host_memory_is_never_slower(machine):
    found = Measurements.load(cache_file(), machine_key(threads_of({})))
    bench = Workbench(choose_model("gpt2"), ["split"], found.machine, found.disks[str(machine)], 1, lambda _: None)
    config, _ = base_config({})
    before = None
    for mib in range(500, 2600, 150):
        request = Request("gpt2", 1, 64, host_memory=mib << 20, disk=machine, config=config)
        best = recommended(bench(request, timed=False))
        if best is not None:
            assert best.process <= mib << 20
        if before is not None:
            assert best.phases.total <= 1.05 * before.phases.total
        before = best
    assert before.option.offload == "cpu"


def test_activations_on_disk_fit_where_nothing_else_does(machine, capsys):
    """Catches: bytes that are counted in memory though they leave it, or that the disk does not have."""
    choice, batch, tokens = choose_model("tiny"), 8192, 128
    found = Measurements.load(cache_file(), machine_key(threads_of({})))
    bench = Workbench(choice, ["split"], found.machine, found.disks[str(machine)], 1, lambda _: None)
    config, _ = base_config({})
    request = Request("tiny", batch, tokens, disk=machine, config=config)
    free = bench(request, timed=False)
    assert not any(each.option.stowed for each in free), "without a budget nothing has to leave"
    least = min(free, key=lambda each: each.process)
    tight = bench(replace(request, host_memory=least.process - (64 << 20)), timed=False)
    best = recommended(tight)
    assert best is not None
    assert best.option.stowed
    same = next(each for each in tight if each.option == replace(best.option, stowed=False))
    assert not same.fits
    # The inputs of blocks are the least that there is of activations, in bf16.
    inputs = batch * tokens * choice.config.n_embd * 2
    assert best.disk_bytes - same.disk_bytes >= choice.config.n_layer * inputs
    assert best.written - same.written == best.read - same.read == best.disk_bytes - same.disk_bytes
    assert best.process <= least.process - (64 << 20)
    assert str(best.option).endswith(", activations on disk")


def test_on_a_slow_disk_some_blocks_are_recomputed_and_others_wait_there(machine):
    """The disk takes seconds for what a block computes in less: all blocks but the fewest that hide their writes.
    Catches: a count with more seconds than another, and one that is offered where nothing waits."""
    found = Measurements.load(cache_file(), machine_key(threads_of({})))
    choice = preset("eight", {**PRESETS["tiny"], "n_layer": 8})
    request = Request("eight", 1024, 64, disk=machine, config=base_config({})[0])

    def stowed(speed: float, limit: int) -> list[Estimate]:
        bench = Workbench(choice, ["split"], found.machine, Disk(speed, speed, speed, 0.0), 1, lambda _: None)
        seen = bench(replace(request, host_memory=limit), timed=False)
        return [each for each in seen if each.option.stowed and each.option.offload == "cpu" and not each.option.early]

    free = Workbench(choice, ["split"], found.machine, None, 1, lambda _: None)(request, timed=False)
    kept = max(each.process for each in free if each.option.offload == "cpu")
    slow = {each.option.recompute: each for each in stowed(2e7, kept - (128 << 20))}
    assert len(slow) == 2
    count = max(slow)
    assert 0 < count < 8
    assert slow[count].phases.total < slow[0].phases.total
    assert slow[count].written < slow[0].written
    assert how_to_run(request, slow[count]).endswith(f" --recompute {count} --activation-path {machine}")
    quick = stowed(1e12, kept - (128 << 20))
    assert [(each.option.recompute, each.phases.waiting) for each in quick] == [(0, 0.0)]


def test_as_few_blocks_are_recomputed_as_a_budget_takes(machine):
    """Budgets between what all activations take and what inputs of blocks do. Catches: one block too many or too few,
    seconds or bytes of another option."""
    found = Measurements.load(cache_file(), machine_key(threads_of({})))
    bench = Workbench(choose_model("gpt2"), ["split"], found.machine, None, 1, lambda _: None)
    config, _ = base_config({})
    request = Request("gpt2", 8, 64, config=config)
    none, every = bench(request, timed=False)
    assert [str(each.option) for each in (none, every)] == ["cpu, split", "cpu, split, recompute 12"]
    before = 0
    for share in (0.8, 0.3):
        limit = int(every.process + share * (none.process - every.process))
        tight = bench(replace(request, host_memory=limit), timed=False)
        best = recommended(tight)
        assert len(tight) == 3
        assert best is not None
        count = best.option.recompute
        assert before < count < 12
        assert str(best.option) == f"cpu, split, recompute {count}"
        assert how_to_run(request, best).endswith(f" --recompute {count}")
        # One block less would not fit: they all keep the same.
        assert best.process <= limit < best.process + (none.activations - every.activations) / 11
        assert best.phases.forward == pytest.approx(none.phases.forward)
        part = (best.phases.backward - none.phases.backward) / (every.phases.backward - none.phases.backward)
        assert part == pytest.approx(count / 12, rel=0.01)
        before = count


def test_memory_that_the_system_gives_anew_takes_time_where_none_is_kept(machine):
    """Blocks of 1 MiB are given back where activations are recomputed, and of 16 MiB where state is on disk; on a disk
    each byte takes its part of the processor. Catches: seconds left out, and in options without such blocks."""
    found = Measurements.load(cache_file(), machine_key(threads_of({})))
    request = Request("gpt2", 8, 128, disk=machine, config=base_config({})[0])

    def seconds(fresh: float, work: float) -> dict[str, float]:
        slow = replace(found.disks[str(machine)], read=1e12, write=1e12, update=1e12, work=work)
        bench = Workbench(
            choose_model("gpt2"), ["split"], replace(found.machine, fresh_seconds=fresh), slow, 1, lambda _: None
        )
        return {str(each.option): each.phases.total for each in bench(request, timed=False)}

    plain, fresh, work = seconds(0.0, 0.0), seconds(1e-6, 0.0), seconds(0.0, 1e-6)
    more = {name: fresh[name] - plain[name] for name in plain}
    assert more["cpu, split"] == 0.0
    # Inputs of twelve blocks and what they compute from them: 48 blocks of 1.5 MiB and 24 of 6 MiB at the least, twice.
    assert more["cpu, split, recompute 12"] > 1e-6 * 2 * (48 * 1.5 + 24 * 6) * MIB
    assert 0 < more["nvme, split"] < more["nvme, split, recompute 12"]
    assert work["cpu, split"] == plain["cpu, split"]
    # All is read and written once, weights are read in backward as well.
    assert work["nvme, split"] - plain["nvme, split"] > 1e-6 * 2 * 12 * 124e6


def test_what_cannot_fit_is_refused_with_the_nearest_budget(machine, tmp_path, capsys):
    config = tmp_path / "split.json"
    config.write_text(json.dumps({"bf16": {"enabled": True}, "zeroxide": {"format": "split"}}))
    words = ["plan", "gpt2", "--batch", "2", "--sequence", "64", "--config", str(config)]
    assert main([*words, "--host-memory", "700MiB"]) == 2
    line = capsys.readouterr().err
    assert "nothing fits --host-memory 700 MiB with micro-batches of 2 x 64 tokens" in line
    assert "with --disk DIR it would: nvme, split" in line or "with --disk DIR it would: mixed, split" in line
    enough = line.rpartition("with --host-memory ")[2].partition(" it would")[0]
    assert main([*words, "--host-memory", enough]) == 0
    less = f"{int(enough.removesuffix('MiB')) - 1}MiB"
    capsys.readouterr()
    assert main([*words, "--host-memory", less]) == 2


def test_a_smaller_micro_batch_is_named_where_one_fits(machine, capsys):
    words = ["plan", "tiny", "--host-memory", "130MiB", "--sequence", "256", "--batch"]
    assert main([*words, "4096"]) == 2
    line = capsys.readouterr().err
    batch = int(line.partition("with --batch ")[2].partition(" ")[0])
    assert main([*words, str(batch)]) == 0
    assert main([*words, str(batch + 1)]) == 2


def test_disk_bytes_are_a_budget(machine, capsys):
    words = ["plan", "gpt2", "--disk", str(machine), "--batch", "1", "--sequence", "64", "--host-memory", "600MiB"]
    assert main([*words, "--disk-bytes", "256MiB"]) == 2
    assert "--disk-bytes 256 MiB" in capsys.readouterr().err


def test_wear_is_a_share_of_the_drives_life(machine, capsys):
    found = by_name(planned(capsys, "tiny", "--disk", str(machine), "--drive-tbw", "600TB"))["nvme, split"]
    wear = found["wear_of_1000_steps"]
    assert wear["share"] == pytest.approx(1000 * found["written"] / 600e12)


def test_a_device_on_paper_takes_what_computes(machine, capsys):
    words = ("gpt2", "--batch", "1", "--sequence", "64", "--device-rate", "10", "--link-rate", "10")
    large = by_name(planned(capsys, *words, "--device-memory", "16GiB"))
    assert large["none, split"]["buckets"].get("optimizer", 0) == 0
    assert large["none, split"]["device"] > 12 * 124_000_000
    assert large["cpu, split"]["buckets"]["optimizer"] > 0
    assert main(["plan", *words, "--device-memory", "64MiB"]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tiny", "--disk", "/nowhere/at/all"], "is no directory"),
        (["tiny", "--host-memory", "much"], "--host-memory: expected"),
        (["tiny", "--drive-tbw", "600TB"], "--drive-tbw is for --disk"),
        (["tiny", "--sequence", "4096"], "longer than tiny can take"),
        (["tinny"], "did you mean tiny"),
    ],
)
def test_mistakes_are_one_line(words, expected, capsys):
    assert main(["plan", *words]) in (1, 2)
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_the_config_keeps_all_that_an_option_does_not_decide():
    given = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "zeroxide": {"format": "split", "host_memory": "1GiB", "prefetch": 2},
    }
    config, decided = base_config(given)
    assert config["zero_optimization"] == {"stage": 3}
    assert config["zeroxide"] == {"prefetch": 2}
    assert decided == {"format": "split", "host_memory": "1GiB"}
    assert "format" in given["zeroxide"]


def test_measurements_outlive_the_command_and_damage(tmp_path):
    path = tmp_path / "planning.json"
    one = Measurements(Machine(1, 2, 3.0, {"split": 4.0}), {"/a": Disk(1.0, 2.0, 3.0)})
    one.save(path, "one")
    Measurements(None, {}).save(path, "other")
    assert Measurements.load(path, "one") == one
    assert Measurements.load(path, "third") == Measurements()
    path.write_text(path.read_text()[:-20])
    assert Measurements.load(path, "one") == Measurements()


def test_age_is_in_words(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert [age(1_000_000.0 - each) for each in (5, 61, 7300, 90_000)] == [
        "just now",
        "1 minute ago",
        "2 hours ago",
        "1 day ago",
    ]


def test_a_request_is_of_one_process_where_nothing_is_said():
    assert Request("m", 1, 8).ranks == 1
