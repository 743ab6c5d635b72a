"""Repeat: the same kind of run again, from the same start, in the subspace of the first one.

    python recipes/studies/repeat.py --data PATH --json recipes/results/study_repeat.json

A GPT-2 and a small ViT, pretrained on one part of their data, are adapted to the other. The first run trains all
weights; 40 directions of it are kept. Then the run is repeated: with another order of the batches (seed); the GPT-2 on
another four fifths of the rows (fold) and on the other half (sample); the ViT with a fifth of the labels random
(noise: the first run was clean; noise, both: it was not). Arms: the shipped rule as it is and AdamW in the subspace;
AdamW of all weights and of LoRA factors; the shipped rule on the factors; AdamW from the weights that the first run
ended at (warm start), where those may be used. Rates are tuned for each length, and for each kind of labels, on
held-out loss. A schedule decays to zero at the end, so each arm gets short runs as well as long ones; the steps to a
loss are the fewest of all its runs. Seconds: a step of each arm is timed in turns with the others. The rows that are
judged are in no run. Killed and started again it goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import Rule, Task, train_on
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.kept.files import keep, kept
from hf_sl2o.experiments.kept.keys import stamp
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.rivals import adamw
from hf_sl2o.experiments.tasks.adaptation import NAMES, Adaptation, Earlier, adaptation, earlier_run, with_weights
from hf_sl2o.experiments.tasks.named import learned
from hf_sl2o.experiments.tasks.problems import check_data
from hf_sl2o.rules import SHIPPED_RULES

DIM = 40
ROUNDS, TIMED = 7, 6  # turns in which a step is timed, and steps of one
FOLDS = 5
SHORT = (25, 50, 100)  # steps in the subspace
LONG = (50, 100)  # of the others, beside --steps
POINTS = (0, 5, 10, 15, 20, 25, 30, 40, 50, 75, 100)  # steps after which the held-out loss is taken
RATES = {"subspace_adamw": (0.03, 0.1, 0.3), "adamw": (3e-4, 1e-3, 3e-3), "lora_adamw": (1e-3, 3e-3, 1e-2),
         "warm_start": (1e-4, 3e-4, 1e-3)}  # fmt: skip
LABELS = {"sl2o": "SL2O (shipped rule)", "subspace_adamw": "AdamW†", "adamw": "AdamW", "lora_adamw": "LoRA + AdamW",
          "lora_sl2o": "LoRA + SL2O (shipped rule)", "warm_start": "warm start"}  # fmt: skip
LOOKS = {"sl2o": ("black", "-"), "subspace_adamw": ("black", "--"), "adamw": ("0.5", "-"),
         "lora_adamw": ("0.5", "--"), "lora_sl2o": ("0.5", ":"), "warm_start": ("0.75", "-.")}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of repeat: what the first run and the repeat train on."""

    name: str
    first: Adaptation
    first_rows: Sequence[int]
    again: Adaptation
    rows: Sequence[int]

    @property
    def slug(self) -> str:
        return self.name.replace(", ", "-")


def kinds_of(of: Adaptation) -> list[Kind]:
    """The repeats of an adaptation: of text with other rows, of images with other labels."""
    order = torch.randperm(of.count, generator=torch.Generator().manual_seed(2)).tolist()
    every, half = list(range(of.count)), of.count // 2

    def without(fold: int) -> list[int]:
        return [row for place, row in enumerate(order) if place % FOLDS != fold]

    seed = Kind("seed", of, every, of, every)
    if of.relabelled is None:
        fold = Kind("fold", of, without(0), of, without(1))
        return [seed, fold, Kind("sample", of, order[:half], of, order[half:])]
    noisy = of.relabelled(21)
    noise = Kind("noise", of, every, noisy, every)
    return [seed, noise, Kind("noise, both", of.relabelled(20), every, noisy, every)]


def arms_of_kind(kind: Kind, earlier: Earlier) -> dict[str, tuple[Task, Callable[[int], TaskArm]]]:
    """Per arm its task, and how an arm of a length is made."""
    rules = {name: Rule.from_pretrained(SHIPPED_RULES / name) for name in ("default", "default-lora")}

    def of_rule(name: str) -> Any:
        rule = rules[name]
        key = f"rule-{rule.fingerprint}"
        return lambda steps: TaskArm(learned(rule, steps), (1.0,), key=key, average=rule.config.average)

    def tuned(name: str) -> Any:
        return lambda steps: TaskArm(adamw, RATES[name])

    folder = f"{kind.again.name}-{kind.slug}"
    subspace = kind.again.task(kind.rows, earlier.basis, name=f"{folder}-subspace")
    full = kind.again.task(kind.rows, name=f"{folder}-full")
    factors = kind.again.task(kind.rows, lora=True, name=f"{folder}-lora")
    warm = with_weights(kind.again, earlier.weights).task(kind.rows, name=f"{folder}-warm")
    arms = {
        "sl2o": (subspace, of_rule("default")), "subspace_adamw": (subspace, tuned("subspace_adamw")),
        "adamw": (full, tuned("adamw")), "lora_adamw": (factors, tuned("lora_adamw")),
        "lora_sl2o": (factors, of_rule("default-lora")), "warm_start": (warm, tuned("warm_start")),
    }  # fmt: skip
    return arms


