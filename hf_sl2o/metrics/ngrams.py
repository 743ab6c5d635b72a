"""BLEU and NIST as mteval-v13a counts them: of all sentences together, in lower case, with several references each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

# A prediction of two thirds of the references' length has half of the NIST score.
_BETA = math.log(0.5) / math.log(1.5) ** 2


def grams(words: Words, n: int) -> Grams:
    """Counts the runs of n words."""
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def hits(prediction: Words, references: Sequence[Words], n: int) -> Grams:
    """Which runs of n words a prediction shares with a reference, each at most as often as it is in one of them."""
    most: Grams = Counter()
    for reference in references:
        most |= grams(reference, n)
    return grams(prediction, n) & most


def bleu_of_words(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """BLEU-4 of sentences that were cut into words, from 0 to 1.

    The geometric mean of the four precisions, times exp(1 - r / c) where the predictions' length c is below r, the sum
    of the lengths of the closest references (of two that are as close, the shorter). It is 0 where no run of four
    words is shared at all, without smoothing.
    """
    length = sum(map(len, predictions))
    closest = sum(
        min(map(len, of), key=lambda size: (abs(size - len(prediction)), size))  # noqa: B023
        for prediction, of in zip(predictions, references, strict=True)
    )
    logs = 0.0
    for n in range(1, 5):
        shared = sum(hits(*pair, n).total() for pair in zip(predictions, references, strict=True))
        if not shared:
            return 0.0
        logs += math.log(shared / sum(max(len(prediction) - n + 1, 0) for prediction in predictions)) / 4
    return math.exp(logs + min(0.0, 1 - closest / length))


def nist_of_words(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """NIST-5 of sentences that were cut into words; it has no upper end, and depends on all references together.

    The sum over n of the information of shared runs, log2(count of the first n - 1 words / count of all n), over the
    number of runs that the predictions have; times a penalty for predictions shorter than the mean reference.
    """
    counts: Grams = Counter()
    for of in references:
        for reference in of:
            counts[()] += len(reference)
            for n in range(1, 6):
                counts.update(grams(reference, n))
    total = 0.0
    for n in range(1, 6):
        made = sum(max(len(prediction) - n + 1, 0) for prediction in predictions)
        information = sum(
            number * math.log2(counts[gram[:-1]] / counts[gram])
            for pair in zip(predictions, references, strict=True)
            for gram, number in hits(*pair, n).items()
        )
        total += information / made if made else 0.0
    length = sum(map(len, predictions))
    expected = sum(sum(map(len, of)) / len(of) for of in references)
    if not length or not expected:
        return 0.0
    return total * math.exp(_BETA * min(0.0, math.log(length / expected)) ** 2)
