"""Small models of experts, their micro-batches, and their training in one process by plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zeroxide.moe import MoE

WORDS, WIDTH, EXPERTS = 48, 16, 4


class Block(nn.Module):
    def __init__(self, ep: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        options: dict[str, Any] = {"drop_tokens": False, "top2_2nd_expert_sampling": False, "use_residual": True}
        self.moe = MoE(WIDTH, expert, EXPERTS, ep_size=ep, k=2, **options)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made, l_aux, _ = self.moe(self.norm(hidden))
        return hidden + made, l_aux


class Layers(nn.Module):
    """Blocks with a layer of experts each."""

    def __init__(self, ep: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block(ep) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, total = self.words(ids), 0.0
        for layer in self.layers:
            hidden, l_aux = layer(hidden)
            total = total + l_aux
        loss = functional.cross_entropy(self.head(hidden).float().flatten(0, 1), ids.flatten())
        return loss + 0.01 * total


def build(family: str, ep: int) -> nn.Module:
    """The same weights whatever `ep` is; experts of one layer differ."""
    torch.manual_seed(3)
    model = Layers(ep) if family == "moe" else hugging_face(family)
    torch.manual_seed(4)
    for name, param in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(param, std=0.2)
    return model


def hugging_face(family: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    own = {
        "mixtral": {"intermediate_size": 24, "num_local_experts": EXPERTS},
        "qwen3_moe": {
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "num_experts": EXPERTS,
            "decoder_sparse_step": 1,
            "head_dim": 8,
        },
        "deepseek_v3": {
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "n_routed_experts": EXPERTS,
            "num_local_experts": EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 2,
        },
    }[family]
    config = AutoConfig.for_model(family, **{**small, **own})
    return AutoModelForCausalLM.from_config(config).eval()


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids) if isinstance(getattr(model, "module", model), Layers) else model(input_ids=ids, labels=ids).loss
    return found


def batches(step: int, rank: int, micro: int, world: int) -> torch.Tensor:
    """The ids of one micro-batch of a rank."""
    number = (step * 2 + micro) * world + rank
    return torch.randint(0, WORDS, (2, 8), generator=torch.Generator().manual_seed(number))


def train_plain(family: str, world: int, steps: int) -> tuple[list[list[float]], list[float], dict[str, torch.Tensor]]:
    """Losses by rank, norms, and the weights afterwards."""
    model = build(family, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses: list[list[float]] = [[] for _ in range(world)]
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            for rank in range(world):
                loss = loss_of(model, batches(step, rank, micro, world))
                (loss / (2 * world)).backward()
                losses[rank].append(float(loss))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return losses, norms, {name: value.detach() for name, value in model.state_dict().items()}
