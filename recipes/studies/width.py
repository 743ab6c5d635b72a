"""How long the steps of `default-lora` may be on LoRA factors of a wider network: what `RuleConfig.base_width` is for.

    python recipes/studies/width.py --data PATH --json recipes/results/study_width.json

Two ViTs that differ in width alone adapt to classes that their bases did not see. The rule's steps, without the factor
for wide matrices, are multiplied by each of several gains; beside it AdamW with its own grid. Grids grow until the
best lies inside. The networks and data are relatives of a task by which evaluate_rules.py judges. Killed and started
again it goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import Rule
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.tasks.named import check_tasks, learned, lora_task
from hf_sl2o.rules import SHIPPED_RULES

TASKS = {64: "cifar-vit-of-64", 192: "cifar-vit-of-192"}
GAINS = (0.1, 0.3, 1.0)


def adamw(lr: float) -> Any:
    return lambda c: torch.optim.AdamW(c, lr=lr, weight_decay=0.0)


def without_width(rule: Rule) -> Rule:
    """The same rule, whose steps do not depend on the width."""
    plain = Rule.from_config(dataclasses.replace(rule.config, base_width=0))
    plain.load_state_dict(rule.state_dict())
    return plain


def figure(result: Mapping[str, Any], path: Path) -> None:
    """A panel a width: held-out loss of seed 0 by step, a line a gain, and tuned AdamW."""
    tasks = result["tasks"]
    with canvas(path, 1, len(tasks), figsize=(6 * len(tasks), 4)) as (_, axes):
        for axis, (width, entry) in zip(axes[0], tasks.items(), strict=True):
            for gain, curve in sorted(entry["runs"]["sl2o"]["grid"]):
                axis.plot(*zip(*curve, strict=True), label=f"default-lora, steps x {gain:g}")
            adamw = entry["runs"]["adamw"]
            axis.plot(*zip(*adamw["eval"], strict=True), "k--", label=f"AdamW, {adamw['learning_rate']:g} (tuned)")
            axis.axhline(adamw["final_eval_loss"], color="grey", linewidth=0.7)
            axis.set(title=f"width {width}", xlabel="step", ylabel="held-out loss", yscale="log", ylim=(None, 3))
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3, which="both")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=400, seeds=2, rank=16, output_dir=Path("outputs/study_width"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--widths", nargs="+", type=int, choices=list(TASKS), default=list(TASKS))
    options = parse_options(parser, argv)
    check_tasks([TASKS[width] for width in options.widths], options.data, plain=True, lora=True)
    shipped = Rule.from_pretrained(SHIPPED_RULES / "default-lora")
    rule = without_width(shipped)
    tasks: dict[int, Any] = {}
    for width in options.widths:
        task = lora_task(TASKS[width], options.data, options.tasks_dir, options.rank)
        arms = {
            "sl2o": TaskArm(learned(rule, options.steps), GAINS, key=f"rule-{rule.fingerprint}"),
            "adamw": TaskArm(adamw, (1e-3, 3e-3, 1e-2)),
        }
        every = max(options.steps // 10, 1)
        runs = compare_on(task, arms, options.steps, seeds=options.seeds, eval_every=every, cache=options.output_dir)
        factor = shipped.config.step_factor(task.basis.tensor_shapes)
        tasks[width] = {"d": task.basis.dim, "step_factor": factor, "runs": runs}
        for arm, run in runs.items():
            ends = ", ".join(f"{lr:g}: {curve[-1][1]:.4f}" for lr, curve in sorted(run["grid"]))
            print(f"width {width}, {arm}: {ends}; best {run['learning_rate']:g}, {run['final_eval_loss']:.4f}")
    result = {
        "recipe": {"steps": options.steps, "seeds": options.seeds, "rank": options.rank},
        "rule": shipped.fingerprint,
        "tasks": {str(width): entry for width, entry in tasks.items()},
    }
    return finish(result, options.json, figure)


if __name__ == "__main__":
    run_script(main)
