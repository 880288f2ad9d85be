"""What the log of collectives has come to, as a table, under DeepSpeed's names."""

from __future__ import annotations

from typing import Any

from zeroxide.config.sections.comms_logger import OPS
from zeroxide.distributed.comms_log import COMMS

__all__ = ["configure", "log_summary"]

_SUMMARY = {
    "Message Size": "msg_size_str",
    "Count": "count",
    "Total Latency(ms)": "total_latency_ms",
    "Avg Latency(ms)": "avg_latency_ms",
    "tput_avg (Gbps)": "tput_avg_gbps",
    "busbw_avg (Gbps)": "busbw_avg_gbps",
}
_STRAGGLERS = {
    "Message Size": "msg_size_str",
    "Count": "count",
    "Total comm lat(ms)": "total_comm_lat_ms",
    "Total straggler(ms)": "total_straggler_ms",
    "Avg comm lat(ms)": "avg_comm_lat_ms",
    "Avg straggler(ms)": "avg_straggler_ms",
}


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: list[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Changes what is logged from here on; None leaves it. `deepspeed_config` has no effect: engines read their own."""
    for name, value in (("enabled", enabled), ("prof_all", prof_all), ("verbose", verbose), ("debug", debug)):
        if value is not None:
            setattr(COMMS, name, value)
    if prof_ops is not None:
        COMMS.prof_ops = frozenset(OPS.get(name, name) for name in prof_ops)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Prints, on rank 0, what that rank has exchanged since `comms_logger` switched the log on. Every rank calls it.

    With `return_dict` every rank gets its own, as `CommsLog.summary` has it, under "summary", and with `show_straggler`
    that of `CommsLog.stragglers` under "straggler_analysis". Raises RanksError where a rank is lost.
    """
    COMMS.meet()
    found: dict[str, Any] = {"summary": COMMS.summary()}
    lines = _table(_SUMMARY, found["summary"])
    if show_straggler:
        found["straggler_analysis"] = COMMS.stragglers()
        lines += ["", "what ranks have waited for one another:", *_table(_STRAGGLERS, found["straggler_analysis"])]
    if COMMS.ranks is None or COMMS.ranks.rank == 0:
        print("\n".join(lines), flush=True)
    return found if return_dict else None


def _table(columns: dict[str, str], found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    lines = [_row("Comm. Op", [*columns])]
    for name, sizes in found.items():
        lines.append(name)
        lines += [_row("", [_word(each[key]) for key in columns.values()]) for each in sizes.values()]
    return lines


def _row(first: str, cells: list[str]) -> str:
    return "".join(each.ljust(20) for each in (first, *cells)).rstrip()


def _word(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
