"""Large and small numbers in few characters, in DeepSpeed's words for them."""

from __future__ import annotations

__all__ = ["duration_to_string", "flops_to_string", "macs_to_string", "number_to_string", "params_to_string"]

_UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}
_PRECISION = 2


def number_to_string(num: float, units: str | None = None, precision: int = _PRECISION) -> str:
    """`num` in `units` ("T", "G", "M", "K", "", "m" or "u"; by default the largest of which it is at least one)."""
    if units is None:
        units = "" if num == 0 else next((unit for unit, size in _UNITS.items() if num >= size), "u")
    return f"{round(num / _UNITS.get(units, 1.0), precision):g} {units}"


def flops_to_string(flops: float, units: str | None = None, precision: int = _PRECISION) -> str:
    """Operations a second: "1.5 GFLOPS"."""
    return f"{number_to_string(flops, units, precision)}FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = _PRECISION) -> str:
    """Multiply-accumulates: "1.5 GMACs"."""
    return f"{number_to_string(macs, units, precision)}MACs"


def params_to_string(params_num: float, units: str | None = None, precision: int = _PRECISION) -> str:
    """Parameters, with B for 10**9: "7.24 B"."""
    units = units.replace("B", "G") if units else units
    return number_to_string(params_num, units, precision).replace("G", "B").strip()


def duration_to_string(duration: float, units: str | None = None, precision: int = _PRECISION) -> str:
    """Seconds: "3.2 ms"."""
    return f"{number_to_string(duration, units, precision)}s"
