"""The log of collectives on one rank: what is logged when, its arithmetic, and its words."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from zeroxide.config import load
from zeroxide.distributed import COMMS, Ranks, log_summary
from zeroxide.distributed.comms_log import CommsLog, bandwidths, said
from zeroxide.distributed.comms_summary import configure
from zeroxide.zero.messages import KINDS, LOGGED


@pytest.fixture
def log(monkeypatch):
    """The process's log as it begins, and as it was when the test ends."""
    for name, value in vars(CommsLog()).items():
        monkeypatch.setattr(COMMS, name, value)
    return COMMS


def logger_of(**keys):
    return load({"comms_logger": {"enabled": True, **keys}})


@pytest.mark.parametrize(
    ("op", "size", "ranks", "algorithm", "bus"),
    [
        # nccl-tests, doc/PERFORMANCE.md: S is all that each rank has in the end, here 4 parts of 1 MB, 3 of which come.
        ("all_gather", 3_000_000, 4, 4e6 * 8 / 1e9 / 0.5, 4e6 * 8 / 1e9 / 0.5 * 3 / 4),
        ("all_to_all", 3_000_000, 4, 4e6 * 8 / 1e9 / 0.5, 4e6 * 8 / 1e9 / 0.5 * 3 / 4),
        ("reduce_scatter", 1_000_000, 2, 2e6 * 8 / 1e9 / 0.5, 2e6 * 8 / 1e9 / 0.5 / 2),
        ("broadcast", 1_000_000, 4, 1e6 * 8 / 1e9 / 0.5, 1e6 * 8 / 1e9 / 0.5),
    ],
)
def test_bandwidths_are_those_of_nccls_tests(op, size, ranks, algorithm, bus):
    assert bandwidths(op, size, ranks, 500.0) == (pytest.approx(algorithm), pytest.approx(bus))
    assert bandwidths(op, size, ranks, 0.0) == (0.0, 0.0)


def test_every_kind_of_message_has_an_op_that_a_config_may_name():
    assert {op for op, _ in LOGGED.values()} == {"all_gather", "all_to_all"}
    assert len({*LOGGED.values()}) == len(KINDS)
    assert LOGGED["all-gather of sums"] == ("all_gather", "of sums")


def test_nothing_is_kept_while_it_is_off(log):
    assert log.begin("broadcast", 8, 2) is None
    log.end(None)
    log.configure(load({"comms_logger": {"enabled": False, "verbose": True}}), Ranks())
    assert (log.enabled, log.verbose, log.records) == (False, False, {})


def test_sizes_counts_and_times_are_added_up(log):
    log.configure(logger_of(), Ranks())
    start = time.perf_counter()
    for size in (8, 8, 16):
        began = log.begin("all_gather", size, 2, what="of sums", unit="h.0")
        time.sleep(0.01)
        log.end(began)
    whole = (time.perf_counter() - start) * 1e3
    found = log.summary()["all_gather of sums"]
    assert {size: each["count"] for size, each in found.items()} == {8: 2, 16: 1}
    assert found[8]["total_latency_ms"] >= 20
    assert found[8]["avg_latency_ms"] == found[8]["total_latency_ms"] / 2
    assert found[8]["total_latency_ms"] + found[16]["total_latency_ms"] <= whole
    assert found[16]["busbw_avg_gbps"] == pytest.approx(16 * 8 / 1e6 / found[16]["avg_latency_ms"])


def test_ops_that_are_named_alone_and_units_where_asked_for(log):
    log.configure(logger_of(prof_all=False, prof_ops=["all_gather_into_tensor"], debug=True), Ranks())
    assert log.begin("broadcast", 8, 2) is None
    log.end(log.begin("all_gather", 8, 2, unit="h.0"))
    assert [*log.records] == ["all_gather | h.0"]
    configure(prof_ops=["broadcast"], debug=False)
    assert log.begin("all_gather", 8, 2) is None
    assert log.begin("broadcast", 8, 2).name == "broadcast"


def test_what_has_no_effect_is_said():
    assert logger_of(prof_ops=["broadcast"]).no_effect == [("comms_logger.prof_ops", "comms_logger.prof_all is true")]
    found = logger_of(prof_all=False, prof_ops=["broadcast", "all_reduce", "all_reduced"]).no_effect
    assert found == [("comms_logger.prof_ops", "nothing that is logged is called all_reduced")]


def test_each_is_logged_where_asked_for(log, caplog):
    log.configure(logger_of(verbose=True), Ranks())
    with caplog.at_level(logging.INFO, "zeroxide"):
        log.end(log.begin("broadcast", 2048, 2))
    (line,) = caplog.messages
    assert line.startswith("comm op: broadcast | time (ms): ")
    assert "| msg size: 2 KB | algbw (Gbps): " in line


def test_the_summary_of_one_rank(log, capsys):
    assert log_summary(return_dict=True) == {"summary": {}}
    log.configure(logger_of(), Ranks())
    log.end(log.begin("broadcast", 2048, 2))
    found = log_summary(show_straggler=True, return_dict=True)
    assert found["straggler_analysis"]["broadcast"][2048]["total_straggler_ms"] == 0
    assert log_summary() is None
    assert "broadcast\n" + " " * 20 + "2 KB" in capsys.readouterr().out
    log.reset()
    assert log.summary() == {}


class Three(Ranks):
    others = ()

    def gather_objects(self, value):
        assert not COMMS.enabled, "a summary is none of what it sums up"
        return [value, *self.others]


def test_stragglers_are_what_a_rank_took_beyond_the_fastest(log):
    """Catches: latencies of different collectives compared where ranks have counted differently."""
    log.configure(logger_of(), Three(rank=0, world=3, backend="gloo", group=object()))
    Three.others = ({"broadcast": {"8": [9.0, 1.0, 2.0]}}, {"broadcast": {"8": [3.0, 1.0]}, "more": {"1": [1.0]}})
    log.end(log.begin("broadcast", 8, 3))
    log.end(log.begin("broadcast", 8, 3))
    log.records["broadcast"][8].latest.clear()
    log.records["broadcast"][8].latest.extend([5.0, 4.0])
    (found,) = log.stragglers()["broadcast"].values()
    # The fastest of each: min(5, 1, 3) and min(4, 2, 1); this rank took 9 in all.
    assert found["count"] == 2
    assert found["total_comm_lat_ms"] == 1 + 1
    assert found["total_straggler_ms"] == 9 - 2
    assert log.enabled


def test_sizes_in_words():
    assert [said(size) for size in (0, 1023, 1024, 1536, 3 << 30)] == ["0 B", "1023 B", "1 KB", "1.5 KB", "3 GB"]


def test_collectives_of_a_rank_that_is_alone_are_none(log):
    log.configure(logger_of(), Ranks())
    Ranks().gather_objects([1])
    Ranks().broadcast_tensor(torch.ones(2))
    assert log.records == {}
