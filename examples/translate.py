"""Teaches a T5 to translate what programs say to people, from the catalogues of translations that a package ships.

    zeroxide run examples/translate.py --deepspeed examples/ds_config_zero2_cpu.json
    zeroxide run examples/translate.py --deepspeed examples/ds_config_zero3_nvme.json --model t5-small --rate 1e-4

The catalogues are WTForms' (`pip install wtforms`), or those of --catalogues FOLDER, such as `conf/locale` of Django:
LANGUAGE/LC_MESSAGES/*.po. Without --model it begins with random weights, which is enough to learn what it is shown by
heart; other sentences need a model that has read more. Both are scored: with BLEU, and beside it what the same
translations score against those of other sentences.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from own_models import config_of
from scores import bleu
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


def sentences(catalogues: Path, languages: list[str]) -> Dataset:
    """English sentences with the language they are to be in, as T5 is asked, and their translations."""
    asked, said = [], []
    for language in languages:
        for path in sorted((catalogues / language / "LC_MESSAGES").glob("*.po")):
            # Each string is cut over lines as Python's are. What has a plural does not match.
            found = re.findall(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', path.read_text() + "\n", re.MULTILINE)
            for english, translation in ([ast.literal_eval(f"({each})") for each in pair] for pair in found):
                # Without English it is a note about the file, and what has not been translated is empty.
                if english and translation:
                    asked.append(f"translate English to {language}: {english}")
                    said.append(translation)
    return Dataset.from_dict({"asked": asked, "said": said})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder, or a name of the hub's; random weights if none is given")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--catalogues", type=Path, help="a folder; WTForms' if none is given")
    parser.add_argument("--languages", nargs="+", default=["de", "es", "fr", "it", "nl", "pt", "sv"])
    parser.add_argument("--held-out", type=float, default=0.1, help="which part of the sentences")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sentence at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/translate"))
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
        generation_max_length=args.length,
        seed=0,
        report_to=[],
    )
    catalogues = args.catalogues
    if catalogues is None:
        package = importlib.util.find_spec("wtforms")
        if package is None:
            raise SystemExit("no catalogues: install wtforms, or give --catalogues FOLDER")
        catalogues = Path(package.origin).parent / "locale"
    data = sentences(catalogues, args.languages).train_test_split(test_size=args.held_out, seed=0)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
    else:
        tokenizer = make_tokenizer([*data["train"]["asked"], *data["train"]["said"]], args.vocabulary, "t5")
        config = config_of("t5", tokenizer, args.width, args.layers, args.length)
        model = AutoModelForSeq2SeqLM.from_config(config)

    def to_tokens(part: dict) -> dict:
        given = tokenizer(part["asked"], truncation=True, max_length=args.length)
        wanted = tokenizer(text_target=part["said"], truncation=True, max_length=args.length)
        return {**given, "labels": wanted["input_ids"]}

    def scores(found: EvalPrediction) -> dict[str, float]:
        # Batches are padded with -100, which is no token.
        said, expected = (
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (found.predictions, found.label_ids)
        )
        return {"bleu": bleu(said, expected), "bleu_by_chance": bleu(said, expected[1:] + expected[:1])}

    tokenized = data.map(to_tokens, batched=True, remove_columns=["asked", "said"])
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
                f"{name}: loss {found['eval_loss']:.4f}, BLEU {found['eval_bleu']:.4f}, "
                f"against other sentences' {found['eval_bleu_by_chance']:.4f}"
            )
    trainer.save_model(str(args.out / "model"))


if __name__ == "__main__":
    main()
