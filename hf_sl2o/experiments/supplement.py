"""The tables and figures of the paper's supplement: which command redoes each, and what became of its claim."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
Verdict = tuple[str, str]

REPRODUCED = "reproduced"
SMALL = "direction reproduced at small size"
NOT = "not reproduced"
NOT_ATTEMPTED = "not attempted"


@dataclass(frozen=True)
class Entry:
    """A table or figure.

    Args:
        name (`str`): Such as `"figure 1"`.
        shows (`str`): What it is of.
        paper (`str`): The paper's claim, with its numbers.
        files (`dict[str, str]`): Of each result its command at small size; `{json}`, `{out}`, `{cifar}`, `{e2e}` and
            `{data}` are filled in. What a recipe writes to `{out}/comparison.json` is the result.
        paper_size (`str`): The command at the paper's size.
        minutes (`int`): Of one core at the small size, about.
        gpu_hours (`str`): Of the paper's size on one GPU, about; where nobody ran it, why.
        verdict (`Callable`): Maps the results by name to a word and what they say.
    """

    name: str
    shows: str
    paper: str
    files: dict[str, str]
    paper_size: str
    minutes: int
    gpu_hours: str
    verdict: Callable[[Results], Verdict]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mean(values: Any) -> float:
    values = list(values)
    return float(sum(values)) / len(values)


def _at(curve: Any, step: int) -> float:
    """The value of a curve of [step, value] at the last point that is not after `step`."""
    return float([point[1] for point in curve if point[0] <= step][-1])


def table_1(results: Results) -> Verdict:
    return REPRODUCED, "settings, not results: `recipes/resnet_cifar.py --baselines paper` takes them"


def _ahead(values: Mapping[str, list[float]]) -> tuple[str, float, float]:
    """Of values per arm and seed, the lower the better: the best arm, by how much the best of SL2O is below the best
    other arm, and how far the seeds of these two spread (the larger standard deviation)."""
    means = {arm: _mean(of) for arm, of in values.items()}
    ours = min((arm for arm in means if arm.startswith("sl2o")), key=means.__getitem__)
    other = min((arm for arm in means if not arm.startswith("sl2o")), key=means.__getitem__)
    spread = max(statistics.stdev(values[arm]) for arm in (ours, other))
    return min(ours, other, key=means.__getitem__), means[other] - means[ours], spread


def figure_1(results: Results) -> Verdict:
    """A lead counts where it is more than the seeds spread."""
    runs = results["resnet8_cifar"]["runs"]
    early = {arm: [_at(curve, 60) for curve in run["eval_per_seed"]] for arm, run in runs.items()}
    wrong = {arm: [1 - value for value in run["test_accuracy_per_seed"]] for arm, run in runs.items()}
    first, sooner, of_loss = _ahead(early)
    best, higher, of_accuracy = _ahead(wrong)
    text = (
        f"after 60 steps the lowest loss is that of `{first}` ({_mean(early[first]):.3f}; `subspace_momentum` "
        f"{_mean(early['subspace_momentum']):.3f}, `momentum` {_mean(early['momentum']):.3f}; lead of SL2O over "
        f"the best other arm {sooner:+.3f}, seeds ± {of_loss:.3f}); the highest accuracy at the end that of `{best}` "
        f"({_percent(1 - _mean(wrong[best]))}; `sl2o` {_percent(1 - _mean(wrong['sl2o']))}, `momentum` "
        f"{_percent(1 - _mean(wrong['momentum']))}; lead of SL2O {100 * higher:+.1f} points, seeds "
        f"± {100 * of_accuracy:.1f})"
    )
    return (SMALL if sooner > of_loss and higher > of_accuracy else NOT), text


def figure_2(results: Results) -> Verdict:
    runs = results["gpt2_e2e"]["runs"]
    ours, adamw, whole = (runs[arm]["eval"] for arm in ("sl2o", "subspace_adamw", "adamw"))
    ends = ours[-1][1] / adamw[-1][1]
    faster = _at(ours, 50) < min(_at(adamw, 50), _at(whole, 50))
    text = (
        f"a GPT-2 of two layers: after 50 steps SL2O {_at(ours, 50):.3f}, AdamW in the subspace {_at(adamw, 50):.3f}, "
        f"AdamW {_at(whole, 50):.3f}; at the end {ours[-1][1]:.3f} and {adamw[-1][1]:.3f} in the subspace"
    )
    return (SMALL if faster and ends < 1.01 else NOT), text


def figure_3(results: Results) -> Verdict:
    runs = results["deit_tiny_quick_lora_cifar"]["runs"]
    ours, adamw = (_mean(runs[arm]["test_accuracy_per_seed"]) for arm in ("sl2o_default-lora", "adamw"))
    return (SMALL if ours > adamw else NOT), (
        f"a DeiT-tiny, 500 steps of LoRA, against AdamW: {_percent(ours)}, AdamW {_percent(adamw)}"
    )


def section_2_4(results: Results) -> Verdict:
    return NOT_ATTEMPTED, "it needs ImageNet and days of a GPU"


def table_2(results: Results) -> Verdict:
    """A short expression counts that is within 2 % of the R that any function of its inputs has."""
    result = results["study_symbolic"]
    rows = result["table"]
    paper = [row["pearson_r_test"] for row in rows if row["from"] == "paper"]
    longest = max(row["complexity"] for row in rows if row["from"] == "paper")
    found = max(row["pearson_r_test"] or 0 for row in rows if row["from"] == "found" and row["complexity"] <= longest)
    most = result["ceilings"]
    text = (
        f"R on the test samples: the paper's three {', '.join(f'{r:.3f}' for r in paper)}, the closest found of "
        f"complexity at most {longest} {found:.3f}; "
        + ", ".join(f"any function of {name} {of['pearson_r']:.3f}" for name, of in most.items())
    )
    return (SMALL if found >= 0.98 * max(of["pearson_r"] for of in most.values()) else NOT), text


def figures_4_and_5(results: Results) -> Verdict:
    word, _ = table_2(results)
    return word, "the same samples and expressions, drawn: `study_symbolic.png`, `study_directions.png`"


def table_3(results: Results) -> Verdict:
    matrix = results["study_transfer"]["matrix"]
    own: list[float] = []
    other: list[float] = []
    for task, column in matrix.items():
        best = min(entry["final_eval_loss"] for entry in column.values())
        for row, entry in column.items():
            if row.startswith("meta-trained on "):
                (own if row.endswith(f" {task}") else other).append(entry["final_eval_loss"] / best)
    text = (
        f"held-out loss over the lowest of six small tasks: {_mean(own):.3f} where a rule was meta-trained on the "
        f"task, {_mean(other):.3f} where on another"
    )
    return (SMALL if _mean(other) / _mean(own) < 1.02 else NOT), text


def section_2_7(results: Results) -> Verdict:
    summary = results["study_transfer"]["summary"]
    dm, default = (summary[row]["final_eval_loss"] for row in ("l2o-dm, this task", "default"))
    text = f"final loss over the lowest of each task: L2O-DM {dm:.2f}, the shipped rule {default:.2f} (no accuracies)"
    return (SMALL if dm > 1.5 * default else NOT), text


def figure_6(results: Results) -> Verdict:
    ends = {(row["letter"], row["value"]): row["eval"][-1][1] for row in results["study_unroll"]["rows"]}
    means = {letter: {n: end for (of, n), end in ends.items() if of == letter} for letter in "TN"}
    text = "; ".join(
        f"{letter} = {', '.join(f'{n}: {end:.3f}' for n, end in sorted(of.items()))}" for letter, of in means.items()
    )
    spread = max(means["T"].values()) / min(means["T"].values())
    return (SMALL if spread < 1.15 else NOT), f"final loss on digits, {text}; seeds differ by about as much"


def updates_of(coefficients: list[list[float]]) -> list[list[float]]:
    """What was subtracted in each step, for coefficients before the first and after each."""
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(coefficients)]


def first_three(coefficients: list[list[float]]) -> float:
    """Root mean square of the updates along the first three directions, the last quarter's over the first's."""
    squares = [_mean(x * x for x in row[:3]) for row in updates_of(coefficients)]
    quarter = len(squares) // 4
    return float((_mean(squares[-quarter:]) / _mean(squares[:quarter])) ** 0.5)


def figure_7(results: Results) -> Verdict:
    task = next(iter(results["study_directions"]["tasks"]))
    runs = results["study_directions"]["tasks"][task]["runs"]
    falls = {arm: first_three(run["coefficients"]) for arm, run in runs.items()}
    text = f"{task}, updates along the first three, of the last quarter over those of the first: " + ", ".join(
        f"{arm} {fall:.2f}" for arm, fall in falls.items()
    )
    return (SMALL if all(fall < 0.5 for arm, fall in falls.items() if arm.startswith("SL2O")) else NOT), text


_RESNET8 = (
    "python recipes/resnet_cifar.py --data {cifar} --trajectory_steps 1500 --max_steps 300 "
    "--per_device_train_batch_size 64 --validation_rows 2000 --eval_steps 15 --logging_steps 15 --arms momentum sl2o "
    "sl2o_default subspace_adamw subspace_momentum subspace_sgd adam random p_bfgs "
    "--output_dir {out}"
)
_DEIT = (
    "python recipes/vit_cifar.py --data {cifar} --model deit-tiny --arms adamw sl2o_default-lora --max_steps 500 "
    "--trajectory_steps 500 --eval_steps 25 --logging_steps 25 --trajectory_learning_rates 0.003 --seeds 1 "
    "--base_steps 300 "
    "--validation_rows 1000 --eval_rows 3000 --output_dir {out}"
)
_STUDY = "python recipes/studies/{name}.py --data {{data}} --output_dir {{out}} --json {{json}}"
_SYMBOLIC = {"study_symbolic": f"{_STUDY.format(name='symbolic')} --seeds 1"}
_DIRECTIONS = {"study_directions": f"{_STUDY.format(name='directions')} --seeds 1"}
_TRANSFER = {
    "study_transfer": "python recipes/studies/transfer.py --data {data} --output_dir {out} --cache {out}/runs "
    "--json {json}"
}
_AT_SIZE = "accelerate launch recipes/resnet_cifar.py --data hub --model {} --baselines paper"

_LONGER = "--steps 1000 --meta_epochs 20 --json FILE"

#: In the order of the supplement.
ENTRIES = (
    Entry(
        "table 1", "rates and schedules of the baselines", "SGD and Momentum 0.1, Adam 0.001, RMSProp 0.01", {},
        _AT_SIZE.format("resnet18"), 0, "none", table_1,
    ),
    Entry(
        "figure 1", "ResNet-8 on CIFAR-10, 10,000 steps",
        "SL2O's training loss falls fastest, its test accuracy stays the highest", {"resnet8_cifar": _RESNET8},
        _AT_SIZE.format("resnet8"), 110, "2", figure_1,
    ),
    Entry(
        "figure 2", "GPT-2 on E2E, 80,000 steps",
        "SL2O is faster in the first 250 steps, and matches the validation loss of AdamW in the subspace",
        {"gpt2_e2e": "python recipes/gpt2_e2e.py --data {e2e} --output_dir {out}"},
        "accelerate launch recipes/gpt2_e2e.py --model gpt2 --data hub", 63, "20", figure_2,
    ),
    Entry(
        "figure 3", "DeiT-base-distilled, 20 epochs", "98.36 %, Momentum in the subspace 98.24 %",
        {"deit_tiny_quick_lora_cifar": _DEIT},
        "accelerate launch recipes/vit_cifar.py --data hub --model deit-base --bf16", 65, "20", figure_3,
    ),
    Entry(
        "section 2.4", "ViT-B from scratch on ImageNet, 2,000 steps",
        "1.6 points above Momentum in the subspace, 7.1 above AdamW", {},
        "accelerate launch recipes/vit_imagenet.py --data IMAGE_FOLDER --bf16", 0, "40", section_2_4,
    ),
    Entry(
        "table 2", "expressions fitted to a rule of ResNet-20", "R 0.950, 0.969 and 0.970 on test samples",
        _SYMBOLIC, f"python recipes/studies/symbolic.py --data PATH {_LONGER}", 80, "2", table_2,
    ),
    Entry(
        "figures 4 and 5", "hyperbolic functions, and the expressions beside the samples",
        "they bound the answer to large inputs", {**_SYMBOLIC, **_DIRECTIONS},
        f"python recipes/studies/symbolic.py --data PATH {_LONGER}", 20, "2", figures_4_and_5,
    ),
    Entry(
        "table 3", "transfer between data sets and networks",
        "at most 0.28 points between data sets, 0.1 between networks", _TRANSFER,
        f"python recipes/studies/transfer.py --data PATH {_LONGER}", 65, "3", table_3,
    ),
    Entry(
        "section 2.7", "L2O-DM in the same subspace", "SL2O is over 50 points of accuracy better", _TRANSFER,
        f"python recipes/studies/transfer.py --data PATH {_LONGER}", 0, "3", section_2_7,
    ),
    Entry(
        "figure 6, table 4", "unroll length T and training iterations N, ResNet-20",
        "T hardly matters, a small N is worse",
        {"study_unroll": "python recipes/studies/unroll.py --output_dir {out} --json {json}"},
        "python recipes/studies/unroll.py --task cifar-resnet20 --data PATH --json FILE", 25, "4", figure_6,
    ),
    Entry(
        "figure 7", "updates along the first three directions, ResNet-20, 100 steps",
        "they fall to about 0 after 75 steps without a schedule", _DIRECTIONS,
        "python recipes/studies/directions.py --data PATH --json FILE", 0, "0.2", figure_7,
    ),
)  # fmt: skip
