"""The five scores of the E2E challenge as functions of sentences: BLEU, NIST, METEOR, ROUGE-L and CIDEr."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .captions import cider_of_words, rouge_l_of_words
from .java import meteor_of_words, missing, stanford_words
from .ngrams import bleu_of_words, nist_of_words
from .words import mteval_words, ptb_words

#: In the order of the official scorer's output.
SCORES = ("bleu", "nist", "meteor", "rouge_l", "cider")
#: Who cuts sentences into words for ROUGE-L and CIDEr: Stanford's program, or nearly the same rules in Python.
TOKENIZERS = ("ptb-java", "ptb-python")

References = Sequence[Sequence[str | None]]
Cut = Callable[[Sequence[str]], list[list[str]]]


class NoMeteorWarning(UserWarning):
    """METEOR is None, and why."""


def default_tokenizer() -> str:
    """`"ptb-java"` where Java and pycocoevalcap are there, else `"ptb-python"`."""
    return TOKENIZERS[0] if missing() is None else TOKENIZERS[1]


def bleu(predictions: Sequence[str], references: References) -> float:
    """BLEU-4 of mteval-v13a, in lower case, from 0 to 1.

    Args:
        predictions (`Sequence[str]`): One sentence for each meaning; "" counts as no words.
        references (`Sequence[Sequence[str]]`): The references of each, any number; None stands for no reference.

    Raises:
        `ValueError`: no predictions; not as many lists of references; a list with no reference, or an empty one.
        `TypeError`: something else than text.

    Example:

    ```python
    >>> from hf_sl2o.metrics import bleu
    >>> round(bleu(["The Mill is a cheap pub."], [["The Mill is a pub.", "The Mill is a cheap place."]]), 4)
    0.7071

    ```
    """
    return bleu_of_words(*_cut(predictions, references, _mteval))


def nist(predictions: Sequence[str], references: References) -> float:
    """NIST-5 of mteval-v13a, in lower case; it has no upper end. Arguments and errors are those of [`bleu`].

    Example:

    ```python
    >>> from hf_sl2o.metrics import nist
    >>> round(nist(["The Mill is a cheap pub."], [["The Mill is a pub.", "The Mill is a cheap place."]]), 4)
    3.9362

    ```
    """
    return nist_of_words(*_cut(predictions, references, _mteval))


def rouge_l(predictions: Sequence[str], references: References, tokenizer: str | None = None) -> float:
    """ROUGE-L of the scorer of image captions, from 0 to 1.

    Args:
        predictions, references: As in [`bleu`].
        tokenizer (`str`, *optional*): `"ptb-java"` or `"ptb-python"`; by default [`default_tokenizer`].

    Raises:
        `ValueError`, `TypeError`: as in [`bleu`]; an unknown tokenizer.
        `RuntimeError`: `"ptb-java"`, and no Java.

    Example:

    ```python
    >>> from hf_sl2o.metrics import rouge_l
    >>> round(rouge_l(["The Mill is a pub."], [["The Mill is a cheap pub."]], tokenizer="ptb-python"), 4)
    0.8944

    ```
    """
    return rouge_l_of_words(*_cut(predictions, references, _of_name(tokenizer)))


def cider(predictions: Sequence[str], references: References, tokenizer: str | None = None) -> float:
    """CIDEr of the scorer of image captions, from 0 to 10; 0 for one prediction alone. As [`rouge_l`] otherwise.

    Example:

    ```python
    >>> from hf_sl2o.metrics import cider
    >>> references = [["The Mill is a cheap pub."], ["Cotto serves French food."]]
    >>> round(cider(["The Mill is a pub.", "Cotto is French."], references, tokenizer="ptb-python"), 4)
    3.879

    ```
    """
    return cider_of_words(*_cut(predictions, references, _of_name(tokenizer)))


def meteor(predictions: Sequence[str], references: References) -> float:
    """METEOR 1.5 of its own Java program, from 0 to 1, with Stanford's words. Arguments and errors as in [`bleu`].

    Raises:
        `RuntimeError`: there is no Java, or no pycocoevalcap; other programs of that name count something else.

    Example:

    ```python
    >>> from hf_sl2o.metrics import meteor
    >>> score = meteor(["The Mill is a pub."], [["The Mill is a cheap pub."]])  # doctest: +SKIP

    ```
    """
    return meteor_of_words(*_cut(predictions, references, stanford_words))


def e2e_scores(
    predictions: Sequence[str], references: References, *, tokenizer: str | None = None, only: Sequence[str] = SCORES
) -> dict[str, Any]:
    """All scores of the E2E challenge.

    METEOR is None where it cannot be had, and a [`NoMeteorWarning`] says why.

    Args:
        predictions, references, tokenizer: As in [`rouge_l`]. METEOR has Stanford's words whatever `tokenizer` is.
        only (`Sequence[str]`, *optional*): Some of `bleu`, `nist`, `meteor`, `rouge_l`, `cider`.

    Returns:
        The scores by name, and with ROUGE-L or CIDEr the `tokenizer` that they were counted with.

    Raises:
        `ValueError`, `TypeError`, `RuntimeError`: as in [`rouge_l`]; an unknown score.

    Example:

    ```python
    >>> from hf_sl2o.metrics import e2e_scores
    >>> e2e_scores(["A pub."], [["A pub.", "The pub."]], only=["rouge_l"], tokenizer="ptb-python")
    {'rouge_l': 1.0, 'tokenizer': 'ptb-python'}

    ```
    """
    if isinstance(only, str):
        raise TypeError(f"only is {only!r}, expected a list of scores, such as [{only!r}]")
    if unknown := [name for name in only if name not in SCORES]:
        raise ValueError(f"there is no score {unknown[0]!r}, expected any of {', '.join(SCORES)}")
    tokenizer = default_tokenizer() if tokenizer is None else tokenizer
    treebank = _of_name(tokenizer)
    ways: dict[str, tuple[Callable[..., float], Cut]] = {
        "bleu": (bleu_of_words, _mteval),
        "nist": (nist_of_words, _mteval),
        "meteor": (meteor_of_words, stanford_words),
        "rouge_l": (rouge_l_of_words, treebank),
        "cider": (cider_of_words, treebank),
    }
    words: dict[Cut, Any] = {}
    found: dict[str, Any] = {}
    for name in (name for name in SCORES if name in only):
        count, cut = ways[name]
        if name == "meteor" and (lacks := missing()) is not None:
            check_sentences(predictions, references)
            warnings.warn(f"METEOR is None: {lacks}", NoMeteorWarning, stacklevel=2)
            found[name] = None
            continue
        if cut not in words:
            words[cut] = _cut(predictions, references, cut)
        found[name] = count(*words[cut])
    return {**found, "tokenizer": tokenizer} if {"rouge_l", "cider"} & found.keys() else found


def check_sentences(predictions: Sequence[str], references: References) -> list[list[str]]:
    """Returns the references of each prediction without None; raises as [`bleu`] says."""
    for name, rows in (("predictions", predictions), ("references", references)):
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise TypeError(f"{name} is a {type(rows).__name__}, expected a list")
    if not predictions:
        raise ValueError("there are no predictions, expected at least one")
    if len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(references)} lists of references, expected one list "
            "for each prediction"
        )
    kept: list[list[str]] = []
    for row, (prediction, of) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise TypeError(f"predictions[{row}] is a {type(prediction).__name__}, expected text")
        if isinstance(of, str) or not isinstance(of, Sequence):
            raise TypeError(
                f"references[{row}] is a {type(of).__name__}, expected a list of all references of prediction {row}"
            )
        for place, reference in enumerate(of):
            if reference is not None and not isinstance(reference, str):
                raise TypeError(f"references[{row}][{place}] is a {type(reference).__name__}, expected text")
            if reference is not None and not reference.strip():
                raise ValueError(
                    f"references[{row}][{place}] is empty, and would count as a reference of no words; leave it out, "
                    "or put None in its place"
                )
        kept.append([reference for reference in of if reference is not None])
        if not kept[-1]:
            raise ValueError(f"references[{row}] has no reference, expected at least one for each prediction")
    return kept


def _mteval(texts: Sequence[str]) -> list[list[str]]:
    return list(map(mteval_words, texts))


def _treebank(texts: Sequence[str]) -> list[list[str]]:
    return list(map(ptb_words, texts))


def _of_name(tokenizer: str | None) -> Cut:
    tokenizer = default_tokenizer() if tokenizer is None else tokenizer
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer is {tokenizer!r}, expected one of {', '.join(TOKENIZERS)}")
    return stanford_words if tokenizer == TOKENIZERS[0] else _treebank


def _cut(
    predictions: Sequence[str], references: References, cut: Cut
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Cuts all sentences at once: a Java program takes a second to start."""
    kept = check_sentences(predictions, references)
    words = iter(cut([*predictions, *(reference for of in kept for reference in of)]))
    return [next(words) for _ in predictions], [[next(words) for _ in of] for of in kept]
