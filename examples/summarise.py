"""Teaches a T5 to say in one sentence what a function does: its code goes in, the first sentence of its docstring out.

    zeroxide run examples/summarise.py --deepspeed examples/ds_config_zero2_cpu.json
    zeroxide run examples/summarise.py --deepspeed examples/ds_config_zero3_nvme.json --model t5-small --rate 1e-4

Without --model it begins with random weights and a tokenizer of its own, which is enough to learn what it is shown by
heart; sentences about functions that it has not seen need a model that has read more. So both are scored: with ROUGE-L,
and beside it what the same sentences score against those of other functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from own_models import config_of
from scores import rouge_l
from texts import PACKAGES, documented, first_sentence
from tokens import make_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder, or a name of the hub's; random weights if none is given")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="packages of the standard library")
    parser.add_argument("--functions", type=int, default=2000, help="so many at most")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128, help="tokens of a function that are looked at")
    parser.add_argument("--sentence", type=int, default=32, help="tokens of a sentence at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/summarise"))
    return parser.parse_args()


def main() -> None:
    args = options()
    set_seed(0)
    arguments = Seq2SeqTrainingArguments(
        str(args.out),
        deepspeed=args.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=64,
        num_train_epochs=args.epochs,
        learning_rate=args.rate,
        warmup_steps=10,
        logging_strategy="epoch",
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=args.sentence,
        seed=0,
        report_to=[],
    )
    found = [each for package in args.packages for each in documented(package) if each.body]
    pairs = {
        "code": [f"summarize: {each.heading}\n{each.body}" for each in found],
        "sentence": [first_sentence(each.docstring) for each in found],
    }
    data = Dataset.from_dict(pairs).shuffle(seed=0)
    data = data.select(range(min(len(data), args.functions))).train_test_split(test_size=args.held_out, seed=0)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
    else:
        tokenizer = make_tokenizer([*data["train"]["code"], *data["train"]["sentence"]], args.vocabulary, "t5")
        config = config_of("t5", tokenizer, args.width, args.layers, args.length)
        model = AutoModelForSeq2SeqLM.from_config(config)

    def to_tokens(part: dict) -> dict:
        given = tokenizer(part["code"], truncation=True, max_length=args.length)
        wanted = tokenizer(text_target=part["sentence"], truncation=True, max_length=args.sentence)
        return {**given, "labels": wanted["input_ids"]}

    def scores(found: EvalPrediction) -> dict[str, float]:
        # Batches are padded with -100, which is no token.
        said, expected = (
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (found.predictions, found.label_ids)
        )
        others = expected[1:] + expected[:1]
        return {
            "rouge_l": float(np.mean([rouge_l(*each) for each in zip(said, expected, strict=True)])),
            "rouge_l_by_chance": float(np.mean([rouge_l(*each) for each in zip(said, others, strict=True)])),
        }

    tokenized = data.map(to_tokens, batched=True, remove_columns=data["train"].column_names)
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=tokenized["train"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=scores,
    )
    trainer.train()
    seen = tokenized["train"].select(range(min(64, len(tokenized["train"]))))
    for name, part in (("seen", seen), ("held out", tokenized["test"])):
        found = trainer.evaluate(part)
        if trainer.is_world_process_zero():
            print(
                f"{name}: loss {found['eval_loss']:.4f}, ROUGE-L {found['eval_rouge_l']:.4f}, "
                f"against other functions' {found['eval_rouge_l_by_chance']:.4f}"
            )
    trainer.save_model(str(args.out / "model"))


if __name__ == "__main__":
    main()
