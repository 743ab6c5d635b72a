"""What a rule does in each principal direction (supplement, figure 7), and how its steps shorten by themselves.

    python recipes/studies/directions.py --data PATH --json recipes/results/study_directions.json

On ResNet-20 and on GPT-2, in the 40 directions of a recorded run: the coefficients and the updates of 100 steps
without a schedule, of momentum at its tuned rate and of two rules, the share of each direction in the updates, and
their lengths. Beside them the answer of a rule to m~ and g~ that stay as they are. Killed and started again it goes
on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import Rule
from hf_sl2o.analysis.paths import Path as Course
from hf_sl2o.analysis.paths import record_path, response
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.supplement import updates_of
from hf_sl2o.experiments.tasks.named import arms_of, check_tasks, learned, subspace_task
from hf_sl2o.rules import SHIPPED_RULES

TASKS = ("cifar-resnet20", "e2e-gpt2")
NAMED = 3  # directions that have a line of their own
SIDE = torch.linspace(-3, 3, 31)  # of m~ and of g~


def rounded(values: torch.Tensor) -> list[Any]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def described(course: Course) -> dict[str, Any]:
    """What is kept of a run: its coefficients, (T + 1, d), each direction's share of the updates, how they shorten."""
    shares = course.updates.square().sum(dim=0) / course.updates.square().sum()  # (d,)
    quarters = [float(part.mean()) for part in course.lengths.chunk(4)]
    return {
        "coefficients": rounded(course.coefficients),
        "share_of_direction": [float(f"{share:.4g}") for share in shares],
        "length_of_quarters": quarters,
        "last_over_first_quarter": quarters[-1] / quarters[0],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    arms = result["arms"]
    rows = [(task, arm) for task in result["tasks"] for arm in arms]
    with canvas(path, len(rows) + 1, 4, figsize=(13, 2.2 * (len(rows) + 1))) as (_, axes):
        for row, (task, arm) in zip(axes, rows, strict=False):
            run = result["tasks"][task]["runs"][arm]
            updates = updates_of(run["coefficients"])
            drawn = ((row[0], updates, "update"), (row[1], run["coefficients"], "coefficient"))
            for axis, values, label in drawn:
                columns = list(zip(*values, strict=True))
                for index in reversed(range(len(columns))):
                    named = index < NAMED
                    axis.plot(
                        columns[index], color=f"C{index}" if named else "0.75", linewidth=1.8 if named else 0.6,
                        linestyle=("-", "--", ":")[index] if named else "-", zorder=3 if named else 1,
                        label=f"$u_{{{index + 1}}}$" if named else "_",
                    )  # fmt: skip
                axis.set(title=f"{task}, {arm}", xlabel="step", ylabel=f"{label} (whitened units)")
                axis.legend(fontsize=7)
            row[2].bar(range(1, len(run["share_of_direction"]) + 1), run["share_of_direction"], color="0.4")
            row[2].set(title="share of each direction", xlabel="principal direction", ylabel="of the squared updates")
            row[3].plot([math.hypot(*update) for update in updates], color="0.2")
            row[3].set(title="length of the update", xlabel="step", ylabel="norm (whitened units)", yscale="log")
        for axis, (name, values) in zip(axes[-1], result["response"].items(), strict=False):
            extent = (float(SIDE[0]), float(SIDE[-1])) * 2
            most = max(abs(value) for row in values for value in row)
            look = {"origin": "lower", "extent": extent}
            image = axis.imshow(values, cmap="RdGy", vmin=-most, vmax=most, aspect="auto", **look)
            axis.contour(values, levels=[0.0], **look, colors="black", linewidths=0.8)
            axis.set(title=f"{name}: update", xlabel="g~", ylabel="m~")
            axis.figure.colorbar(image, ax=axis)
        for axis in axes[-1][len(result["response"]) :]:
            axis.set_axis_off()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=100, seeds=3, output_dir=Path("outputs/study_directions"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    options: argparse.Namespace = parse_options(parser, argv)
    check_tasks(options.tasks, options.data, plain=True)
    rules = {name: Rule.from_pretrained(SHIPPED_RULES / name) for name in ("paper-cnn", "default")}
    tasks: dict[str, Any] = {}
    for name in options.tasks:
        task = subspace_task(name, options.data, options.tasks_dir)
        momentum = arms_of("default", rules["default"], options.steps, task.basis.layout)["subspace_momentum"]
        arms = {"momentum": momentum}
        for of, rule in rules.items():
            arms[f"SL2O ({of})"] = TaskArm(learned(rule, options.steps), (1.0,), key=f"rule-{rule.fingerprint}")
        cache = options.output_dir / "runs"
        tuned = compare_on(task, arms, options.steps, seeds=options.seeds, schedule="constant", cache=cache)
        runs = {}
        for arm in arms:
            rate = tuned[arm]["learning_rate"]
            runs[arm] = {
                "learning_rate": rate, "final_eval_loss": tuned[arm]["final_eval_loss"],
                **described(record_path(task, arms[arm].make(rate), options.steps)),
            }  # fmt: skip
            first = sum(runs[arm]["share_of_direction"][:NAMED])
            print(
                f"{name:16} {arm:20} lr {rate:<6g} held-out loss {runs[arm]['final_eval_loss']:.4f}; the first "
                f"{NAMED} directions have {first:.0%} of the squared updates; steps of the last quarter are "
                f"{runs[arm]['last_over_first_quarter']:.2f} of the first's",
                flush=True,
            )
        tasks[name] = {"d": task.basis.dim, "runs": runs}
    m, g = torch.meshgrid(SIDE, SIDE, indexing="ij")
    settings = {"steps": options.steps, "seeds": options.seeds}
    result = {
        "study": "directions", **settings, "arms": list(arms), "tasks": tasks,
        "response": {"SL2O (paper-cnn)": rounded(response(rules["paper-cnn"], m, g))},
    }  # fmt: skip
    return finish(result, options.json, plot)


if __name__ == "__main__":
    run_script(main)
