"""Teaches a BERT to tell which package a text is about, as one would teach it to tell good reviews of films from bad.

    zeroxide run examples/classify.py --deepspeed examples/ds_config_zero2_cpu.json
    zeroxide run examples/classify.py --deepspeed examples/ds_config_zero3_nvme.json --model bert-base-uncased

Without --model it begins with random weights and a tokenizer of its own. The texts are the standard library's
docstrings. Without --deepspeed it is Trainer alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from own_models import config_of
from texts import PACKAGES, documented
from tokens import make_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)


def labelled(packages: list[str]) -> Dataset:
    """As many docstrings of each package, with the package as the label."""
    found = [[each.docstring for each in documented(package)] for package in packages]
    # Some packages say the same of many functions: a text that is trained on must not be one that is held out.
    found = [list(dict.fromkeys(each)) for each in found]
    count = min(map(len, found))
    data = {
        "text": [text for each in found for text in each[:count]],
        "label": [label for label in range(len(packages)) for _ in range(count)],
    }
    return Dataset.from_dict(data).cast_column("label", ClassLabel(names=packages))


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(found.predictions, axis=-1) == found.label_ids).mean())}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder, or a name of the hub's; random weights if none is given")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="packages of the standard library")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text that are looked at")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/classify"))
    return parser.parse_args()


def main() -> None:
    args = options()
    set_seed(0)
    arguments = TrainingArguments(
        str(args.out),
        deepspeed=args.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=64,
        num_train_epochs=args.epochs,
        learning_rate=args.rate,
        warmup_steps=10,
        weight_decay=0.01,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        seed=0,
        report_to=[],
    )
    data = labelled(args.packages).train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
    names = dict(enumerate(args.packages))
    labels = {"num_labels": len(names), "id2label": names, "label2id": {name: at for at, name in names.items()}}
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSequenceClassification.from_pretrained(args.model, **labels)
    else:
        tokenizer = make_tokenizer(data["train"]["text"], args.vocabulary, "bert")
        config = config_of("bert", tokenizer, args.width, args.layers, args.length, **labels)
        model = AutoModelForSequenceClassification.from_config(config)
    tokens = data.map(
        lambda part: tokenizer(part["text"], truncation=True, max_length=args.length),
        batched=True,
        remove_columns=["text"],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokens["train"],
        eval_dataset=tokens["test"],
        # Pads each batch to its own longest text.
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model(str(args.out / "model"))
    if trainer.is_world_process_zero():
        chance = 1 / len(names)
        print(f"held out: accuracy {found['eval_accuracy']:.4f} of {len(data['test'])} texts, by chance {chance:.4f}")


if __name__ == "__main__":
    main()
