"""Teaches a BERT to answer questions by pointing at the answer in a text: what a function returns, and what it raises.

    zeroxide run examples/question_answering.py --deepspeed examples/ds_config_zero2_cpu.json
    zeroxide run examples/question_answering.py --deepspeed examples/ds_config_zero3_nvme.json --model bert-base-uncased

The texts are the standard library's docstrings; the answers are the sentences in them that begin with "Return" or have
"raise" in them. Texts that are longer than --length are looked at through windows that overlap. Scored are exact
matches and the F1 of words, as in SQuAD. Without --model it begins with random weights and a tokenizer of its own.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from own_models import config_of
from scores import word_f1
from texts import documented
from tokens import make_tokenizer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

KINDS = {
    "What does {} return?": re.compile(r"\bReturns? [^.]{5,80}\."),
    "When does {} raise an error?": re.compile(r"\b[A-Z][^.]{0,60}\braised? [^.]{5,60}\."),
}


def questions(packages: list[str]) -> Dataset:
    """Questions, texts, and where in the text the answer begins and ends."""
    rows: dict[str, list] = {"question": [], "text": [], "first": [], "end": []}
    # Some functions say the same: what is trained on must not be held out.
    known = {each.docstring: each.name for package in packages for each in documented(package)}
    for text, name in known.items():
        for words, pattern in KINDS.items():
            answer = pattern.search(text)
            # Where the answer is nearly all of the text there is nothing to find.
            if answer and 3 * len(answer[0]) < 2 * len(text):
                for key, value in zip(rows, (words.format(name), text, *answer.span()), strict=True):
                    rows[key].append(value)
    return Dataset.from_dict(rows)


def windows(part: dict, tokenizer: AutoTokenizer, length: int, stride: int) -> dict:
    """Each question with each window of its text. An answer that is not in a window as a
    whole is at its first token there."""
    found = tokenizer(
        part["question"],
        part["text"],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    found["row"] = [part["row"][each] for each in found.pop("overflow_to_sample_mapping")]
    found["start_positions"], found["end_positions"] = [], []
    for window, row in enumerate(found["row"]):
        at = part["row"].index(row)
        places = found["offset_mapping"][window]
        inside = [each for each, second in enumerate(found.sequence_ids(window)) if second == 1]
        # What is not of the text cannot be pointed at.
        found["offset_mapping"][window] = [place if each in {*inside} else [0, 0] for each, place in enumerate(places)]
        covered = [each for each in inside if places[each][1] > part["first"][at] and places[each][0] < part["end"][at]]
        whole = covered and places[inside[0]][0] <= part["first"][at] and places[inside[-1]][1] >= part["end"][at]
        found["start_positions"].append(covered[0] if whole else 0)
        found["end_positions"].append(covered[-1] if whole else 0)
    return dict(found)


def answers(data: Dataset, seen: Dataset, starts: np.ndarray, ends: np.ndarray, tokens: int = 40) -> list[str]:
    """The text of each question between the two tokens of one window that are together the likeliest."""
    best = [(-np.inf, "")] * len(data)
    texts = data["text"]
    for row, places, first, last in zip(seen["row"], seen["offset_mapping"], starts, ends, strict=True):
        for start in np.argsort(first)[-10:]:
            for end in np.argsort(last)[-10:]:
                if start <= end < start + tokens and places[start][1] and places[end][1]:
                    found = (first[start] + last[end], texts[row][places[start][0] : places[end][1]].strip())
                    best[row] = max(best[row], found)
    return [text for _, text in best]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder, or a name of the hub's; random weights if none is given")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--packages", nargs="+", default=[""], help="packages of the standard library; all of it")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128, help="tokens of a question and a window of its text")
    parser.add_argument("--stride", type=int, default=48, help="tokens that two windows have in common")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/question_answering"))
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
        logging_strategy="epoch",
        save_strategy="no",
        seed=0,
        report_to=[],
    )
    data = questions(args.packages).train_test_split(test_size=0.2, seed=0)
    for name in data:
        data[name] = data[name].add_column("row", list(range(len(data[name]))))
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForQuestionAnswering.from_pretrained(args.model)
    else:
        tokenizer = make_tokenizer([*data["train"]["text"], *data["train"]["question"]], args.vocabulary, "bert")
        config = config_of("bert", tokenizer, args.width, args.layers, args.length)
        model = AutoModelForQuestionAnswering.from_config(config)
    longest = max(len(ids) for part in data.values() for ids in tokenizer(list(part["question"]))["input_ids"])
    if longest + 1 + args.stride >= args.length:
        raise SystemExit(f"--length {args.length}: a question has {longest} tokens, and windows share {args.stride}")
    seen = {
        name: part.map(
            windows,
            batched=True,
            remove_columns=part.column_names,
            fn_kwargs={"tokenizer": tokenizer, "length": args.length, "stride": args.stride},
        )
        for name, part in data.items()
    }
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=seen["train"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    starts, ends = trainer.predict(seen["test"]).predictions
    said = answers(data["test"], seen["test"], starts, ends)
    expected = [row["text"][row["first"] : row["end"]] for row in data["test"]]
    trainer.save_model(str(args.out / "model"))
    if trainer.is_world_process_zero():
        exact = np.mean([a == b for a, b in zip(said, expected, strict=True)])
        score = np.mean([word_f1(*each) for each in zip(said, expected, strict=True)])
        chance = np.mean([word_f1(row["text"], answer) for row, answer in zip(data["test"], expected, strict=True)])
        print(
            f"held out: exact {exact:.4f}, F1 {score:.4f} of {len(said)} questions in {len(starts)} windows; "
            f"F1 of whole texts {chance:.4f}"
        )


if __name__ == "__main__":
    main()
