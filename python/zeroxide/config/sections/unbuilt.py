"""Keys at the top of the document that ask for what is not there: yet, or any more."""

from __future__ import annotations

from typing import Annotated, Any

from zeroxide.config.fields import NotBuilt, Removed, Section

__all__ = ["UnbuiltKeys"]

_BATCH_KEYS = "train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps"
_USE_SPARSE = "remove the key: rows of an embedding's gradient are always kept sparse"
_USE_LOADER = "order the data in the data loader"


class UnbuiltKeys(Section):
    """The keys; a section of its own takes one over when it is built."""

    # What is not built yet.
    use_data_before_expert_parallelism: Annotated[Any, NotBuilt("expert parallelism")] = None
    compile: Annotated[Any, NotBuilt("compiled graphs")] = None
    hybrid_engine: Annotated[Any, NotBuilt("the hybrid engine")] = None
    weight_quantization: Annotated[Any, NotBuilt("weight quantization")] = None
    data_efficiency: Annotated[Any, NotBuilt("data sampling and routing")] = None
    autotuning: Annotated[Any, NotBuilt("autotuning")] = None
    datastates_ckpt: Annotated[Any, NotBuilt("external checkpoint engines")] = None

    # What DeepSpeed 0.19.8 refuses by name, on or off.
    amp: Annotated[Any, Removed("Apex AMP", instead='use "bf16", "fp16" or "torch_autocast"')] = None
    elasticity: Annotated[Any, Removed("elastic batch sizes", instead=f"set {_BATCH_KEYS}")] = None
    nebula: Annotated[Any, Removed("Nebula checkpoints", instead='use "zeroxide.checkpoint_background"')] = None
    graph_harvesting: Annotated[Any, Removed("CUDA graphs")] = None
    sparse_gradients: Annotated[Any, Removed("sparse embedding gradients", instead=_USE_SPARSE)] = None
    sparse_attention: Annotated[Any, Removed("sparse attention", instead="use the model's own attention")] = None
    compression_training: Annotated[Any, Removed("compression", instead="compress with a library for it")] = None
    quantize_training: Annotated[Any, Removed("quantized training", instead="quantize the model before")] = None
    eigenvalue: Annotated[Any, Removed("eigenvalue estimates")] = None
    curriculum_learning: Annotated[Any, Removed("curriculum learning", instead=_USE_LOADER)] = None
    progressive_layer_drop: Annotated[Any, Removed("progressive layer drop", instead="drop layers in forward")] = None
