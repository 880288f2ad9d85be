"""What a model's forward costs, module by module; it knows no engine."""

from zeroxide.profiling.flops_profiler import FlopsProfiler, get_model_profile

__all__ = ["FlopsProfiler", "get_model_profile"]
