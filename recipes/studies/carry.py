"""Carry over: how far a basis of some runs goes on slices of the data, and on other data, that they never saw.

    python recipes/studies/carry.py --data PATH --json recipes/results/study_carry.json

A GPT-2 and a small ViT are adapted to slices: restaurants of one kitchen; images that were turned, made negative or
blurred. Bases are taken from adaptations to one slice, and to several in one PCA. They are used on two slices that
were not among them, and on data of another kind (Python's help topics; generated figures), beside a basis of the
target's own earlier run, random directions, AdamW of all weights, and LoRA. Rates are tuned on held-out loss; the
shipped rules are taken as they are. Killed and started again it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sl2o import Basis, RandomBasis, Rule, Task, Trajectory, fit_basis
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.kept.files import made_once
from hf_sl2o.experiments.kept.keys import stamp
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.rivals import adamw
from hf_sl2o.experiments.tasks.adaptation import FIGURES, TOPICS, Adaptation, adaptation, earlier_run
from hf_sl2o.experiments.tasks.named import learned
from hf_sl2o.experiments.tasks.problems import check_data
from hf_sl2o.experiments.tasks.recorded import record
from hf_sl2o.rules import SHIPPED_RULES

DIM = 40
RATE = 1e-3  # AdamW's, of the runs that bases are taken from
RECORDED = 300  # steps of these
SOURCES = {
    "e2e-gpt2": ("French", "Indian", "Italian", "Japanese"),
    "cifar-vit": ("rotated", "negative", "blurred"),
}  # fmt: skip
TARGETS = {
    "e2e-gpt2": ("English", "Chinese", TOPICS),
    "cifar-vit": ("upright", "upside down", FIGURES),
}  # fmt: skip
SUBSPACE, ORTHONORMAL = (0.03, 0.1, 0.3), (0.1, 0.3, 1.0)
FULL, FACTORS = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)


def rows_of(of: Adaptation) -> range:
    return range(of.count)


def source_bases(slices: Mapping[str, Adaptation], where: Path) -> dict[str, Basis]:
    """Bases of the first slice alone, and of all: of as many directions, and of as many for each slice."""

    def work() -> dict[str, Any]:
        trajectory = Trajectory(where / "trajectory")
        trajectory.clear()
        steps: list[int] = []
        for place, (name, of) in enumerate(slices.items()):
            record(
                trajectory, of.build, of.loss, lambda seed, of=of: of.batches(rows_of(of), seed),  # type: ignore[misc]
                learning_rate=RATE, steps=RECORDED, name=f"adapt to {name}", after=place * (RECORDED + 1),
            )  # fmt: skip
            steps = steps or trajectory.steps
        fitted = {
            "one source": fit_basis(trajectory, DIM, steps=steps, progress=False),
            f"{len(slices)} sources": fit_basis(trajectory, DIM, progress=False),
            f"{len(slices)} sources, d = {DIM * len(slices)}": fit_basis(
                trajectory, DIM * len(slices), progress=False
            ),
        }  # fmt: skip
        for number, basis in enumerate(fitted.values()):
            basis.save_pretrained(where / "made" / str(number))
        trajectory.delete()
        return {"bases": list(fitted)}

    known = made_once(where / "done.json", f"{list(slices)} {RATE:g} {RECORDED} {DIM}", work, where / "made")
    return {name: Basis.from_pretrained(where / "made" / str(number)) for number, name in enumerate(known["bases"])}


def arms_on(target: Adaptation, bases: Mapping[str, Basis], steps: int) -> dict[str, tuple[Task, TaskArm]]:
    """Every basis with the shipped rule and with AdamW; random directions; all weights; LoRA factors."""
    rules = {name: Rule.from_pretrained(SHIPPED_RULES / name) for name in ("default", "default-lora")}

    def of_rule(name: str) -> TaskArm:
        rule = rules[name]
        return TaskArm(
            learned(rule, steps), (1.0,), key=f"rule-{rule.fingerprint}", average=rule.config.average
        )  # fmt: skip

    rows = rows_of(target)
    full, factors = target.task(rows), target.task(rows, lora=True, name=f"{target.name}-lora")
    random = RandomBasis(next(iter(bases.values())).layout, DIM, seed=1).to_dense()
    arms: dict[str, tuple[Task, TaskArm]] = {}
    for name, basis in bases.items():
        task = target.task(rows, basis, name=f"{target.name}-{name}")
        arms[f"SL2O, basis of {name}"] = task, of_rule("default")
        arms[f"AdamW†, basis of {name}"] = task, TaskArm(adamw, SUBSPACE)
    task = target.task(rows, random, name=f"{target.name}-random")
    arms["AdamW†, random basis"] = task, TaskArm(adamw, ORTHONORMAL, "orthonormal")
    arms["AdamW, all weights"] = full, TaskArm(adamw, FULL)
    arms["LoRA + AdamW"] = factors, TaskArm(adamw, FACTORS)
    arms["LoRA + SL2O"] = factors, of_rule("default-lora")
    return arms


def run_target(target: Adaptation, bases: Mapping[str, Basis], options: argparse.Namespace) -> dict[str, Any]:
    """Final held-out losses and curves of every arm on a target."""
    results: dict[str, Any] = {}
    for name, (task, arm) in arms_on(target, bases, options.steps).items():
        cache = options.output_dir / "runs"
        run = compare_on(
            task, {"rule" if name.startswith(("SL2O", "LoRA + SL2O")) else "adamw": arm}, options.steps,
            seeds=options.seeds, cache=cache, finalists=1,
        )  # fmt: skip
        (found,) = run.values()
        results[name] = {
            "numbers": task.basis.dim, "learning_rate": found["learning_rate"], "eval": found["eval"],
            "final_eval_loss": found["final_eval_loss"],
            "final_per_seed": [curve[-1][1] for curve in found["eval_per_seed"]],
        }  # fmt: skip
        start = found["eval"][0][1]
        print(f"{target.name}: {name:40} {start:.3f} -> {found['final_eval_loss']:.4f}", flush=True)
    start = results["AdamW, all weights"]["eval"][0][1]
    best = results["AdamW, all weights"]["final_eval_loss"]
    for entry in results.values():
        # 0: the loss of the start, 1: that of AdamW of all weights
        entry["share_of_the_way"] = (start - entry["final_eval_loss"]) / (start - best)
    return results


def plot(result: dict[str, Any], path: Path) -> None:
    columns = max(len(of["targets"]) for of in result["tasks"].values())
    rows = len(result["tasks"])
    with canvas(path, rows, columns, figsize=(5.6 * columns, 4.2 * rows), sharey="row") as (_, axes):
        for row, (task, of) in zip(axes, result["tasks"].items(), strict=True):
            for axis, (target, arms) in zip(row, of["targets"].items(), strict=False):
                names = list(reversed(arms))
                for place, name in enumerate(names):
                    learned_rule = "SL2O" in name
                    axis.plot(
                        arms[name]["final_per_seed"], [place] * len(arms[name]["final_per_seed"]), "o",
                        color="black" if learned_rule else "white", markeredgecolor="black",
                    )  # fmt: skip
                axis.axvline(arms[names[0]]["eval"][0][1], color="0.5", linestyle=":", linewidth=1)
                axis.set_yticks(range(len(names)), names, fontsize=7)
                unit = "nats a token" if task.startswith("e2e") else "nats an image"
                axis.set(title=f"{task}: {target}", xscale="log",
                         xlabel=f"held-out loss ({unit}); dotted: the start; full: the shipped rule")  # fmt: skip
                axis.xaxis.label.set_size(8)
                axis.xaxis.set_major_formatter("{x:.3g}")
                axis.xaxis.set_minor_formatter("{x:.3g}")
                axis.grid(alpha=0.3, axis="y")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=100, seeds=2, output_dir=Path("outputs/study_carry"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    options = parse_options(parser, argv)
    check_data(options.tasks, options.data, [True] * len(options.tasks))
    options.output_dir /= stamp(options.data)
    tasks: dict[str, Any] = {}
    for name in options.tasks:
        slices = {of: adaptation(name, options.data, options.tasks_dir, of) for of in SOURCES[name]}
        bases = source_bases(slices, options.output_dir / "bases" / f"{name}-sources")
        targets = {}
        for of in TARGETS[name]:
            target = adaptation(name, options.data, options.tasks_dir, of)
            where = options.output_dir / "bases" / target.name.replace(", ", "-")
            own = earlier_run(target, rows_of(target), where, learning_rate=RATE, steps=RECORDED, dim=DIM)
            targets[of] = run_target(target, {"its own earlier run": own.basis, **bases}, options)
        tasks[name] = {"sources": list(slices), "targets": targets}
    result = {"study": "carry", "steps": options.steps, "seeds": options.seeds, "d": DIM, "tasks": tasks}
    return finish(result, options.json, plot)


if __name__ == "__main__":
    run_script(main)
