"""A process that runs model types: a type and modes, between tabs, come in as a line; JSON goes out for every mode.

A type may end the process (a signal, memory) or never come back. Whoever reads the lines then knows which mode it was.
With ZOO_TRACE=1 the tracebacks of failures go to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "numerics")]
os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def place(error: Exception) -> str:
    """Where a model was when it failed: the innermost line that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.name.startswith(("modeling_", "weight_uses", "stacks")):
            return f" [{path.name}:{frame.lineno} {frame.line}]"
    return ""


def main() -> None:
    """Serves until its input ends."""
    lines, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    # Whatever a model prints is not an answer.
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    import torch
    from beside_torch import MODES, Differs, Skipped, compare
    from small_models import Unbuildable, find
    from untrimmed import leave_libraries
    from weight_uses import WAYS

    leave_libraries()
    torch.set_num_threads(1)

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answer(ready=True)
    for line in lines:
        model_type, *modes = line.rstrip("\n").split("\t")
        begun = time.monotonic()
        try:
            small = WAYS[model_type[4:]] if model_type.startswith("way:") else find(model_type)
        except Unbuildable as error:
            answer(built=False, detail=str(error))
            continue
        answer(built=True, detail=small.what, seconds=time.monotonic() - begun)
        for name in modes:
            begun = time.monotonic()
            directory = Path(tempfile.mkdtemp(prefix="zoo-", dir=sys.argv[1]))
            try:
                outcome, detail = "same", compare(small, MODES[name], directory)
            except Skipped as error:
                outcome, detail = "skipped", str(error)
            except Differs as error:
                outcome, detail = "differs", str(error)
            except Exception as error:
                if os.environ.get("ZOO_TRACE"):
                    traceback.print_exc()
                outcome, detail = (
                    "failed",
                    f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place(error)}",
                )
            finally:
                shutil.rmtree(directory, ignore_errors=True)
            answer(mode=name, outcome=outcome, detail=detail, seconds=time.monotonic() - begun)


if __name__ == "__main__":
    main()
