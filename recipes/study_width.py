"""How long the steps of `default-lora` may be on LoRA factors of a wider network: what `RuleConfig.base_width` is for.

    python recipes/study_width.py --data PATH --json recipes/results/study_width.json

Two ViTs that differ in width alone adapt to classes that their bases did not see. The rule's steps, without the factor
for wide matrices, are multiplied by each of several gains; beside it AdamW with its own grid. Grids grow until the
best lies inside. The networks and data are relatives of a task by which evaluate_rules.py judges. Killed and started
again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from checks import parse_options, run_script
from meta_tasks import check_tasks, learned, lora_task

from hf_sl2o import Rule
from hf_sl2o.comparison import Arm, compare_on, environment
from hf_sl2o.files import save_json
from hf_sl2o.registry import SHIPPED_RULES

TASKS = {64: "cifar-vit-of-64", 192: "cifar-vit-of-192"}
GAINS = (0.1, 0.3, 1.0)


def adamw(lr: float) -> Any:
    return lambda c: torch.optim.AdamW(c, lr=lr, weight_decay=0.0)


def without_width(rule: Rule) -> Rule:
    """The same rule, whose steps do not depend on the width."""
    plain = Rule.from_config(dataclasses.replace(rule.config, base_width=0))
    plain.load_state_dict(rule.state_dict())
    return plain


def figure(tasks: Mapping[int, Any], path: Path) -> None:
    """A panel a width: held-out loss of seed 0 by step, a line a gain, and tuned AdamW."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), layout="constrained", squeeze=False)
    for axis, (width, entry) in zip(axes[0], tasks.items(), strict=True):
        for gain, curve in sorted(entry["runs"]["sl2o"]["grid"]):
            axis.plot(*zip(*curve, strict=True), label=f"default-lora, steps x {gain:g}")
        adamw = entry["runs"]["adamw"]
        axis.plot(*zip(*adamw["eval"], strict=True), "k--", label=f"AdamW, {adamw['learning_rate']:g} (tuned)")
        axis.axhline(adamw["final_eval_loss"], color="grey", linewidth=0.7)
        axis.set(title=f"width {width}", xlabel="step", ylabel="held-out loss", yscale="log", ylim=(None, 3))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="embedded, or a folder with e2e_nlg and cifar10")
    parser.add_argument("--widths", nargs="+", type=int, choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA factors")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study_width"))
    parser.add_argument("--tasks_dir", type=Path, default=Path("outputs/meta_train/tasks"))
    parser.add_argument("--json", type=Path)
    options = parse_options(parser, argv)
    check_tasks([TASKS[width] for width in options.widths], options.data, plain=True, lora=True)
    shipped = Rule.from_pretrained(SHIPPED_RULES / "default-lora")
    rule = without_width(shipped)
    tasks: dict[int, Any] = {}
    for width in options.widths:
        task = lora_task(TASKS[width], options.data, options.tasks_dir, options.rank)
        arms = {
            "sl2o": Arm(learned(rule, options.steps), GAINS, key=f"rule-{rule.fingerprint}"),
            "adamw": Arm(adamw, (1e-3, 3e-3, 1e-2)),
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
        "environment": environment(Path(__file__).parent),
    }
    if options.json:
        save_json(options.json, result)
        figure(tasks, options.json.with_suffix(".png"))
    return result


if __name__ == "__main__":
    run_script(main)
