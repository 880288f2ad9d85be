"""A sample of what the model writes, and the held-out loss: the two looks at a model that train nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from zeroxide.cli.training.batches import HeldOutBatches

__all__ = ["generate", "held_out_loss"]

_TEMPERATURE = 0.8
_TOP_K = 40


@torch.no_grad()
def held_out_loss(engine: Any, batches: HeldOutBatches, stop: Callable[[], bool]) -> float | None:
    """Return the mean loss per predicted token, in nats; None where there is no held-out text or `stop` came true."""
    total, count = 0.0, 0
    engine.eval()
    try:
        for number in range(len(batches)):
            if stop():
                return None
            batch = batches.batch(number).to(engine.device)
            predicted = batch.shape[0] * (batch.shape[1] - 1)
            total += float(engine(input_ids=batch, labels=batch, use_cache=False).loss) * predicted
            count += predicted
    finally:
        engine.train()
    return total / count if count else None


@torch.no_grad()
def generate(
    engine: Any,
    prompt: list[int],
    *,
    count: int,
    vocabulary_size: int,
    end_of_text: int | None,
    seed: int,
    stop: Callable[[], bool],
) -> list[int]:
    """Return up to `count` tokens that go on from `prompt`, drawn from the 40 likeliest at temperature 0.8.

    Where keys and values are cached, each token is one pass over one position. Tokens from `vocabulary_size` on exist
    in the model's embedding but not in the tokenizer, and are never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    inputs, cache = torch.tensor([prompt], device=engine.device), None
    engine.eval()
    try:
        while len(tokens) < count and not stop():
            output = engine(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = getattr(output, "past_key_values", None)
            logits = output.logits[0, -1, :vocabulary_size].float().cpu()
            likeliest = torch.topk(logits, min(_TOP_K, logits.numel()))
            weights = torch.softmax(likeliest.values / _TEMPERATURE, dim=-1)
            if not math.isfinite(float(weights.sum())):
                break
            token = int(likeliest.indices[torch.multinomial(weights, 1, generator=generator)])
            if token == end_of_text:
                break
            tokens.append(token)
            # A model that keeps no such cache is given the whole text again.
            more = [token] if cache is not None else [*prompt, *tokens]
            inputs = torch.tensor([more], device=engine.device)
    finally:
        engine.train()
    return tokens
