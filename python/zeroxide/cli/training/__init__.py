"""The parts of `zeroxide train`, in the order in which a run meets them.

`options` (what was asked) -> `run_folder` (where it is kept) -> `corpus` and `prepare` (text to tokens, in a process
of its own) -> `dataset` and `batches` (tokens to batches) -> `models`, `from_scratch`, `from_safetensors` (a model on
the meta device and where its weights come from) -> `engine_setup` (handed over to zeroxide) -> `job` (the loop) ->
`conclusion` (held-out loss, model folder, `sample`, `plot`). `report` is what the user sees of it, `tracing` and
`facts` are what the page about the run (`zeroxide.cli.page`) needs besides.
"""
