"""Which rank the variables of torchrun, MPI and SLURM make of a process, and the line that contradictions get."""

from __future__ import annotations

import pytest

from zeroxide.distributed.launch import LaunchInfo, read_environment, split_nodes
from zeroxide.errors import RanksError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "3(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "head",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, LaunchInfo()),
        ({"RANK": "", "WORLD_SIZE": " "}, LaunchInfo()),
        # What an interactive SLURM allocation sets, in which nobody has started tasks.
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n1"}, LaunchInfo()),
        (TORCHRUN, LaunchInfo(3, 8, 1, 2, "head", 1234, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, LaunchInfo(launcher="torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, LaunchInfo(1, 2, None, None, "h", 29500, "torchrun")),
        (SLURM, LaunchInfo(5, 6, 2, 3, "gpu07", 29500, "SLURM")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "9"}, LaunchInfo(5, 9, 2, 3, "gpu07", 29500, "SLURM")),
        ({**SLURM, "MASTER_ADDR": "other", "MASTER_PORT": "5"}, LaunchInfo(5, 6, 2, 3, "other", 5, "SLURM")),
        (OPEN_MPI, LaunchInfo(2, 4, 0, 2, "head", 29500, "Open MPI")),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            LaunchInfo(1, 2, 1, 2, "127.0.0.1", 29500, "MVAPICH2"),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            LaunchInfo(1, 2, 1, 2, "127.0.0.1", 29500, "PMI"),
        ),
        ({"PMIX_RANK": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "h"}, LaunchInfo(1, 2, None, None, "h", 29500, "PMIx")),
        # mpirun in a SLURM job: SLURM's variables are those of the task that called mpirun.
        ({**SLURM, **OPEN_MPI, "SLURM_PROCID": "0"}, LaunchInfo(2, 4, 0, 2, "head", 29500, "Open MPI")),
        ({**SLURM, **OPEN_MPI, **TORCHRUN}, LaunchInfo(3, 8, 1, 2, "head", 1234, "torchrun")),
        # A job script that sets one of the two.
        ({**SLURM, "WORLD_SIZE": "6"}, LaunchInfo(5, 6, 2, 3, "gpu07", 29500, "SLURM")),
    ],
)
def test_the_place_that_variables_describe(variables, expected):
    assert read_environment(variables) == expected


def test_the_port_of_the_caller_comes_after_the_variable():
    assert read_environment(SLURM, 77).port == 77
    assert read_environment(TORCHRUN, 77).port == 1234


def test_other_launchers_can_be_left_out():
    assert read_environment(SLURM, other_launchers=False) == LaunchInfo()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**TORCHRUN, "RANK": "8"}, "RANK: expected 0 to 7, since WORLD_SIZE is 8, got 8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK: expected a whole number from 0 to 16777216, got '-1'"),
        ({**TORCHRUN, "RANK": "1.0"}, "RANK: expected a whole number from 0 to 16777216, got '1.0'"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number from 1"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE: expected the number of ranks, since RANK is set, got nothing"),
        ({"WORLD_SIZE": "2"}, "RANK: expected this process's rank, since WORLD_SIZE is set, got nothing"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK: expected 0 to 1, since LOCAL_WORLD_SIZE is 2, got 2"),
        ({**TORCHRUN, "RANK": "0"}, "LOCAL_RANK: expected 0 to 0, since RANK is 0, got 1"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE: expected 1 to 8, since WORLD_SIZE is 8, got 9"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT: expected a whole number from 1 to 65535, got '70000'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: expected the name of rank 0's host"),
        ({**SLURM, "SLURM_PROCID": "6"}, "SLURM_PROCID: expected 0 to 5, since SLURM_NTASKS is 6, got 6"),
        ({**SLURM, "SLURM_JOB_NODELIST": "gpu[07-"}, "SLURM_JOB_NODELIST: expected nodes such as"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "3x2"}, "SLURM_TASKS_PER_NODE: expected counts such as"),
        ({**SLURM, "WORLD_SIZE": "7"}, "WORLD_SIZE: expected 6, since SLURM_NTASKS is 6, got 7"),
        ({**SLURM, "RANK": "4"}, "RANK: expected 5, since SLURM_PROCID is 5, got 4"),
    ],
)
def test_contradictions_are_named(variables, words):
    with pytest.raises(RanksError) as caught:
        read_environment(variables)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("n[01-03,07],m2", ["n01", "n02", "n03", "n07", "m2"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("m2,n[01-02]", ["m2", "n01", "n02"]),
    ],
)
def test_node_lists(text, expected):
    assert split_nodes(text) == expected


@pytest.mark.parametrize("text", ["", "n[", "n]", "n[a-b]", "n[3-1]", "n[]", "n1,,n2", "n[1]]", "n 1", "n[1-99999999]"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(RanksError, match="SLURM_NODELIST: expected nodes"):
        split_nodes(text)
