"""What a config says of the groups of ranks, and what of that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from zeroxide.config import Mesh, load
from zeroxide.errors import ConfigError


def mesh_of(world: int, mesh: dict[str, Any] | None = None, stage: int = 3, hpz: Any = None) -> Mesh | None:
    zero = {"stage": stage, **({} if hpz is None else {"zero_hpz_partition_size": hpz})}
    return load({"zero_optimization": zero, "zeroxide": {} if mesh is None else {"mesh": mesh}}, world_size=world).mesh


@pytest.mark.parametrize(
    ("world", "mesh", "hpz"),
    [
        (4, {"dp_shard": 2}, None),
        (4, {"dp_replicate": 2}, None),
        (4, {"dp_replicate": 2, "dp_shard": 2, "tp": 1, "pp": 1, "sp": 1, "ep": 1}, None),
        (4, None, 2),
        (4, {"dp_shard": 2}, 2),
        (4, {"dp_shard": "auto"}, 2),
    ],
)
def test_every_way_to_write_two_by_two(world, mesh, hpz):
    assert mesh_of(world, mesh, hpz=hpz) == Mesh(dp_replicate=2, dp_shard=2)


@pytest.mark.parametrize("hpz", [None, 1, 4, "auto"])
@pytest.mark.parametrize("mesh", [None, {}, {"dp_shard": 4}, {"dp_replicate": 1}])
def test_one_group_of_all_ranks_is_plain_sharding(mesh, hpz):
    assert mesh_of(4, mesh, hpz=hpz) is None


def test_at_stage_0_all_ranks_are_replicas():
    assert mesh_of(4, {"dp_replicate": 4}, stage=0) is None
    assert mesh_of(4, {"dp_replicate": 4, "dp_shard": 1}, stage=0) is None


@pytest.mark.parametrize("stage", [1, 2])
def test_groups_are_for_every_stage_that_shards(stage):
    assert mesh_of(6, {"dp_shard": 3}, stage=stage) == Mesh(dp_replicate=2, dp_shard=3)


HPZ, MESH = "zero_optimization.zero_hpz_partition_size", "zeroxide.mesh"
REFUSED = [
    (4, {"dp_replicate": 2, "dp_shard": 3}, 3, None, MESH, "2 * dp_shard 3 = 6, and there are 4 ranks: make their"),
    (4, {"dp_shard": 3}, 3, None, f"{MESH}.dp_shard", "= 3 does not divide the 4 ranks: use 1, 2 or 4"),
    (6, {"dp_replicate": 4}, 3, None, f"{MESH}.dp_replicate", "= 4 does not divide the 6 ranks: use 1, 2, 3 or 6"),
    (8, None, 3, 3, HPZ, "= 3 does not divide the 8 ranks: use 1, 2, 4 or 8"),
    (8, None, 2, 2, HPZ, "= 2 needs zero_optimization.stage 3, got 2"),
    (1, None, 3, 8, HPZ, "= 8 does not divide the 1 ranks: use 1"),
    (8, {"dp_shard": 4}, 3, 2, HPZ, f"= 2 contradicts {MESH}.dp_shard = 4"),
    (4, {"dp_shard": 2}, 0, None, f"{MESH}.dp_shard", "dp_shard = 2 needs zero_optimization.stage 1 to 3, got 0"),
    (4, {"dp_shard": 1}, 3, None, f"{MESH}.dp_shard", "keeps everything on each of 4 ranks: that is"),
    (4, {"pp": 3}, 3, None, MESH, "pp 3 does not divide the 4 ranks"),
    (4, {"sp": 3}, 3, None, MESH, "sp 3 does not divide the 4 ranks"),
    (4, {"sp": 2}, 3, 2, HPZ, "= 2 with 2 ranks that share sequences"),
    (4, {"ep": 3}, 3, None, f"{MESH}.ep", "ep = 3 does not divide dp_shard * sp = 4"),
    (4, {"tp": 3}, 3, None, MESH, "tp 3 does not divide the 4 ranks"),
    (4, {"dp": 2}, 3, None, f"{MESH}.dp", "unknown key"),
    (4, {"dp_shard": 0}, 3, None, f"{MESH}.dp_shard", "expected an integer from 1"),
    (4, None, 3, True, HPZ, "expected an integer from 1"),
]


def quantised(world: int, **zero: Any) -> Any:
    return load({"zero_optimization": {"stage": 3, **zero}}, world_size=world)


def test_with_quantised_weights_hpz_is_a_secondary_partition():
    # Catches: optimizer state that is cut over a group alone, and a group of one or of all that is taken for several.
    found = quantised(8, zero_quantized_weights=True, zero_hpz_partition_size=4)
    assert found.mesh is None
    assert found.zero.secondary == 4
    for size in (1, "auto"):
        assert quantised(8, zero_quantized_weights=True, zero_hpz_partition_size=size).zero.secondary == 0
    for key in ("zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        found = quantised(8, **{key: True}, zero_hpz_partition_size=4)
        assert found.mesh == Mesh(dp_replicate=2, dp_shard=4)
        assert found.zero.secondary == 0


ZERO = "zero_optimization"
NVME = {"device": "nvme", "nvme_path": "/d"}
QUANTISED_REFUSED = [
    ({"stage": 2, "zero_quantized_weights": True}, "zero_quantized_weights", "= true needs zero_optimization.stage 3"),
    ({"stage": 1, "zero_quantized_gradients": True}, "zero_quantized_gradients", "stage 3, got 1"),
    (
        {"zero_quantized_weights": True, "offload_param": NVME},
        "zero_quantized_weights",
        "not built yet; keep the weights",
    ),
    (
        {"zero_quantized_nontrainable_weights": True, "offload_param": NVME},
        "zero_quantized_nontrainable_weights",
        "not",
    ),
    ({"zeropp_loco_param": {}}, "zeropp_loco_param", "needs zero_optimization.zero_quantized_gradients = true"),
    ({"zero_quantized_weights": True, "zero_hpz_partition_size": 3}, "zero_hpz_partition_size", "= 3 does not divide"),
]


@pytest.mark.parametrize(("zero", "key", "words"), QUANTISED_REFUSED)
def test_quantised_collectives_that_cannot_be_are_refused_in_one_line(zero, key, words):
    with pytest.raises(ConfigError) as caught:
        quantised(8, **zero)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.path == f"{ZERO}.{key}"


@pytest.mark.parametrize(("value", "words"), [(1.0, "below 1"), (-0.1, "at least 0"), (True, "a number")])
def test_the_weight_of_what_was_lost_is_below_one(value, words):
    # 1 would never keep anything new.
    with pytest.raises(ConfigError, match=words) as caught:
        quantised(8, zero_quantized_gradients=True, zeropp_loco_param={"err_beta": value})
    assert caught.value.path == f"{ZERO}.zeropp_loco_param.err_beta"


def test_a_secondary_partition_and_shard_groups_contradict_one_another():
    with pytest.raises(ConfigError, match=r"contradicts zeroxide\.mesh"):
        load(
            {
                ZERO: {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 2},
                "zeroxide": {"mesh": {"dp_shard": 4}},
            },
            world_size=8,
        )


@pytest.mark.parametrize(("world", "mesh", "stage", "hpz", "path", "words"), REFUSED)
def test_groups_that_cannot_be_are_refused_in_one_line(world, mesh, stage, hpz, path, words):
    # Catches: numbers that are not checked before ranks start, a line that does not name them or the fix.
    with pytest.raises(ConfigError) as caught:
        mesh_of(world, mesh, stage, hpz)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.path == path
