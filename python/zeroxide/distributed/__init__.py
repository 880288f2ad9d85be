"""Who the ranks are, whether they were started alike, and whether all of them still live."""

from zeroxide.distributed.agreement import Fact, agree, name_ranks
from zeroxide.distributed.collectives import Ranks, all_gather_single, first_line
from zeroxide.distributed.comms_log import COMMS, Began
from zeroxide.distributed.comms_summary import log_summary
from zeroxide.distributed.facts import model_facts, sampler_facts, version_facts
from zeroxide.distributed.health.activity import IDLE
from zeroxide.distributed.health.watch import EXIT_CODE, Watch
from zeroxide.distributed.job import Job, split_job
from zeroxide.distributed.launch import LaunchInfo, read_environment
from zeroxide.distributed.mesh import Group, Hops, ProcessMesh, UnitGroups
from zeroxide.distributed.process_group import init_distributed, split, start

__all__ = [
    "COMMS",
    "EXIT_CODE",
    "IDLE",
    "Began",
    "Fact",
    "Group",
    "Hops",
    "Job",
    "LaunchInfo",
    "ProcessMesh",
    "Ranks",
    "UnitGroups",
    "Watch",
    "agree",
    "all_gather_single",
    "first_line",
    "init_distributed",
    "log_summary",
    "model_facts",
    "name_ranks",
    "read_environment",
    "sampler_facts",
    "split",
    "split_job",
    "start",
    "version_facts",
]
