"""ROUGE-L and CIDEr as the scorer of image captions counts them: a mean over predictions, each with its references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .ngrams import Grams, Words, grams

_BETA = 1.2  # how much more recall weighs than precision
_SIGMA = 6.0  # of the Gaussian over differences in length, in words


def longest_common(first: Words, second: Words) -> int:
    """How many words the longest sequence has that both contain in this order, with gaps."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, start=1):
            diagonal, before = before, lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(lengths[place], lengths[place - 1])
    return lengths[-1]


def rouge_l_of_words(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """ROUGE-L of sentences that were cut into words, from 0 to 1.

    Precision and recall are each those of the best reference, which may be two different ones.
    """
    total = 0.0
    for prediction, of in zip(predictions, references, strict=True):
        common = [longest_common(prediction, reference) for reference in of]
        precision = max(common) / max(len(prediction), 1)
        recall = max(size / max(len(reference), 1) for size, reference in zip(common, of, strict=True))
        if precision and recall:
            total += (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return total / len(predictions)


def cider_of_words(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr (CIDEr-D, as is usual) of sentences that were cut into words, from 0 to 10.

    Runs of one to four words are weighed by how few predictions have them in their references. So it depends on all
    references together, and is 0 where there is one prediction alone.
    """
    rows = len(predictions)
    groups: Grams = Counter()  # in how many rows a run is
    for of in references:
        groups.update({gram for reference in of for n in range(1, 5) for gram in grams(reference, n)})

    def vector(words: Words, n: int) -> dict[tuple[str, ...], float]:
        return {gram: count * math.log(rows / max(groups[gram], 1)) for gram, count in grams(words, n).items()}

    def norm(weights: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(weight**2 for weight in weights.values()))

    total = 0.0
    for prediction, of in zip(predictions, references, strict=True):
        own = [vector(prediction, n) for n in range(1, 5)]
        norms = list(map(norm, own))
        for reference in of:
            # The length is that in pairs of words.
            apart = max(len(prediction) - 1, 0) - max(len(reference) - 1, 0)
            near = math.exp(-(apart**2) / (2 * _SIGMA**2))
            for n in range(1, 5):
                other = vector(reference, n)
                scale = norms[n - 1] * norm(other)
                if scale:
                    shared = sum(
                        min(weight, other[gram]) * other[gram] for gram, weight in own[n - 1].items() if gram in other
                    )
                    total += 10 * near * shared / scale / 4 / len(of)
    return total / rows
