"""Transfer: meta-train on one task, use on every other (supplement 2.6, table 3), as a full matrix.

    python recipes/studies/transfer.py --data PATH --json recipes/results/study_transfer.json

Rows: a rule with the paper's constants meta-trained on each task alone, the shipped `default` rule, L2O-DM
meta-trained on the very task it is tested on (supplement 2.7), and the tuned AdamW, momentum and SGD of the same
40-dimensional subspace. Columns: the tasks. Entries: held-out loss over a run with linear decay, three seeds. Killed
and started again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import LSTMRule, MetaTrainer, MetaTrainingArguments, Rule, RuleConfig, Task
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.on_task import compare_on
from hf_sl2o.experiments.tasks.named import arms_of, check_tasks, subspace_task
from hf_sl2o.rules import SHIPPED_RULES

TASKS = ("quadratic", "digits-mlp", "e2e-gpt2", "docs-gru", "cifar-resnet8", "cifar-vit")


def meta_trained(task: Task, preset: str, options: argparse.Namespace) -> Rule:
    """A rule of a preset, meta-trained on one task, from its folder if it is there."""
    args = MetaTrainingArguments(
        str(options.output_dir / "rules" / f"{task.name}-{preset}"),
        inner_steps=options.steps,
        meta_epochs=options.meta_epochs,
        eval_every=max(1, options.meta_epochs // 4),
        lr_scheduler_type="linear",
        meta_lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        use_cpu=options.use_cpu,
    )
    torch.manual_seed(0)
    return MetaTrainer(LSTMRule(RuleConfig.preset(preset)), args, [task]).train()


def summary(matrix: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per row, the geometric mean over the columns of (held-out loss / the column's lowest)."""
    means: dict[str, dict[str, float]] = {}
    for row in dict.fromkeys(row for column in matrix.values() for row in column):
        for when in ("early_eval_loss", "final_eval_loss"):
            ratios = [
                math.log(column[row][when] / min(entry[when] for entry in column.values()))
                for column in matrix.values()
            ]
            means.setdefault(row, {})[when] = math.exp(sum(ratios) / len(ratios))
    return means


def plot(result: dict[str, Any], path: Path) -> None:
    columns = list(result["matrix"])
    rows = list(dict.fromkeys(row for column in result["matrix"].values() for row in column))
    with canvas(path, figsize=(1.7 * len(columns) + 3, 0.45 * len(rows) + 2)) as (_, ((axis,),)):
        ratios = torch.full((len(rows), len(columns)), float("nan"))
        for j, column in enumerate(columns):
            best = min(entry["final_eval_loss"] for entry in result["matrix"][column].values())
            for i, row in enumerate(rows):
                if row in result["matrix"][column]:
                    entry = result["matrix"][column][row]
                    ratios[i, j] = entry["final_eval_loss"] / best
                    early = entry["early_eval_loss"]
                    text, colour = (
                        f"{entry['final_eval_loss']:.3f}\n({early:.3f})",
                        "white" if ratios[i, j] > 1.35 else "black",
                    )
                    axis.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axis.imshow(ratios.clamp(max=1.5), cmap="YlOrRd", aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=20)
        axis.set_yticks(range(len(rows)), rows)
        title = (
            f"held-out loss after {result['steps']} steps (after {result['early']}); colour: over the column's best"
        )
        axis.set_title(title, fontsize=9)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=200, meta_epochs=10, seeds=3, output_dir=Path("outputs/study_transfer"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("outputs/evaluate_rules/default"),
                        help="of runs; the tuned optimizers of evaluate_rules.py are the same")  # fmt: skip
    options = parse_options(parser, argv)
    check_tasks(options.tasks, options.data, plain=True)
    if options.steps < 10:
        raise ValueError(f"--steps is {options.steps}, expected at least the 10 steps of a window of meta-training")
    tasks = {name: subspace_task(name, options.data, options.tasks_dir) for name in options.tasks}
    rules = {f"meta-trained on {name}": meta_trained(task, "paper-cnn", options) for name, task in tasks.items()}
    rules["default"] = Rule.from_pretrained(SHIPPED_RULES / "default")
    early = options.steps // 4
    matrix: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        of_task = {**rules, "l2o-dm, this task": meta_trained(task, "l2o-dm", options)}
        arms = {
            label: arms_of("default", rule, options.steps, task.basis.layout)["sl2o"]
            for label, rule in of_task.items()
        }
        tuned = arms_of("default", rules["default"], options.steps, task.basis.layout)
        arms["default, not averaged"] = tuned["sl2o_last"]
        arms |= {f"{arm}, tuned": dataclasses.replace(tuned[arm], key=arm) for arm in tuned if "sl2o" not in arm}
        runs = compare_on(task, arms, options.steps, seeds=options.seeds, cache=options.cache)
        matrix[name] = {
            arm: {
                "learning_rate": run["learning_rate"],
                "final_eval_loss": run["final_eval_loss"],
                "early_eval_loss": next(loss for step, loss in run["eval"] if step >= early),
                "eval_per_seed": run["eval_per_seed"],
            }
            for arm, run in runs.items()
        }
        print(name)
        for row, entry in matrix[name].items():
            print(f"  {row:40} {entry['early_eval_loss']:.4f} {entry['final_eval_loss']:.4f}", flush=True)
    settings = {name: getattr(options, name) for name in ("steps", "meta_epochs", "seeds")}
    result = {"study": "transfer", **settings, "early": early, "matrix": matrix, "summary": summary(matrix)}
    return finish(result, options.json, plot)


if __name__ == "__main__":
    run_script(main)
