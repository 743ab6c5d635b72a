"""Sentences to words as the scorers of the E2E challenge do it: by the rules of mteval and those of the Treebank."""

from __future__ import annotations

import re
from collections.abc import Iterable

# mteval-v13a, in its order: what is a word of its own, and periods, commas and dashes beside digits.
_MTEVAL = (
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}

# What the scorer of captions leaves out after the tokenizer. Its list has brackets in capitals, and so they stay.
_PUNCTUATION = frozenset(["''", "'", "``", "`", '"', "?", "!", ",", ":", "-", "--", ";"])
_ABBREVIATIONS = r"""
    (?:[mdj]r|mrs|ms|st|prof|rev|ave|rd|blvd|etc|inc|ltd|co|vs|approx|no(?=\.\s*\d))\.
    | (?:[a-z]\.)+(?=[a-z])[a-z]\.? | (?:[a-z]\.){2,}
"""
# A word of the Treebank: the first alternative that fits is taken, from left to right.
_TREEBANK = re.compile(
    rf"""
    (?:https?://|www\.)[^\s<>"]*[\w/]        # an address
    | [\w.+-]+@[\w-]+\.\w+                   # of mail
    | can(?=not\b) | gon(?=na\b) | got(?=ta\b) | wan(?=na\b) | gim(?=me\b) | lem(?=me\b)
    | (?<!\w)'t(?=is\b|was\b)                # 'tis
    | \b(?:{_ABBREVIATIONS})(?!\w)
    | \w+?(?=n't\b) | n't\b
    | '(?:s|m|d|ll|re|ve)\b
    | \d{{1,2}}(?:[.:]\d\d)?(?=[ap]\.?m\b)   # 10.30am
    | (?<![\w)])[-+](?=\d)\d+(?:[.,:/]\d+)*  # a number with its sign
    | \d+(?:[-.,:/]\d+)*(?!-?\w)            # a number, a range
    | (?:[dlo]')?\w+(?:[-./&](?:[dlo]')?\w+)*(?:(?<!\d)\.(?=,))?
    | \.(?:\ ?\.){{2,}} | -{{2,}} | [?!]{{2,}}
    | \S
    """,
    re.VERBOSE,
)
_AS_WRITTEN = {
    "£": "#", "€": "$", "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "…": "...", "–": "--", "—": "--", "“": "``", "”": "''", "‘": "`",
}  # fmt: skip


def kept_words(words: Iterable[str]) -> list[str]:
    """Returns the words without those that are punctuation."""
    return [word for word in words if word.strip(". ") and word not in _PUNCTUATION]


def one_line(text: str) -> str:
    """Returns the text with single blanks for all white space; some tokenizers begin a line at other signs, too."""
    return " ".join(text.split())


def mteval_words(text: str) -> list[str]:
    """Returns the words of a sentence in lower case by the rules of mteval-v13a, which BLEU and NIST are counted on.

    Example:

    ```python
    >>> from hf_sl2o.metrics.words import mteval_words
    >>> mteval_words("The Eagle's food is family-friendly, from £20-25.")
    ['the', "eagle's", 'food', 'is', 'family-friendly', ',', 'from', '£20', '-', '25', '.']

    ```
    """
    text = text.replace("<skipped>", "").replace("-\n", "")
    for entity, sign in _ENTITIES.items():
        text = text.replace(entity, sign)
    text = f" {one_line(text)} "
    for pattern, replacement in _MTEVAL:
        text = pattern.sub(replacement, text)
    return text.lower().split()


def ptb_words(text: str) -> list[str]:
    """Returns the words of a sentence in lower case without punctuation, nearly as Stanford's PTBTokenizer has them.

    As there, the pound sign becomes "#" and a question mark goes.

    Example:

    ```python
    >>> from hf_sl2o.metrics.words import ptb_words
    >>> ptb_words("The Eagle's food isn't family-friendly, from £20-25.")
    ['the', 'eagle', "'s", 'food', 'is', "n't", 'family-friendly', 'from', '#', '20-25']

    ```
    """
    words = _TREEBANK.findall(one_line(text).lower().replace("’", "'"))
    return kept_words(_AS_WRITTEN.get(word, word) for word in words)
