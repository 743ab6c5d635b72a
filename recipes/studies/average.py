"""At which running average of its coordinates a shipped rule is best evaluated; on none of the tasks that judge it.

    python recipes/studies/average.py --data PATH --json recipes/results/study_average.json

The average weighs step t as t^eta; a large eta is a short memory. `RuleConfig.average` of
the shipped rules comes from here. Killed and started again it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sl2o import Rule
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.tasks.named import check_tasks, learned, named_task
from hf_sl2o.rules import SHIPPED_RULES

ETAS = (0.0, 1.0, 4.0, 9.0, 24.0)  # 0: no average
PARTS = ("whole run", "after a quarter", "end")  # the mean of all three counts: people look at all of them
TASKS = {  # what the rules were meta-trained on, and beside it smaller batches, a noisy network, other ranks
    "default": (
        "teacher",
        "teacher@8",
        "teacher@16",
        "digits-mlp",
        "digits-mlp@8",
        "e2e-gpt2@8",
        "figures-cnn@16",
    ),
    "default-lora": (
        "digits-mlp-lora4",
        "digits-mlp-lora16",
        "docs-gpt2-lora4",
        "docs-gpt2-lora8",
        "docs-gpt2-lora8@2",
        "figures-vit-lora4",
    ),
}


def over_last(runs: Mapping[str, Any], first: int) -> dict[str, float]:
    """Held-out losses from step `first` on over those at the last coordinates: geometric means."""

    def logs(run: Mapping[str, Any]) -> list[float]:
        return [math.log(loss) for curve in run["eval_per_seed"] for step, loss in curve if step >= first]

    base = logs(runs["0"])
    pairs = {eta: zip(logs(run), base, strict=True) for eta, run in runs.items()}
    return {eta: math.exp(sum(a - b for a, b in pair) / len(base)) for eta, pair in pairs.items()}


def figure(result: Mapping[str, Any], path: Path) -> None:
    """A panel a rule: loss over that of the last coordinates, by eta; a thin line a task."""
    tasks = result["rules"]
    with canvas(path, 1, len(tasks), figsize=(6 * len(tasks), 4.2)) as (_, axes):
        for axis, (rule, entry) in zip(axes[0], tasks.items(), strict=True):
            ticks = [str(eta) for eta in entry["mean_over_last"]]
            for name, of_task in entry["tasks"].items():
                axis.plot(ticks, list(of_task["over_last"].values()), linewidth=1, label=name)
            axis.plot(ticks, list(entry["mean_over_last"].values()), color="black", linewidth=2.5, label="mean")
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set(title=rule, xlabel="eta (0: no average)", ylabel="held-out loss over that of the last")
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__,
        data="embedded",
        steps=200,
        seeds=2,
        output_dir=Path("outputs/study_average"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )
    parser.add_argument("--rules", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--tasks", nargs="+", help="instead of each rule's own")
    options = parse_options(parser, argv)
    for what in options.rules:
        check_tasks(options.tasks or TASKS[what], options.data)
    rules: dict[str, Any] = {}
    for what in options.rules:
        rule = Rule.from_pretrained(SHIPPED_RULES / what)
        make = learned(rule, options.steps)
        arms = {f"{eta:g}": TaskArm(make, (1.0,), key=f"rule-{rule.fingerprint}", average=eta) for eta in ETAS}
        tasks = {}
        for name in options.tasks or TASKS[what]:
            task = named_task(name, options.data, options.tasks_dir)
            runs = compare_on(task, arms, options.steps, seeds=options.seeds, cache=options.output_dir)
            parts = [over_last(runs, first) for first in (1, options.steps // 4, options.steps)]
            ratios = {eta: geometric_mean([part[eta] for part in parts]) for eta in arms}
            tasks[name] = {"over_last": ratios, "parts": dict(zip(PARTS, parts, strict=True)), "runs": runs}
            print(f"{what}, {name}: " + ", ".join(f"eta {eta}: {ratio:.4f}" for eta, ratio in ratios.items()))
        by_part = {
            part: {eta: geometric_mean([entry["parts"][part][eta] for entry in tasks.values()]) for eta in arms}
            for part in PARTS
        }
        means = {eta: geometric_mean([entry["over_last"][eta] for entry in tasks.values()]) for eta in arms}
        best = min(means, key=lambda eta: means[eta])
        rules[what] = {"mean_over_last": means, "by_part": by_part, "best": float(best), "tasks": tasks}
        print(f"{what}: " + ", ".join(f"eta {eta}: {ratio:.4f}" for eta, ratio in means.items()) + f"; best {best}")
    result = {"recipe": {"steps": options.steps, "seeds": options.seeds}, "rules": rules}
    return finish(result, options.json, figure)


if __name__ == "__main__":
    run_script(main)
