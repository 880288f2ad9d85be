"""The parts of `zeroxide train`, in the order in which a run meets them.

`options` (what was asked) -> `run_folder` (where it is kept) -> `corpus` and `prepare` (text to tokens, in a process
of its own) -> `dataset` and `batches` (tokens to batches) -> `models`, `from_scratch`, `from_safetensors` (a model on
the meta device and where its weights come from) -> `loss` -> `job` (the loop) -> `report`, `sample`, `plot`.
"""
