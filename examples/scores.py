"""How near texts are to what they should be, from 0 to 1. In a script of your own, `evaluate.load` stands here."""

from __future__ import annotations

import math
from collections import Counter


def word_f1(said: str, expected: str) -> float:
    """Of the words that two texts have in common (SQuAD's, without its clearing of punctuation)."""
    a, b = said.lower().split(), expected.lower().split()
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b)) if a or b else 1.0


def rouge_l(said: str, expected: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004)."""
    a, b = said.lower().split(), expected.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        above = row[:]
        for at, other in enumerate(b):
            row[at + 1] = above[at] + 1 if word == other else max(above[at + 1], row[at])
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def bleu(said: list[str], expected: list[str]) -> float:
    """BLEU of one to four words over all texts (Papineni et al., 2002)."""
    hits, counts, lengths = [0] * 4, [0] * 4, [0, 0]
    for ours, theirs in zip(said, expected, strict=True):
        a, b = ours.split(), theirs.split()
        lengths = [lengths[0] + len(a), lengths[1] + len(b)]
        for size in range(1, 5):
            grams, known = (Counter(zip(*(words[at:] for at in range(size)), strict=False)) for words in (a, b))
            hits[size - 1] += (grams & known).total()
            counts[size - 1] += grams.total()
    if min(hits) == 0:
        return 0.0
    mean = sum(math.log(hit / count) for hit, count in zip(hits, counts, strict=True)) / 4
    return math.exp(min(0.0, 1 - lengths[1] / lengths[0]) + mean)