def points_of(steps: int) -> set[int]:
    """Steps after which the held-out loss is taken: dense where short runs end."""
    return {point for point in POINTS if point < steps} | {*range(150, steps, 50), steps}


def run_kind(
    kind: Kind, earlier: Earlier, options: argparse.Namespace, known: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Every arm at every length; `known`: rates by arm and length that are taken instead of a grid."""
    longer = tuple(sorted({*(length for length in LONG if length < options.steps), options.steps}))
    short = tuple(length for length in SHORT if length <= options.steps) or (options.steps,)
    lengths = {arm: short if arm in ("sl2o", "subspace_adamw") else longer for arm in LABELS}
    metric = kind.again.accuracy
    results: dict[str, Any] = {}
    for arm, (task, make) in arms_of_kind(kind, earlier).items():
        runs = {}
        for steps in lengths[arm]:
            made = make(steps)
            rate = known.get(arm, {}).get(str(steps))
            if rate is not None:
                made = TaskArm(made.make, (rate,), key=made.key, average=made.average)
            cache = options.output_dir / "runs" / str(steps)
            found = compare_on(
                task, {arm: made}, steps, seeds=options.seeds, cache=cache, finalists=1, metric=metric,
                evaluate_at=points_of(steps),
            )[arm]  # fmt: skip
            runs[str(steps)] = {
                "learning_rate": found["learning_rate"], "eval_per_seed": found["eval_per_seed"],
                "final_eval_loss": found["final_eval_loss"],
                "rates_tried": [rate for rate, _ in found["grid"]],
            }  # fmt: skip
        n = task.basis.dim
        best = min(runs.values(), key=lambda run: run["final_eval_loss"])
        results[arm] = {"numbers": n, "bytes": 4 * n, "runs": runs, "best_eval_loss": best["final_eval_loss"]}
        if metric is not None:
            ends = [curve[-1][2] for curve in best["eval_per_seed"]]
            results[arm]["accuracy_per_seed"] = ends
        print(f"{kind.again.name}, {kind.name}: {LABELS[arm]:28} {best['final_eval_loss']:.4f}", flush=True)
    return results


def seconds_a_step(kind: Kind, earlier: Earlier, path: Path) -> dict[str, float]:
    """Of each arm the median of short runs that take turns, kept in `path`."""
    known: dict[str, Any] = kept(path)
    if not known:
        arms = arms_of_kind(kind, earlier)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(ROUNDS):
            for arm, (task, make) in arms.items():
                made = make(TIMED)
                run = train_on(task, made.make(made.learning_rates[0]), TIMED)
                times[arm].append(run["seconds"] / TIMED)
        keep(path, {arm: statistics.median(of) for arm, of in times.items()})
        known = kept(path)
    return known


def steps_to(target: float, arm: Mapping[str, Any]) -> int | None:
    """The fewest steps, over its lengths, after which the mean loss over seeds is at the target."""
    found = []
    for run in arm["runs"].values():
        curves = run["eval_per_seed"]
        means = [
            (points[0][0], sum(point[1] for point in points) / len(points)) for points in zip(*curves, strict=True)
        ]
        found += [step for step, mean in means if mean <= target]
    return min(found, default=None)


def judged(arms: Mapping[str, Any], a_step: Mapping[str, float], first_seconds: float) -> dict[str, Any]:
    """Steps and seconds of each arm to each target, and after how many repeats the first run has paid for itself."""
    targets = {
        f"{name}, {more} %": arms[name]["best_eval_loss"] * (1 + more / 100)
        for name in ("adamw", "lora_adamw") for more in (1, 5)
    }  # fmt: skip
    reached: dict[str, Any] = {}
    for name, target in targets.items():
        steps = {arm: steps_to(target, result) for arm, result in arms.items()}
        seconds = {arm: None if count is None else count * a_step[arm] for arm, count in steps.items()}
        entry: dict[str, Any] = {"loss": target, "steps": steps, "seconds": seconds}
        ours, our_seconds = steps["sl2o"], seconds["sl2o"]
        if ours and our_seconds is not None:
            entry["steps_over_sl2o"] = {arm: count / ours for arm, count in steps.items() if count}
            entry["repeats_until_paid"] = {
                arm: first_seconds / (of - our_seconds)
                for arm, of in seconds.items()
                if arm in ("adamw", "lora_adamw") and of is not None and of > our_seconds
            }
        reached[name] = entry
    return reached


def plot(result: dict[str, Any], path: Path) -> None:
    rows = list(result["tasks"].items())
    columns = max(len(kinds) for _, kinds in rows)
    with canvas(path, len(rows), columns, figsize=(4.3 * columns, 3.8 * len(rows))) as (_, axes):
        for row, (task, kinds) in zip(axes, rows, strict=True):
            for axis, (kind, entry) in zip(row, kinds.items(), strict=False):
                for arm, of_arm in entry["arms"].items():
                    colour, style = LOOKS[arm]
                    for number, run in enumerate(of_arm["runs"].values()):
                        for index, curve in enumerate(run["eval_per_seed"]):
                            points = [(point[0] or 1, point[1]) for point in curve]
                            label = LABELS[arm] if number == index == 0 else "_"
                            axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1,
                                      label=label)  # fmt: skip
                runs = [run for of_arm in entry["arms"].values() for run in of_arm["runs"].values()]
                losses = [point[1] for run in runs for curve in run["eval_per_seed"] for point in curve if point[0]]
                unit = "nats a token" if task.startswith("e2e") else "nats an image"
                axis.set(title=f"{task}, {kind}", xlabel="step (0 at 1)", ylabel=f"held-out loss ({unit})",
                         xscale="log", yscale="log")  # fmt: skip
                if max(run["eval_per_seed"][0][0][1] for run in runs) > 2 * max(losses):  # the start is out of sight
                    axis.set_ylim(0.97 * min(losses), 1.03 * max(losses))
                axis.yaxis.set_major_formatter("{x:.3g}")
                axis.yaxis.set_minor_formatter("{x:.3g}")
            for axis in row[len(kinds) :]:
                axis.set_axis_off()
        axes[0][0].legend(fontsize=7)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=300, seeds=2, output_dir=Path("outputs/study_repeat"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(NAMES), choices=NAMES)
    options = parse_options(parser, argv)
    check_data(options.tasks, options.data, [True] * len(options.tasks))
    if options.steps <= DIM:
        raise ValueError(
            f"--steps is {options.steps}, expected more than {DIM}: as many directions need more snapshots"
        )
    options.output_dir /= stamp(options.data)
    tasks: dict[str, Any] = {}
    for name in options.tasks:
        of = adaptation(name, options.data, options.tasks_dir)
        # by whether labels are noisy: those of the first kind with such labels
        rates: dict[bool, dict[str, dict[str, float]]] = {False: {}, True: {}}
        tasks[name] = {}
        for kind in kinds_of(of):
            where = options.output_dir / "first" / f"{name}-{kind.slug}"
            rate = first_rate(of, options)
            earlier = earlier_run(kind.first, kind.first_rows, where, learning_rate=rate, steps=options.steps, dim=DIM)
            noisy = kind.name.startswith("noise")
            arms = run_kind(kind, earlier, options, rates[noisy])
            rates[noisy] = rates[noisy] or {
                arm: {steps: run["learning_rate"] for steps, run in found["runs"].items()}
                for arm, found in arms.items()
            }
            a_step = seconds_a_step(kind, earlier, options.output_dir / "seconds" / f"{name}-{kind.slug}.json")
            first_seconds = options.steps * a_step["adamw"] + earlier.seconds_of_fit
            tasks[name][kind.name] = {
                "first_run": {
                    "learning_rate": rate, "steps": options.steps, "seconds": first_seconds,
                    "seconds_of_fit": earlier.seconds_of_fit,
                    "basis_bytes": 4 * earlier.basis.dim * earlier.basis.layout.n,
                    "explained_variance": earlier.basis.provenance["explained_variance"],
                },
                "arms": arms, "seconds_a_step": a_step, "targets": judged(arms, a_step, first_seconds),
            }  # fmt: skip
            for target, entry in tasks[name][kind.name]["targets"].items():
                print(f"{name}, {kind.name}: to {entry['loss']:.4f} ({target}) steps {entry['steps']}", flush=True)
    result = {
        "study": "repeat", "steps": options.steps, "seeds": options.seeds, "folds": FOLDS, "tasks": tasks,
    }  # fmt: skip
    return finish(result, options.json, plot)


def first_rate(of: Adaptation, options: argparse.Namespace) -> float:
    """AdamW's rate of the first run: the best of the grid on it, of runs that are no repeat."""
    task = of.task(range(of.count), name=f"{of.name}-first")
    found = compare_on(
        task, {"adamw": TaskArm(adamw, RATES["adamw"])}, options.steps, seeds=1,
        cache=options.output_dir / "runs" / "first", finalists=1, evaluate_at={options.steps},
    )  # fmt: skip
    return float(found["adamw"]["learning_rate"])


if __name__ == "__main__":
    run_script(main)
