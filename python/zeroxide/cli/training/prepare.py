"""Text to tokens, as a program of its own: the memory it takes is given back before training starts.

It is run by path, so that neither zeroxide nor torch is imported here, with one JSON object on its standard input:

    documents   [{"path", "held_out"}, ...] in order
    tokenizer   directory with a tokenizer of its own, or null: train a byte-level BPE on the documents
    vocabulary  size of that BPE at most
    out         folder to write `tokenizer/`, `train.bin`, `held_out.bin` and `tokens.json` into

A `.bin` file is a plain little-endian array of token numbers, uint16 where the vocabulary fits and uint32 where not,
with an end-of-text token after every document. Each line of the standard output is one JSON object: `{"stage": ...}`
as work goes on, `{"error": ...}` where the input is at fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

END_OF_TEXT = "<|endoftext|>"
_CHUNK_CHARACTERS = 1 << 18
_BATCH = 16
_HELD_OUT_SHARE = 50  # of a single document, one token in so many


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _chunks(path: str) -> Iterator[str]:
    """Yield the text of one file in pieces that end at line ends, so that no token spans two of them."""
    rest = ""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        while block := file.read(_CHUNK_CHARACTERS):
            text = rest + block
            cut = text.rfind("\n") + 1
            if cut == 0 and len(text) < 16 * _CHUNK_CHARACTERS:
                rest = text
                continue
            cut = cut or len(text)
            rest = text[cut:]
            yield text[:cut]
    if rest:
        yield rest


def _train(documents: list[dict[str, Any]], vocabulary: int, out: Path) -> None:
    """Train a byte-level BPE on the training documents and write it as `transformers` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (chunk for document in documents if not document["held_out"] for chunk in _chunks(document["path"]))
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    ).save_pretrained(out)


def _convert(directory: str, out: Path) -> int | None:
    """Write the tokenizer of a model directory in its fast form and return its end-of-text token, if it has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {directory} has no fast form (tokenizer.json)")
    tokenizer.save_pretrained(out)
    end: int | None = tokenizer.eos_token_id
    return end


class _Sink:
    """One token file and the hash of what was written to it."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._dtype = dtype
        self.count = 0

    def write(self, tokens: Any) -> None:
        data = tokens.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.count += len(tokens)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"count": self.count, "sha256": self._hash.hexdigest()}


def _encode(documents: list[dict[str, Any]], tokenizer: Any, end: int | None, out: Path) -> dict[str, Any]:
    import numpy

    # Text that merely spells a special token is text: only this program puts real ones into the stream.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    dtype = numpy.dtype("<u2" if size <= 1 << 16 else "<u4")
    sinks = {name: _Sink(out / f"{name}.bin", dtype) for name in ("train", "held_out")}
    single = len(documents) == 1
    whole: list[Any] = []
    for document in documents:
        sink = sinks["held_out" if document["held_out"] else "train"]
        batch: list[str] = []

        def flush(batch: list[str], sink: _Sink) -> None:
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                tokens = numpy.asarray(encoding.ids, dtype=dtype)
                if single:
                    whole.append(tokens)
                else:
                    sink.write(tokens)
            batch.clear()

        for chunk in _chunks(document["path"]):
            batch.append(chunk)
            if len(batch) == _BATCH:
                flush(batch, sink)
        flush(batch, sink)
        if end is not None and not single:
            sink.write(numpy.asarray([end], dtype=dtype))
    if single and whole:
        tokens = numpy.concatenate(whole)
        kept = len(tokens) - len(tokens) // _HELD_OUT_SHARE
        sinks["train"].write(tokens[:kept])
        sinks["held_out"].write(tokens[kept:])
    return {"dtype": dtype.str, "vocabulary": size, **{name: sink.close() for name, sink in sinks.items()}}


def _prepare(request: dict[str, Any]) -> None:
    out = Path(request["out"])
    documents = request["documents"]
    if request["tokenizer"] is None:
        _say(stage="training a byte-level BPE tokenizer")
        _train(documents, request["vocabulary"], out / "tokenizer")
        end: int | None = 0
    else:
        end = _convert(request["tokenizer"], out / "tokenizer")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    _say(stage="encoding the corpus")
    tokens = _encode(documents, tokenizer, end, out)
    (out / "tokens.json").write_text(json.dumps({**tokens, "end_of_text": end}, indent=1), encoding="utf-8")


def _main() -> int:
    try:
        _prepare(json.load(sys.stdin))
    except MemoryError:
        _say(error="not enough memory to encode the corpus")
    except (OSError, ValueError, ImportError) as error:
        _say(error=" ".join(f"{error}".split()) or type(error).__name__)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(_main())
