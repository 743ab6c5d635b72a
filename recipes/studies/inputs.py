"""What a rule gains from seeing more than the paper's two inputs, and from how its plan trains it.

    python recipes/studies/inputs.py --rule default --data PATH --json recipes/results/study_inputs_default.json

Each variant changes one thing of the plan by which `recipes/meta_train.py` makes a shipped rule; the score is the
rule's geometric mean of (held-out loss / held-out loss before training) at N/8, N/4, N/2 and N, on the tasks it was
trained on. A rule of `default`'s plan is also judged beside tuned optimizers on the same problems at batch sizes that
it was not trained at. The tasks of evaluate_rules.py play no part. Killed and started again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from hf_sl2o import MetaTrainingArguments, Rule
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.environment import portable
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.judging import judge, summary
from hf_sl2o.experiments.on_task import compare_on
from hf_sl2o.experiments.plans import PLANS, Plan, make_rule, parse
from hf_sl2o.experiments.tasks.named import arms_of, check_tasks, named_task

VARIANTS: dict[str, list[str]] = {
    "plan": [],
    "no scale of the tensor": ["--tensor_scale", "False"],
    "no progress": ["--progress", "False"],
    "neither": ["--tensor_scale", "False", "--progress", "False"],
    "plan, momenta 0.5 and 0.99": ["--momenta", "0.5", "0.99"],
    "plan, agreement": ["--agreement", "True"],  # of a rule without per_tensor
    "plan, distance": ["--distance", "True"],  # of one with it
    "plan, windows of 20 steps": ["--unroll_length", "20"],
    "plan, sum of losses": ["--meta_loss", "sum"],
    "plan, no random scaling": ["--random_scaling", "0.0"],
}


def is_the_plan(plan: Plan, words: list[str]) -> bool:
    """Whether a variant asks for what the plan does anyway."""
    defaults = {field.name: field.default for field in dataclasses.fields(MetaTrainingArguments)}
    return bool(words) and all(
        str({**defaults, **dataclasses.asdict(plan.config), **stage.settings}[flag[2:]]) == value
        for stage in plan.stages
        for flag, value in zip(words[::2], words[1::2], strict=False)
    )


def plot(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    levels = ("subspace_adamw", "subspace_momentum") if rows[0]["judged"] else ()
    widths = (2, 3) if levels else (2,)
    size = 3 + 2 * sum(widths), 0.5 * len(rows) + 1.8
    with canvas(path, 1, len(widths), figsize=size, sharey=True, width_ratios=widths) as (_, axes):
        axes = axes[0]
        for y, row in enumerate(rows):
            axes[0].plot(row["scores"], [y] * len(row["scores"]), "o", color="C0")
            axes[0].plot(sum(row["scores"]) / len(row["scores"]), y, "|", color="black", markersize=18)
            for index, level in enumerate(levels):
                ratios = [ratio for of_seed in row["judged"] for ratio in of_seed[level].values()]
                known = [ratio for ratio in ratios if ratio is not None]
                label = level if y == 0 else None
                axes[1].plot(known, [y + 0.2 * index - 0.1] * len(known), "os"[index], color=f"C{index}", label=label)
                if len(known) < len(ratios):
                    never = f"{len(ratios) - len(known)} never"
                    place = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center", "fontsize": 7}
                    axes[1].annotate(never, (1.01, y + 0.2 * index - 0.1), color=f"C{index}", **place)
        axes[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes[0].set(xlabel="score: held-out loss over that before training (a dot a seed)")
        axes[0].invert_yaxis()
        if levels:
            axes[1].set(xlabel="steps over the tuned baseline's own, to its final loss (a dot a seed and task)")
            axes[1].legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
        for axis in axes:
            axis.grid(alpha=0.3)


def judged(rule: Rule, options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Per tuned baseline and task: steps of the rule over its own, to its final loss."""
    results = {}
    for name in options.judge_on:
        task = named_task(name, options.data, options.output_dir / "tasks")
        arms = arms_of("default", rule, options.judge_steps, task.basis.layout)
        chosen = {arm: arms[arm] for arm in ("sl2o", "subspace_adamw", "subspace_momentum", "subspace_sgd")}
        runs = compare_on(task, chosen, options.judge_steps, cache=options.runs_dir)
        results[name] = {"levels": judge(runs)}
    return {level: entry["ratios"]["sl2o"] for level, entry in summary(results).items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(__doc__, data="embedded", seeds=2, output_dir=Path("outputs/meta_train"))
    parser.add_argument("--rule", choices=sorted(PLANS), default="default")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--runs_dir", type=Path, default=Path("outputs/evaluate_rules/inputs"))
    parser.add_argument("--judge_on", nargs="+", default=["teacher@16", "digits-mlp@16"], help="with --rule default")
    parser.add_argument("--judge_steps", type=int, default=200)
    options, rest = parse_options(parser, argv, known=True)
    parse([*rest, "--rule", options.rule, "--data", options.data, "--output_dir", str(options.output_dir)])
    if options.rule == "default":
        check_tasks(options.judge_on, options.data, flag="judge_on")
    rows = []
    for variant in options.variants:
        if is_the_plan(PLANS[options.rule], VARIANTS[variant]):
            continue
        results, rules = [], []
        for seed in range(options.seeds):
            name = f"inputs-{options.rule}-{variant.replace(' ', '-').replace(',', '')}-{seed}"
            words = [
                "--rule",
                options.rule,
                "--name",
                name,
                "--output_dir",
                str(options.output_dir),
                "--seed",
                str(seed),
            ]
            results.append(make_rule([*words, "--data", options.data, *VARIANTS[variant], *rest]))
            rules.append(Rule.from_pretrained(options.output_dir / name))
        rows.append(
            {
                "variant": variant,
                "judged": [judged(rule, options) for rule in rules] if options.rule == "default" else [],
                "scores": [result["stages"][-1]["best_score"] for result in results],
                "validation": [
                    min(result["stages"][-1]["validation"], key=lambda e: e["score"])["validation"]
                    for result in results
                ],
            }
        )
        print(f"{variant:36} " + " ".join(f"{score:.4f}" for score in rows[-1]["scores"]), flush=True)
    settings = {"rule": options.rule, "seeds": options.seeds, "command_line": portable(rest)}
    return finish({"study": "inputs", **settings, "rows": rows}, options.json, plot)


if __name__ == "__main__":
    run_script(main)
