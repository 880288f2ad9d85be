"""One file written and read with DeepSpeed's asynchronous I/O handle, a round at a time. Peers' interpreter.

One argument: a JSON object

    {"path": file, "bytes": 1073741824, "block": 1048576, "depth": 32, "parallelism": threads of the handle}
"""

from __future__ import annotations

import json
import sys
import time

import rounds
import torch


def main() -> None:
    spec = json.loads(sys.argv[1])
    from deepspeed.ops.op_builder import AsyncIOBuilder

    # block_size, queue_depth, single_submit, overlap_events, intra_op_parallelism
    handle = (
        AsyncIOBuilder().load(verbose=False).aio_handle(spec["block"], spec["depth"], False, True, spec["parallelism"])
    )
    tensor = handle.new_cpu_locked_tensor(spec["bytes"], torch.empty(0, dtype=torch.uint8))
    tensor.random_(0, 256)
    # The file's blocks are allocated and written once before anything is measured.
    handle.sync_pwrite(tensor, spec["path"], 0)

    def measure() -> dict[str, object]:
        start = time.perf_counter()
        handle.sync_pwrite(tensor, spec["path"], 0)
        written = time.perf_counter()
        handle.sync_pread(tensor, spec["path"], 0)
        return {"write_seconds": written - start, "read_seconds": time.perf_counter() - written}

    rounds.serve({"parallelism": spec["parallelism"]}, measure)
    handle.free_cpu_locked_tensor(tensor)


if __name__ == "__main__":
    main()
