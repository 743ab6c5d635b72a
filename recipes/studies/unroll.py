"""Unroll length T and training iterations N (supplement 2.8, figure 6 and table 4), on a network of two cores' size.

    python recipes/studies/unroll.py --json recipes/results/study_unroll.json
    python recipes/studies/unroll.py --task cifar-resnet20 --data PATH --test_steps 39100   # full size

For each T in {5, 10, 15, 20} at N = 1000, and each N in {200, 500, 1000, 2000} at T = 10, a rule with the paper's
constants is meta-trained for 20 episodes and then drives a longer run than most of them saw, from the same start, with
three seeds of meta-training. Each finished part is kept; killed and started again it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import LearnedOptimizer, LSTMRule, MetaTrainer, MetaTrainingArguments, RuleConfig, train_on
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.curves import mean_curve
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.kept.files import keep, kept
from hf_sl2o.experiments.tasks.named import check_tasks, subspace_task


def one(task: Any, folder: Path, t: int, n: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Meta-trains with T = t, N = n and tests; a result that is there is not made again."""
    name = f"T{t}-N{n}-seed{seed}"
    path = folder / f"{name}.json"
    key = [task.name, options.meta_epochs, options.test_steps]
    if (known := kept(path)).get("key") == key:
        return known
    args = MetaTrainingArguments(
        str(folder / name),
        unroll_length=t,
        inner_steps=n,
        meta_epochs=options.meta_epochs,
        eval_every=max(1, options.meta_epochs // 5),
        seed=seed,
        use_cpu=options.use_cpu,
        disable_tqdm=True,
    )
    torch.manual_seed(seed)
    trainer = MetaTrainer(LSTMRule(RuleConfig()), args, [task])
    rule = trainer.train()
    points = sorted({0, *(2**i * 5 for i in range(20) if 2**i * 5 < options.test_steps), options.test_steps})
    test = train_on(task, lambda c: LearnedOptimizer(c, rule), options.test_steps, seed=100, evaluate_at=points)
    seconds = sum(entry["seconds"] for entry in trainer.log_history if "seconds" in entry)
    result = {"key": key, "T": t, "N": n, "seed": seed, "eval": test["eval"], "meta_seconds": seconds}
    keep(path, result)
    print(f"{name}: final held-out loss {test['eval'][-1][1]:.4f}", flush=True)
    return result


def plot(groups: dict[str, dict[int, list[dict[str, Any]]]], path: Path) -> None:
    with canvas(path, 1, 2, figsize=(12, 4.6), sharey=True) as (_, axes):
        for axis, (letter, values) in zip(axes[0], groups.items(), strict=True):
            for index, (value, results) in enumerate(values.items()):
                for result in results:
                    steps, losses = zip(*result["eval"], strict=True)
                    axis.plot(steps, losses, color=f"C{index}", linewidth=0.6, alpha=0.5)
                steps, losses = zip(*mean_curve([result["eval"] for result in results]), strict=True)
                axis.plot(steps, losses, color=f"C{index}", linewidth=2, label=f"{letter} = {value}")
            fixed = "N = 1000" if letter == "T" else "T = 10"
            axis.set(title=f"{letter} varies, {fixed}", xlabel="test step", ylabel="held-out loss", yscale="log")
            axis.set_xscale("symlog", linthresh=5)
            axis.set_xlim(left=0)
            axis.legend()
            axis.grid(alpha=0.3, which="both")


def middle_of(options: argparse.Namespace) -> int:
    """N where T varies."""
    return 1000 if 1000 in options.inner_steps else int(options.inner_steps[-1])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", meta_epochs=20, seeds=3, output_dir=Path("outputs/study_unroll"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--task", default="digits-mlp")
    parser.add_argument("--unroll_lengths", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--inner_steps", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--test_steps", type=int, default=2000)
    parser.add_argument("--use_cpu", action="store_true")
    options = parse_options(parser, argv)
    check_tasks([options.task], options.data, plain=True, flag="task")
    for t, n in [*((t, middle_of(options)) for t in options.unroll_lengths), *((10, n) for n in options.inner_steps)]:
        if n < t:
            raise ValueError(f"--inner_steps has {n}, expected at least the unroll length {t}, which it is run with")
    task = subspace_task(options.task, options.data, options.tasks_dir)
    seeds = range(options.seeds)
    middle = middle_of(options)
    groups = {
        "T": {
            t: [one(task, options.output_dir, t, middle, s, options) for s in seeds] for t in options.unroll_lengths
        },
        "N": {n: [one(task, options.output_dir, 10, n, s, options) for s in seeds] for n in options.inner_steps},
    }
    rows = [
        {
            "letter": letter,
            "value": value,
            "eval": mean_curve([result["eval"] for result in results]),
            "eval_per_seed": [result["eval"] for result in results],
            "final_loss_per_seed": [result["eval"][-1][1] for result in results],
            "meta_seconds": sum(result["meta_seconds"] for result in results) / len(results),
        }
        for letter, values in groups.items()
        for value, results in values.items()
    ]
    settings = {name: getattr(options, name) for name in ("task", "meta_epochs", "test_steps", "seeds")}
    result = {"study": "unroll", **settings, "rows": rows}
    return finish(result, options.json, lambda _, path: plot(groups, path))


if __name__ == "__main__":
    run_script(main)
