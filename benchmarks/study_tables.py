"""The tables of RESULTS.md that are made of the studies' results; readme_table.py puts them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = ".3f", missing: str = "-") -> str:
    return missing if value is None else f"{value:{form}}"


def symbolic(result: Result) -> str:
    """Complexity, error and correlation of each expression; then what they train to."""
    rows = [
        [row["from"], f"`{row['expression']}`", str(row["complexity"]), f"{row['mse_fit']:.2g}",
         number(row["pearson_r_test"])]
        for row in result["table"] if row["complexity"] > 1
    ]  # fmt: skip
    of = "; ".join(f"of {name} {entry['pearson_r']:.3f}" for name, entry in result["ceilings"].items())
    first = markdown(["from", "expression", "complexity", "MSE, fitted samples", "R, test samples"], rows)
    columns = result["runs"]
    runs = []
    for arm in next(iter(columns.values())):
        ends = {task: of_task[arm]["final_eval_loss"] for task, of_task in columns.items()}
        over = {task: end / columns[task]["LSTM"]["final_eval_loss"] for task, end in ends.items()}
        runs.append([arm, *(f"{ends[task]:.4f} ({over[task]:.3f})" for task in columns)])
    return (
        f"{first}\n\nR of any function (boosted trees): {of}. The search took {result['seconds_of_search']:.0f} s on "
        f"one core.\n\n{markdown(['optimizer', *(f'{task}: loss (over the LSTM)' for task in columns)], runs)}"
    )


def subspaces(result: Result) -> str:
    """A line a basis: what it explains, and where the arms end in it."""
    rows = []
    for task, entry in result["tasks"].items():
        for name, variant in entry["variants"].items():
            arms = variant["arms"]
            known = [variant["projected_loss"], variant["projected_loss_of_own_run"]]
            best = min((loss for loss in known if loss is not None), default=None)
            rows.append([
                task, name, str(variant["d"]), number(variant["explained_variance"], ".4f"),
                number(variant["explained_variance_of_random_walk"], ".4f"), number(best),
                *(number(arms[arm]["final_eval_loss"] if arm in arms else None) for arm in
                  ("sl2o", "subspace_adamw", "subspace_momentum")),
            ])  # fmt: skip
        rows.append([task, "all weights, AdamW", f"n = {entry['n']:,}", "", "", "", "",
                     number(entry["full_adamw"]["final_eval_loss"]), ""])  # fmt: skip
    head = ["task", "basis", "d", "explained", "a random walk's", "recorded run in it", "SL2O, not tuned", "AdamW†",
            "Momentum†"]  # fmt: skip
    return markdown(head, rows)


def repeat(result: Result) -> str:
    """Steps, seconds and bytes of each arm to the level of tuned AdamW and of tuned LoRA."""
    rows = []
    for task, kinds in result["tasks"].items():
        for kind, entry in kinds.items():
            for arm, of in entry["arms"].items():
                steps = [
                    number(entry["targets"][target]["steps"][arm], ".0f", "never")
                    for target in ("adamw, 1 %", "adamw, 5 %", "lora_adamw, 1 %", "lora_adamw, 5 %")
                ]
                accuracy = of.get("accuracy_per_seed")
                right = "" if accuracy is None else f"{100 * sum(accuracy) / len(accuracy):.1f} %"
                rows.append([task, kind, arm, *steps, number(of["best_eval_loss"]), right, f"{of['bytes']:,}"])
    head = ["task", "repeat", "optimizer", "to AdamW + 1 %", "+ 5 %", "to LoRA + 1 %", "+ 5 %", "lowest loss",
            "test accuracy", "bytes"]  # fmt: skip
    return markdown(head, rows)


def carry(result: Result) -> str:
    """How much of the way from the start to tuned AdamW each basis makes; a column a target."""
    blocks = []
    for task, of in result["tasks"].items():
        targets = of["targets"]
        arms = list(next(iter(targets.values())))
        rows = []
        for arm in arms:
            ends = (targets[name][arm] for name in targets)
            rows.append([
                arm, *(f"{end['final_eval_loss']:.3f} ({100 * end['share_of_the_way']:.0f} %)" for end in ends)
            ])  # fmt: skip
        rows.append(["the start", *(f"{next(iter(of_arms.values()))['eval'][0][1]:.3f}"
                                    for of_arms in targets.values())])  # fmt: skip
        blocks.append(f"{task}, sources {', '.join(of['sources'])}:\n\n" + markdown([task, *targets], rows))
    return "\n\n".join(blocks)


def one_run(result: Result) -> str:
    """The arms of each task by their loss at the end of the budget."""
    blocks = []
    for task, of in result["tasks"].items():
        arms = sorted(of["arms"].items(), key=lambda item: item[1]["final_eval_loss"] or float("inf"))
        rows = [
            [name, arm["kind"], f"{arm['peak_rate']:g}", str(arm["full_steps"]), str(arm["subspace_steps"]),
             number(arm["final_eval_loss"], ".4f"), ", ".join(number(loss, ".4f") for loss in arm["final_per_seed"])]
            for name, arm in arms
        ]  # fmt: skip
        head = [task, "", "peak rate", "steps, all weights", "in the subspace", "held-out loss", "by seed"]
        blocks.append(f"{markdown(head, rows)}\n\n{of['verdict']}.")
    return "\n\n".join(blocks)


def wire(result: Result) -> str:
    """Steps and seconds to the target over each link."""
    rows = []
    for link, of in result["links"].items():
        for arm, run in of["arms"].items():
            rows.append([
                link, arm, number(run["steps_to_target"], ".0f", "never"),
                number(run["seconds_to_target"], ".1f", "never"),
                number(run.get("seconds_to_target_with_basis"), ".1f", ""),
                f"{run['seconds_a_step']:.3f}", f"{run['payload_bytes_a_step']:,.0f}",
                number(run["sent_bytes_a_step"], ",.0f"), f"{100 * run['share_of_compute']:.0f} %",
            ])  # fmt: skip
    head = ["link", "optimizer", "steps to the target", "seconds", "with the basis sent", "seconds a step",
            "bytes a step", "sent with headers", "share of computing"]  # fmt: skip
    return markdown(head, rows)


#: By the name of the study.
STUDIES = {of.__name__: of for of in (symbolic, subspaces, repeat, carry, one_run, wire)}
