"""What DeepSpeed's names take, keyword by keyword, against what zeroxide's under the name take.

`deepspeed_signatures.json` was written down from DeepSpeed itself by `deepspeed_signatures.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from deepspeed_names import USED

HERE = Path(__file__).parent

EXPLAINED = {
    r"\.DeepSpeedEngine \w+: (not taken|must be given)": "engines are made by initialize",
    r"\.(DeepSpeedOptimizer|ZeROOptimizer) \w+: must be given": "there to be asked for by isinstance",
    r"\.FlopsProfiler is_expert_tensor_parallelism_enabled: not there": "expert parallelism is not built yet",
    r"\.(compile compile_kwargs|\w+_profile kwargs|save_checkpoint client_state): default \[None\]": "None is empty",
    r"\.save_(16bit|fp16)_model save_filename: default \[None\]": "safetensors, docs/deepspeed.md says why",
    r"(__version__|git_version_info\.version|deepspeed\.version): value 0\.19\.8\+zeroxide": "says who answers",
    r"(__git_hash__|\.git_hash): value zeroxide": "says who answers",
    r"init_distributed timeout: default \[None\], not \['0:10:00'\]": "None is ten minutes, or what the variables say",
    r"\.DeepSpeedCPU\w+ (optimizer_id|rollback_subgroup|step_subgroup): not there": "DeepSpeed's own between its parts",
    r"\.OpBuilder name: default \[None\]": "a builder has a name anyway",
    r"\.(\w+LR|OneCycle|LRRangeTest)(\.| )(get_lr_ratio|load_state_dict|step)\b": "schedules are torch's own kind",
    r"\.comm\.\w+ (prof|log_name|debug): not taken": "DeepSpeed's own between its parts",
    r"\.comm\.\w+ (dst|ranks|src): default": "torch's own functions, where rank 0 and all ranks need not be said",
    r"\.comm\.\w+ op: default \['RedOpType'\], not \[0\]": "0 is the number of SUM, which is torch's",
    r"\.comm\.ReduceOp: members None": "torch's own, with the same members",
    r"\.Init \w+: not there": "DeepSpeed's own between its parts",
    r"\.moe\.\w+\.(Experts|MOELayer|TopKGate) \w+: (not taken|must be given|at another place)": "MoE makes them",
    r"\.PipelineEngine [*\w]+: (not taken|must be given)": "engines are made by initialize",
    r"\.(SequenceTiledCompute|Tiled\w+) \*(kw)?args: not taken": "functions are called by apply",
    r"\.UlyssesSPAttentionHF \w+: (not taken|must be given|default None|at another place)": "registering makes it",
}
"""Differences that are meant -> why."""


def test_every_keyword_and_default_is_deepspeeds_or_explained():
    """Catches: a keyword that is renamed, left out or moved, another default, a method that is gone (each tried)."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "contract_program.py")], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [line for line in found if not any(re.search(each, line) for each in EXPLAINED)] == []
    assert [each for each in EXPLAINED if not any(re.search(each, line) for line in found)] == []


def test_what_deepspeed_takes_is_known_of_every_name_that_libraries_use():
    """But for those that DeepSpeed 0.19.8 itself has no longer, or never had."""
    known = json.loads((HERE / "deepspeed_signatures.json").read_text(encoding="utf-8"))["names"]
    unknown = {f"{module}.{name}" for module, names in USED.items() for name in names.split()} - set(known)
    assert unknown == {"deepspeed.elasticity.compute_elastic_config"}
