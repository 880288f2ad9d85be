"""Train GPT-2 as DeepSpeed's PipelineModule for a few steps and report times, memory and disk bytes.

The same script for both sides: `deepspeed` is what the interpreter finds under that name. One argument: a JSON object

    {"model": "124m", "rows": 1, "columns": 128, "accumulation": 8, "steps": 6, "threads": 1,
     "zero": the zero_optimization section, "more": other sections}

The number of stages is that of the ranks.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import process
import torch


def layers(config: Any) -> list[Any]:
    """GPT-2 as a row of layers: embeddings, blocks, the last norm, and the head tied to the token embedding."""
    import gpt2
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from torch import nn
    from torch.nn import functional
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config._attn_implementation = "sdpa"

    def filled(module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters():
            gpt2.fill_parameter(f"{prefix}{name}", parameter.data, config.n_layer)

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
            filled(self, "")

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
            return hidden

    class Block(GPT2Block):
        def __init__(self, index: int) -> None:
            super().__init__(config, layer_idx=index)
            filled(self, f"h.{index}.")

    class LastNorm(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(config.n_embd, eps=config.layer_norm_epsilon)

    def head(embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, embedding.wte.weight)

    return [
        TiedLayerSpec("embedding", Embedding, tied_weight_attr="wte.weight"),
        *[LayerSpec(Block, index) for index in range(config.n_layer)],
        LayerSpec(LastNorm),
        TiedLayerSpec("embedding", Embedding, forward_fn=head, tied_weight_attr="wte.weight"),
    ]


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token, in fp32, as transformers has it for causal models."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if os.environ.get("ZEROXIDE_AS_DEEPSPEED"):
        # An installed wheel sees the variable itself; here zeroxide may be no more than a folder on the path.
        import zeroxide.integrations.deepspeed  # noqa: F401
    import deepspeed
    import gpt2
    from deepspeed.pipe import PipelineModule

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    imported = process.memory()
    started = time.perf_counter()
    deepspeed.init_distributed(dist_backend="gloo")
    config = gpt2.model_config(spec["model"])
    module = PipelineModule(
        layers(config),
        num_stages=torch.distributed.get_world_size(),
        loss_fn=causal_loss,
        partition_method="parameters",
    )
    settings = {
        "train_micro_batch_size_per_gpu": spec["rows"],
        "gradient_accumulation_steps": spec["accumulation"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": spec["zero"],
        "steps_per_print": 1_000_000,
        **spec.get("more", {}),
    }
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    ready = time.perf_counter()
    built = process.memory()
    process.reset_peak()

    def data() -> Any:
        step = 0
        while True:
            batch = gpt2.batch(spec["model"], spec["rows"], spec["columns"], step)
            yield batch["input_ids"], batch["labels"]
            step += 1

    rows = data()
    steps = []
    for _ in range(spec["steps"]):
        before, begun = process.disk(), time.perf_counter()
        loss = engine.train_batch(data_iter=rows)
        took = time.perf_counter() - begun
        moved = process.disk()
        steps.append({"total": took, "loss": float(loss), **{key: moved[key] - before[key] for key in moved}})
    process.emit(
        {
            "parameters": sum(getattr(each, "ds_numel", each.numel()) for each in module.parameters()),
            "setup_seconds": ready - started,
            "steps": steps,
            "memory": process.memory_of_run(imported, built),
        }
    )


if __name__ == "__main__":
    main()
