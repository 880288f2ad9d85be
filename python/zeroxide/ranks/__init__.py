"""Who the ranks are, whether they were started alike, and whether all of them still live."""

from zeroxide.ranks.activity import IDLE
from zeroxide.ranks.agreement import Fact, agree, name_ranks
from zeroxide.ranks.environment import Place, read_environment
from zeroxide.ranks.facts import config_facts, model_facts, sampler_facts, version_facts
from zeroxide.ranks.place import Ranks, all_gather_single, first_line
from zeroxide.ranks.start import init_distributed, start
from zeroxide.ranks.watch import EXIT_CODE, Watch

__all__ = [
    "EXIT_CODE",
    "IDLE",
    "Fact",
    "Place",
    "Ranks",
    "Watch",
    "agree",
    "all_gather_single",
    "config_facts",
    "first_line",
    "init_distributed",
    "model_facts",
    "name_ranks",
    "read_environment",
    "sampler_facts",
    "start",
    "version_facts",
]
