"""The scores of the E2E challenge as an `evaluate.Metric`, which loads nothing from a network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .scores import SCORES, References, check_sentences, e2e_scores

_DESCRIPTION = """
BLEU and NIST of mteval-v13a, METEOR 1.5, and ROUGE-L and CIDEr of the scorer of image captions, as the E2E challenge
computes them: in lower case, over all references of a meaning representation.
"""
_INPUTS = """
Args:
    predictions (list of str): One sentence for each meaning representation.
    references (list of lists of str): All its references; None stands for no reference.
    tokenizer (str, optional): ptb-java or ptb-python, for ROUGE-L and CIDEr; default: the first where there is Java.
Returns:
    bleu, nist, meteor (None without Java), rouge_l, cider and tokenizer.
"""
_CITATION = """
@inproceedings{novikova2017e2e,
  title={The {E2E} Dataset: New Challenges for End-to-End Generation},
  author={Novikova, Jekaterina and Du{\\v{s}}ek, Ond{\\v{r}}ej and Rieser, Verena},
  booktitle={Proceedings of SIGDIAL},
  year={2017}
}
"""


class E2ENLG(evaluate.Metric):  # type: ignore[misc]
    """Scores generated sentences as the E2E challenge does.

    METEOR needs Java and `pip install hf-sl2o[e2e]`. Without them it is None, and a warning says what is missing.

    Args:
        config_name (`str`, *optional*): One of `bleu`, `nist`, `meteor`, `rouge_l`, `cider`, for this one alone;
            default: all five.
        **kwargs: As for any `evaluate.Metric`.

    Raises:
        `ValueError`: an unknown score; in `compute`, `add_batch` and `add` what [`bleu`] refuses.
        `TypeError`: something else than text.

    Example:

    ```python
    >>> from hf_sl2o.metrics import E2ENLG
    >>> metric = E2ENLG("bleu")
    >>> metric.add(prediction="The Mill is a pub.", reference=["The Mill is a cheap pub.", "The Mill is a pub."])
    >>> metric.compute()["bleu"]
    1.0

    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", *SCORES):
            raise ValueError(
                f"the score is {self.config_name!r}, expected one of {', '.join(SCORES)}, or none for all"
            )
        texts = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": texts}),
            reference_urls=["https://github.com/tuetschek/e2e-metrics"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds sentences with their references; one that is refused adds nothing."""
        check_sentences(predictions, references)  # evaluate looks at the first one alone, and makes text of the others
        evaluate.Metric.add_batch(self, predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one sentence with its references."""
        check_sentences([prediction], [reference])
        evaluate.Metric.add(self, prediction=prediction, reference=reference, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Returns the scores of what was added and is given here, and forgets it."""
        if predictions is None and references is None and not self.writer:
            raise ValueError("nothing was added; give compute predictions and references, or add them before")
        found: dict[str, Any] | None = evaluate.Metric.compute(
            self, predictions=predictions, references=references, **kwargs
        )
        return found

    def _compute(self, predictions: list[str], references: References, tokenizer: str | None = None) -> dict[str, Any]:
        only = SCORES if self.config_name == "default" else (self.config_name,)
        return e2e_scores(predictions, references, tokenizer=tokenizer, only=only)
