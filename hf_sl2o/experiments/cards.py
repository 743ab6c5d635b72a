"""What a comparison says for the model card of the rule that took part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..foundation.files import load_json
from .levels import meta_training_steps
from .table import table


def card_from_comparison(path: str | Path, arm: str = "sl2o", dataset: str | None = None) -> dict[str, Any]:
    """Returns `model_card_kwargs` for the rule of an arm: every number is one of the comparison's.

    The card belongs to the rule that took part: another one refuses it, where the file names the
    rule of each arm.

    The card says what the rule was trained on, how it was evaluated, the table of all arms, what was paid before the
    first step, and limits. The figure beside the file goes with it: `comparison.png` for `comparison.json`.

    Args:
        path (`str` or `Path`): A comparison.json.
        arm (`str`, *optional*, defaults to `"sl2o"`): Whose rule it is.
        dataset (`str`, *optional*): The data's id on the Hub; by default the results have the name in the comparison.

    Returns:
        `dict[str, Any]`: Texts and metadata for `save_pretrained` and `push_to_hub`; further entries, such as
        `license`, may be added.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it is no comparison, or the arm is not in it or has no learned rule.

    Example:

    ```python
    kwargs = card_from_comparison("out/comparison.json")
    rule.push_to_hub("user/my-rule", model_card_kwargs={**kwargs, "license": "apache-2.0"})
    ```
    """
    path = Path(path)
    comparison = load_json(path, dict)
    if missing := sorted({"recipe", "data", "runs", "steps_to", "amortised", "training", "n"} - set(comparison)):
        raise ValueError(f"{path} lacks {missing[0]!r}; give the comparison.json that a comparison wrote")
    learned = [name for name, run in comparison["runs"].items() if run["optim"] == "sl2o" and name != "symbolic"]
    if arm not in learned:
        raise ValueError(f"arm is {arm!r}, expected one of {path} with a learned rule: {', '.join(learned) or 'none'}")
    figure = path.with_suffix(".png")
    kwargs: dict[str, Any] = {
        "training": _training(comparison, arm),
        "evaluation": _evaluation(comparison, arm),
        "limits": _limits(comparison, arm),
        "eval_results": eval_results(comparison, arm, dataset),
        "model_name": f"SL2O rule ({arm})",
    }
    if "rule" in comparison["runs"][arm]:
        kwargs["fingerprint"] = comparison["runs"][arm]["rule"]
    if dataset is not None and _trained_here(comparison, arm):
        kwargs["datasets"] = [dataset]
    return {**kwargs, "figure": figure} if figure.is_file() else kwargs


def card_from_provenance(folder: str | Path) -> dict[str, Any]:
    """Returns `model_card_kwargs` that say what a rule was trained on, from the provenance.json in its folder.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it lacks the command or the tasks.

    Example:

    ```python
    >>> from hf_sl2o.experiments.cards import card_from_provenance
    >>> from hf_sl2o.rules import SHIPPED_RULES
    >>> print(card_from_provenance(SHIPPED_RULES / "paper-cnn")["training"].splitlines()[0])
    Meta-trained on digits-mlp, 31,000 training steps in all, with the command

    ```
    """
    path = Path(folder) / "provenance.json"
    known = load_json(path, dict)
    if missing := sorted({"command", "tasks"} - set(known)):
        raise ValueError(f"{path} lacks {missing[0]!r}; restore it from where the rule came from")
    steps = meta_training_steps(Path(folder))
    cost = f", {steps:,} training steps in all," if steps else ""
    commit = known.get("environment", {}).get("commit")
    end = f"\n\nat commit {commit}." if commit else ""
    tasks = ", ".join(known["tasks"])
    return {"training": f"Meta-trained on {tasks}{cost} with the command\n\n```bash\n{known['command']}\n```{end}"}


def eval_results(comparison: Mapping[str, Any], arm: str, dataset: str | None = None) -> list[EvalResult]:
    """Returns the arm's results as entries of a card's `model-index`; a loss that is not finite is none.

    Means over seeds: the last validation loss, the accuracy on test data where there is one, and the steps to each
    loss of `steps_to` that all seeds came to.

    Example:

    ```python
    >>> from hf_sl2o.experiments.cards import eval_results
    >>> run = {"optim": "sl2o", "seeds": [42], "final_eval_loss": 0.5}
    >>> found = eval_results({"recipe": {}, "runs": {"sl2o": run}, "steps_to": {}}, "sl2o")
    >>> [(result.metric_name, result.metric_value) for result in found]
    [('Validation loss, mean of 1 seed', 0.5)]

    ```
    """
    run = comparison["runs"][arm]
    name = dataset or comparison["recipe"].get("data") or "own data"
    tested = run.get("test_accuracy_per_seed") or []
    images = bool(run.get("accuracy_per_seed") and run["accuracy_per_seed"][0])

    def entry(split: str, metric: str, value: float, words: str) -> EvalResult:
        return EvalResult(
            task_type="image-classification" if images else "other",
            dataset_type=name,
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_name=words,
            metric_value=value,
        )

    found = [entry("validation", "loss", run["final_eval_loss"], f"Validation loss, mean of {_seeds(run)}")]
    for target, levels in comparison["steps_to"].items():
        if (steps := levels["steps"].get(arm)) is not None:
            words = f"Steps to validation loss {levels['target']:.4f} ({target})"
            found.append(entry("validation", "steps", steps, words))
    if tested:
        mean = sum(tested) / len(tested)
        found.append(entry("test", "accuracy", mean, f"Test accuracy, mean of {_seeds(run)}"))
    return [result for result in found if math.isfinite(result.metric_value)]


def _trained_here(comparison: Mapping[str, Any], arm: str) -> bool:
    cost = comparison["amortised"]
    return arm not in cost.get("rules", {}) and cost["meta_training"] > 0


def _seeds(run: Mapping[str, Any]) -> str:
    return "1 seed" if len(run["seeds"]) == 1 else f"{len(run['seeds'])} seeds"


def _subject(comparison: Mapping[str, Any]) -> str:
    recipe = comparison["recipe"]
    model = f"the model `{recipe['model']}`" if recipe.get("model") else "a model"
    data = f" on `{recipe['data']}`" if recipe.get("data") else ""
    return f"{model} ({comparison['n']:,} parameters){data}"


def _subspace(comparison: Mapping[str, Any]) -> str:
    recipe = comparison["recipe"]
    if recipe["subspace"] == "lora":
        return f"the factors of a LoRA adapter of rank {recipe['lora_rank']}"
    if recipe["subspace"] == "random":
        return f"{recipe['dim']} random directions"
    share = comparison.get("explained_variance")
    held = "" if share is None else f", which hold {100 * share:.2f} % of its variance"
    return f"{recipe['dim']} directions of a recorded run of {recipe['trajectory_steps']} steps{held}"


def _training(comparison: Mapping[str, Any], arm: str) -> str:
    recipe, cost = comparison["recipe"], comparison["amortised"]
    given = cost.get("rules", {})
    if arm in given:
        steps = f", {given[arm]:,} training steps in all" if given[arm] else ""
        return f"It was trained before, on other tasks{steps}, and used in this comparison as it is."
    if not _trained_here(comparison, arm):
        return "This comparison does not say what it was trained on."
    rows = comparison["data"].get("train", {}).get("rows")
    of = f", {rows:,} rows" if rows else ""
    return (
        f"Meta-trained on {_subject(comparison)}{of}, in {_subspace(comparison)}: {recipe['meta_epochs']} meta-epochs "
        f"of runs of {recipe['inner_steps']} steps, {cost['meta_training']:,} training steps in all."
    )


def _evaluation(comparison: Mapping[str, Any], arm: str) -> str:
    run, data, training = comparison["runs"][arm], comparison["data"], comparison["training"]
    rows = data.get("validation", {}).get("rows")
    versions = comparison.get("environment", {}).get("versions", {})
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "transformers"))
    losses = "; ".join(f"`{name}` is {level['target']:.4f}" for name, level in comparison["steps_to"].items())
    once = f"{comparison['amortised']['total']:,}"
    parts = [
        f"On {_subject(comparison)}, in {_subspace(comparison)}. Runs in the subspace have {training['max_steps']} "
        f"steps; {_seeds(run)}. The learning rate of every arm was chosen on the validation data"
        + (f", {rows:,} rows, that the losses below are of." if rows else " that the losses below are of."),
        f"This rule is the arm `{arm}`. An arm of another kind than `sl2o` has no learned rule. Losses to be reached: "
        f"{losses}.",
        table(comparison),
        f"What was paid once, before the first step of the arms in the subspace: {once} training steps.",
    ]
    if used:
        parts.append(f"Made with {used} on {comparison['environment'].get('device', 'an unknown device')}.")
    return "\n\n".join(parts)


def _limits(comparison: Mapping[str, Any], arm: str) -> str:
    seeds = len(comparison["runs"][arm]["seeds"])
    few = f" {seeds} seeds are few: differences of about their spread mean nothing." if seeds < 5 else ""
    return (
        "All numbers are of one task. On another model, data set or subspace it may be better or worse than AdamW; "
        f"compare first.{few}"
    )
