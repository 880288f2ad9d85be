"""Goes on with texts, from the folder of a model or of an adapter that one of the other examples has saved.

    python examples/generate.py --model runs/pretrain/model --prompt "def main(" "class Error("
    zeroxide run examples/generate.py --model runs/lora_sft/adapter --prompt "def close(self):" --offload nvme:/scratch

With --offload the weights are in host memory ("cpu") or on disk and come for each layer as it computes: a model may be
larger than the memory that computes. That is DeepSpeed's `init_inference`, which `zeroxide run` has under that name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(folder: str, dtype: str, offload: str) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A model that is ready to generate, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A folder with an adapter alone names its model, which is then loaded with it (PEFT).
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    if offload == "none":
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval(), tokenizer
    import deepspeed

    device, _, path = offload.partition(":")
    place = {"device": device, **({"nvme_path": path} if path else {})}
    return deepspeed.init_inference(model, dtype=dtype, zero={"stage": 3, "offload_param": place}), tokenizer


def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    seconds: float | None = None,
) -> str:
    """What follows the prompt: at most so many tokens, and begun within so many seconds. Temperature 0 takes the
    likeliest token each time."""
    torch.manual_seed(seed)
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        found = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=tokens,
            max_time=seconds,
            pad_token_id=tokenizer.pad_token_id,
            **how,
        )
    return tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/pretrain/model", help="a folder, or a name of the hub's")
    parser.add_argument("--prompt", nargs="+", default=["def main("])
    parser.add_argument("--tokens", type=int, default=64, help="so many at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--offload", default="none", help='"none", "cpu" or "nvme:DIRECTORY"')
    parser.add_argument("--out", type=Path, help="a file for the texts as JSON")
    args = parser.parse_args()
    model, tokenizer = load(args.model, args.dtype, args.offload)
    texts = [complete(model, tokenizer, each, args.tokens, args.temperature, args.seed) for each in args.prompt]
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}\n---")
    if args.out:
        args.out.write_text(json.dumps(texts))


if __name__ == "__main__":
    main()
