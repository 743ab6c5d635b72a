"""Bias and variance of the meta-gradient's estimators, against back-propagation through the whole run.

    python recipes/studies/estimators.py --json recipes/results/study_estimators.json

Problem: a rule that has been trained a little drives N steps on a quadratic and on a small network. The reference is
`SecondOrder` with T = N, checked against finite differences by the tests. Each estimator gives the sum of its windows'
gradients over the run, for several draws of what it draws itself (PES' noise, the subset of coordinates), on the same
batches. Reported: the cosine of the mean with the reference, the bias |mean - reference| / |reference|, and the
standard deviation of one draw / |reference|.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import PES, FirstOrder, Layout, LSTMRule, RandomBasis, RuleConfig, SecondOrder, Task
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.tasks.problems import PROBLEMS
from hf_sl2o.meta.estimators import Estimator
from hf_sl2o.meta.task import InnerRun

DIM = 20


def task_of(name: str) -> Task:
    problem = PROBLEMS[name]("embedded")
    basis = RandomBasis(Layout.from_named_parameters(problem.build_model().named_parameters()), DIM, seed=1).to_dense()
    return Task(name, problem.build_model, lambda seed: problem.batches("all", seed), problem.loss, basis)


def gradient(rule: LSTMRule, task: Task, estimator: Estimator, steps: int, window: int, draw: int) -> torch.Tensor:
    """The summed gradient of a run of `steps` in windows, flat."""
    runs = [InnerRun(task, seed=0) for _ in range(estimator.runs)]
    carry = estimator.begin(rule, runs)
    total = torch.zeros(sum(p.numel() for p in rule.parameters()))
    for start in range(0, steps, window):
        generator = torch.Generator().manual_seed(1_000_003 * draw + start)
        of = estimator.window(rule, runs, carry, [1.0] * window, total_steps=steps, generator=generator)
        carry, total = of.carry, total + torch.cat([g.reshape(-1) for g in of.gradients])
    return total


def study(name: str, steps: int, draws: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    task, rule = task_of(name), LSTMRule(RuleConfig(output_scale=0.1))
    reference = gradient(rule, task, SecondOrder(), steps, steps, 0)
    rows = []
    windows = sorted({t for t in (5, 10, 20, steps) if steps % t == 0})
    plan: list[tuple[str, Estimator, int, int]] = [
        *((f"first-order, T = {t}", FirstOrder(), t, 1) for t in windows),
        *((f"second-order, T = {t}", SecondOrder(), t, 1) for t in windows),
        *((f"first-order, {k} of {DIM} coordinates, T = 10", FirstOrder(k), 10, draws) for k in (5, 10)),
        *((f"PES sigma {s}, T = {t}", PES(s), t, draws) for s in (0.01, 0.1) for t in (5, steps)),
    ]
    for label, estimator, window, repeats in plan:
        start = time.perf_counter()
        samples = torch.stack([gradient(rule, task, estimator, steps, window, draw) for draw in range(repeats)])
        mean = samples.mean(dim=0)
        spread = (samples - mean).square().sum(dim=1).mean().sqrt() if repeats > 1 else torch.zeros(())
        rows.append(
            {
                "problem": name,
                "estimator": label,
                "window": window,
                "draws": repeats,
                "cosine": float(torch.nn.functional.cosine_similarity(mean, reference, dim=0)),
                "bias": float((mean - reference).norm() / reference.norm()),
                "deviation_of_a_draw": float(spread / reference.norm()),
                "standard_error_of_mean": float(spread / reference.norm() / repeats**0.5),
                "seconds_per_run": (time.perf_counter() - start) / repeats,
            }
        )
        print("{problem:12} {estimator:44} cosine {cosine:+.3f}  bias {bias:.3f}  deviation {deviation_of_a_draw:.3g}"
              .format(**rows[-1]), flush=True)  # fmt: skip
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    with canvas(path, 1, len(problems), figsize=(7 * len(problems), 5)) as (figure, axes):
        for axis, problem in zip(axes[0], problems, strict=True):
            chosen = [row for row in rows if row["problem"] == problem]
            y = range(len(chosen))
            axis.barh([i + 0.2 for i in y], [max(row["bias"], 1e-7) for row in chosen], 0.4, label="|mean - exact|")
            spreads = [max(row["deviation_of_a_draw"], 1e-7) for row in chosen]
            axis.barh([i - 0.2 for i in y], spreads, 0.4, label="standard deviation of a draw")
            # What of |mean - exact| sampling alone explains: for PES all of it.
            errors = [max(row["standard_error_of_mean"], 1e-7) for row in chosen]
            axis.plot(errors, [i + 0.2 for i in y], "k|", markersize=11, label="standard error of the mean")
            axis.set_yticks(list(y), [row["estimator"] for row in chosen], fontsize=8)
            axis.set(xscale="log", xlim=(1e-3, None), title=problem, xlabel="share of the exact meta-gradient's norm")
            axis.invert_yaxis()
            axis.grid(alpha=0.3, axis="x")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(__doc__, steps=40)
    parser.add_argument("--problems", nargs="+", default=["quadratic", "digits-mlp"])
    parser.add_argument("--draws", type=int, default=1000, help="of an estimator that draws")
    options = parse_options(parser, argv)
    for name in options.problems:
        if name not in PROBLEMS:
            raise ValueError(f"--problems has {name!r}, expected any of {', '.join(PROBLEMS)}")
    if options.steps % 10:
        raise ValueError(f"--steps is {options.steps}, expected a multiple of 10: windows have 5 and 10 steps")
    rows = [row for name in options.problems for row in study(name, options.steps, options.draws)]
    settings = {"problems": options.problems, "steps": options.steps, "draws": options.draws, "dim": DIM}
    return finish({"study": "estimators", **settings, "rows": rows}, options.json, plot)


if __name__ == "__main__":
    run_script(main)
