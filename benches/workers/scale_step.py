"""Build a Llama-like model that was never whole in memory, train it for a few steps, and report what that took.

One argument: a JSON object

    {"hidden": 2048, "feed_forward": 5504, "layers": 6, "vocabulary": 32000, "rows": 1, "columns": 128, "steps": 3,
     "accumulate": 1, "directory": where the blocks go, "host_memory": "4GiB" or null, "clip": 1.0, "format": null,
     "update_in_backward": false, "checkpointing": false, "loss_chunk": 0, "threads": 2}

Weights, gradients and optimizer state are on disk. Losses are printed with all their digits, so that two settings that
must not change a bit can be compared. Peak memory is the parent's to measure, from outside.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any


def make_model(spec: dict[str, Any]) -> Any:
    """The model on the meta device: shapes alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec["vocabulary"],
        hidden_size=spec["hidden"],
        intermediate_size=spec["feed_forward"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=max(1, spec["hidden"] // 128),
        num_key_value_heads=max(1, spec["hidden"] // 128),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The one buffer that no weight source makes: rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.train()


def engine_config(spec: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's config would say."""
    return {
        "train_micro_batch_size_per_gpu": spec["rows"],
        "gradient_accumulation_steps": spec["accumulate"],
        "gradient_clipping": spec["clip"],
        "steps_per_print": math.inf,
        "bf16": {"enabled": True},
        "data_types": {"param_dtype": "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zeroxide": {
            "format": spec["format"],
            "threads": spec["threads"],
            "update_in_backward": spec["update_in_backward"],
        },
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    started = time.perf_counter()

    import process
    import torch

    import zeroxide
    from zeroxide.cli.training.from_scratch import FromScratch
    from zeroxide.cli.training.loss import causal_lm_loss, without_logits

    torch.set_num_threads(spec["threads"])
    model = make_model(spec)
    model.loss_function = causal_lm_loss
    if spec["loss_chunk"]:
        without_logits(model, spec["loss_chunk"])
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    imported, before = time.perf_counter(), process.memory()
    engine, *_ = zeroxide.initialize(
        model=model,
        weights=FromScratch(model, 0),
        offload=f"nvme:{spec['directory']}",
        host_memory=spec["host_memory"],
        config=engine_config(spec),
    )
    ready, built = time.perf_counter(), process.memory()
    print("PLAN " + json.dumps(engine.plan().describe()), flush=True)
    generator = torch.Generator().manual_seed(1)
    losses, steps = [], []
    for _ in range(spec["steps"]):
        moved, begun = process.disk(), time.perf_counter()
        total = 0.0
        for _ in range(spec["accumulate"]):
            tokens = torch.randint(0, spec["vocabulary"], (spec["rows"], spec["columns"]), generator=generator)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            total += float(loss.detach())
            engine.step()
        # Nothing that users call does this: the whole step is measured, and what the next forward would hide with it.
        engine.finish_step()
        after = process.disk()
        losses.append(total)
        steps.append(
            {
                "seconds": time.perf_counter() - begun,
                **{key: after[key] - moved[key] for key in after},
                "rss": process.memory()["rss"],
            }
        )
    process.emit(
        {
            "parameters": parameters,
            "losses": losses,
            "setup_seconds": ready - imported,
            "import_seconds": imported - started,
            "imported_rss": before["rss"],
            "setup_peak": built["peak"],
            "steps": steps,
            "memory": engine.memory(),
            "disk_bytes": engine.plan().disk_bytes,
        }
    )
    engine.destroy()


if __name__ == "__main__":
    main()
