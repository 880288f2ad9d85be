"""Compile one DeepSpeed operator and print one JSON line with the seconds it took.

Run by `setup.py` with the peers' interpreter. DeepSpeed compiles at first use through torch's C++ extension loader; a
second call finds the built object and only loads it, so the compile time is taken once and kept by `setup.py`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

BUILDERS = {
    "cpu_adam": ("deepspeed.ops.op_builder.cpu", "CPUAdamBuilder"),
    "fused_adam": ("deepspeed.ops.op_builder.cpu", "FusedAdamBuilder"),
    "async_io": ("deepspeed.ops.op_builder", "AsyncIOBuilder"),
    "ccl_comm": ("deepspeed.ops.op_builder.cpu", "CCLCommBuilder"),
    "shm_comm": ("deepspeed.ops.op_builder.cpu", "ShareMemCommBuilder"),
}


def main() -> None:
    name = sys.argv[1]
    module, builder = BUILDERS[name]
    operator = getattr(importlib.import_module(module), builder)()
    start = time.perf_counter()
    operator.load(verbose=False)
    print(json.dumps({"operator": name, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
