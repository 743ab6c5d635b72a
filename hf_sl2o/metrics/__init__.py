"""Scores of generated text, without a network: BLEU, NIST, METEOR, ROUGE-L and CIDEr as the E2E challenge has them.

- `e2e`: all of them as an `evaluate.Metric`;  `scores`: as functions of sentences
- `ngrams`: BLEU and NIST of words;  `captions`: ROUGE-L and CIDEr of words
- `words`: sentences to words, in Python;  `java`: the official tokenizer and METEOR, where there is Java

It may import nothing of this package but `foundation`; `evaluate` and `datasets` in `e2e` alone.
"""

from typing import TYPE_CHECKING, Any

from .scores import NoMeteorWarning, bleu, cider, default_tokenizer, e2e_scores, meteor, nist, rouge_l

if TYPE_CHECKING:
    from .e2e import E2ENLG

__all__ = [
    "E2ENLG",
    "NoMeteorWarning",
    "bleu",
    "cider",
    "default_tokenizer",
    "e2e_scores",
    "meteor",
    "nist",
    "rouge_l",
]


def __getattr__(name: str) -> Any:  # the functions need neither evaluate nor datasets
    if name != "E2ENLG":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .e2e import E2ENLG

    return E2ENLG
