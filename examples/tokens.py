"""A tokenizer made of one's own texts. In a script of your own, `AutoTokenizer.from_pretrained` stands here."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATES = {
    "gpt": None,
    "bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    "t5": ("$A </s>", "$A </s> $B </s>"),
}
"""What stands around one text and around two, as models of this kind expect it."""


def make_tokenizer(texts: Iterable[str], size: int, kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens: every text has tokens, and the texts come back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if template := TEMPLATES[kind]:
        named = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template[0], pair=template[1], special_tokens=named
        )
    extra = {"cls_token": "<s>", "sep_token": "</s>"} if kind == "bert" else {}
    # Cleaning up would take spaces away that were in the text.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL, **extra, clean_up_tokenization_spaces=False, padding_side="right"
    )
