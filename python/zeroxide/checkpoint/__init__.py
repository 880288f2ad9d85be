"""Checkpoints and exported models: safetensors files and one JSON manifest, written and read a chunk at a time.

State is keyed by parameter name and element offset, so a checkpoint knows nothing of units, offload modes, state
formats or processes, and loads at any world size. A checkpoint in `save_dir` is

    latest                       the tag of the newest checkpoint, one line
    <tag>/manifest.json          everything but tensors, and what each file must contain
    <tag>/weights-00001.safetensors, one file for each state tensor (exp_avg-..., ...), buffers-...
                                 with several ranks weights-rank00000-00001.safetensors and so on, each by its rank

Names that start with a dot in `save_dir` belong to saves in progress or to ones that were killed; see `commit`.
"""
