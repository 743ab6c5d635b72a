"""Expressions that stand for a learned rule (supplement 2.5, table 2, figures 4 and 5), and how they train.

    python recipes/studies/symbolic.py --data PATH --json recipes/results/study_symbolic.json

A rule with the paper's constants is meta-trained on ResNet-20 in the 40 directions of a recorded run. Of its runs
there 10,000 samples of (m~, g~, update) are fitted and 2,000 are kept to test. The table gives the Pareto front of
complexity against error and the paper's three expressions on the same samples, as they are and with numbers fitted
here, and as a ceiling what any function of m~ and g~ reaches (boosted trees): the rest is the LSTM's memory. The
expressions then train the network that the samples are of, and GPT-2, beside the LSTM. Killed and started again it
goes on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_sl2o import LSTMRule, MetaTrainer, MetaTrainingArguments, Rule, RuleConfig, SymbolicRule, Task
from hf_sl2o.analysis.paths import Samples, record_path, samples_of
from hf_sl2o.analysis.scores import score_expression, values_of
from hf_sl2o.analysis.symbolic import fit_symbolic, refit
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.tasks.named import arms_of, check_tasks, learned, subspace_task
from hf_sl2o.rules.config import EXPRESSIONS
from hf_sl2o.rules.expressions import parse

FIT, TEST = 10_000, 2_000  # supplement 2.5
LONGEST = 9  # the complexity of the paper's longest
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))


def meta_trained(task: Task, options: Any) -> Rule:
    """A rule with the paper's constants, meta-trained on the task, from its folder if it is there."""
    args = MetaTrainingArguments(
        str(options.output_dir / "rules" / task.name), inner_steps=options.steps, meta_epochs=options.meta_epochs,
        eval_every=max(1, options.meta_epochs // 4), lr_scheduler_type="linear", meta_lr_scheduler_type="cosine",
        max_grad_norm=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return MetaTrainer(LSTMRule(RuleConfig.preset("paper-cnn")), args, [task]).train()


def ceilings(fit: Samples, test: Samples) -> dict[str, dict[str, float]]:
    """How near any function of m~ and g~, and of one of them alone, comes: boosted trees, on the test samples."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    found = {}
    for name, inputs in (("m~ and g~", ("m", "g")), ("g~ alone", ("g",)), ("m~ alone", ("m",))):
        columns = [np.stack([getattr(part, of).numpy() for of in inputs], axis=1) for part in (fit, test)]
        trees = HistGradientBoostingRegressor(max_iter=300, learning_rate=0.05, random_state=0)
        values = trees.fit(columns[0], fit.delta.numpy()).predict(columns[1])
        found[name] = {
            "mse": float(np.square(values - test.delta.numpy()).mean()),
            "pearson_r": float(np.corrcoef(values, test.delta.numpy())[0, 1]),
        }
    return found


def table_of(fit: Samples, test: Samples, options: Any) -> tuple[list[dict[str, Any]], float]:
    """The Pareto front and the paper's expressions: complexity, error on the fitted samples, R on the others."""
    start = time.perf_counter()
    front = fit_symbolic(
        fit.m, fit.g, fit.delta, generations=options.generations, population=options.population, seed=0
    )
    seconds = time.perf_counter() - start
    texts = [("found", fitted.text, fitted.complexity) for fitted in front]
    for text in EXPRESSIONS.values():
        texts.append(("paper", text, SymbolicRule(RuleConfig(expression=text)).expression.complexity))
    for text in EXPRESSIONS.values():
        fitted = refit(f"1 * ({text}) + 0", fit.m, fit.g, fit.delta)
        texts.append(("paper, refitted", fitted.text, fitted.complexity))
    rows = [
        {
            "from": origin, "expression": text, "complexity": complexity,
            "mse_fit": score_expression(text, fit.m, fit.g, fit.delta)["mse"],
            "pearson_r_test": score_expression(text, test.m, test.g, test.delta)["pearson_r"],
        }
        for origin, text, complexity in texts
    ]  # fmt: skip
    return rows, seconds


def chosen(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The closest that is no longer than the paper's longest, and the closest of all, by the fitted samples."""
    found = [row for row in rows if row["from"] == "found"]
    short = [row for row in found if row["complexity"] <= LONGEST]
    return {
        f"found, at most {LONGEST}": min(short, key=lambda row: row["mse_fit"])["expression"],
        "found, closest": min(found, key=lambda row: row["mse_fit"])["expression"],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    tasks = result["runs"]
    columns = -(-(3 + len(tasks)) // 2)
    with canvas(path, 2, columns, figsize=(6 * columns, 9)) as (_, axes):
        first, second, third, *others = axes.flatten()
        plot_front(first, result)
        sample = {name: np.array(values) for name, values in result["sample"].items()}
        most = np.abs(sample["delta"]).max()
        image = second.scatter(sample["g"], sample["m"], c=sample["delta"], s=5, cmap="RdGy", vmin=-most, vmax=most)
        second.set(title="updates of the LSTM, test samples", xlabel="g~", ylabel="m~")
        second.figure.colorbar(image, ax=second, label="update")
        plot_expressions(third, sample, result["expressions"])
        for axis, (task, runs) in zip(others, tasks.items(), strict=False):
            for (arm, run), style in zip(runs.items(), STYLES, strict=True):
                look = {"color": "black", "linewidth": 2.2} if arm == "LSTM" else {"linewidth": 1.3}
                axis.plot(*zip(*run["eval"], strict=True), linestyle=style, label=arm, **look)
            axis.set(title=f"{task}: the LSTM and expressions", xlabel="step", ylabel="held-out loss", yscale="log")
            axis.yaxis.set_major_formatter("{x:.3g}")
            axis.yaxis.set_minor_formatter("{x:.3g}")
            axis.legend(fontsize=8)
        for axis in others[len(tasks) :]:
            axis.set_axis_off()


def plot_front(axis: Any, result: dict[str, Any]) -> None:
    for origin, mark in (("found", "o-"), ("paper", "s"), ("paper, refitted", "^")):
        rows = [row for row in result["table"] if row["from"] == origin]
        points = sorted((row["complexity"], row["pearson_r_test"]) for row in rows if row["pearson_r_test"])
        axis.plot(*zip(*points, strict=True), mark, color="black" if origin == "found" else "0.55", label=origin)
    for name, style in (("m~ and g~", ":"), ("g~ alone", "-.")):
        of = result["ceilings"][name]["pearson_r"]
        axis.axhline(of, color="0.4", linestyle=style, label=f"any function of {name} (trees)")
    axis.set(title="expressions of the updates", xlabel="complexity", ylabel="Pearson's R on test samples")
    axis.legend(fontsize=8)


def plot_expressions(axis: Any, sample: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    """Test samples against g~, and each expression where m~ is what it is on average at that g~ (a line)."""
    m, g = sample["m"], sample["g"]
    slope = float(m @ g / (g @ g))
    line = torch.linspace(float(g.min()), float(g.max()), 101, dtype=torch.float64)
    axis.plot(g, sample["delta"], ".", color="0.75", markersize=3, label="the LSTM")
    for (name, text), style in zip(texts.items(), STYLES[1:], strict=False):
        axis.plot(line, values_of(parse(text), slope * line, line), linestyle=style, linewidth=1.6, label=name)
    axis.set(title=f"updates and expressions, m~ = {slope:.2f} g~", xlabel="g~", ylabel="update")
    axis.legend(fontsize=8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=200, seeds=3, meta_epochs=10, output_dir=Path("outputs/study_symbolic"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=["cifar-resnet20", "e2e-gpt2"], help="the first is sampled")
    parser.add_argument("--generations", type=int, default=60, help="of the search for expressions")
    parser.add_argument("--population", type=int, default=200, help="of the search for expressions")
    options = parse_options(parser, argv)
    check_tasks(options.tasks, options.data, plain=True)
    tasks = [subspace_task(name, options.data, options.tasks_dir) for name in options.tasks]
    rule = meta_trained(tasks[0], options)
    needed = -(-(FIT + TEST) // (tasks[0].basis.dim * (options.steps - 1)))
    paths = [
        record_path(tasks[0], learned(rule, options.steps)(1.0), options.steps, seed=100 + seed, schedule="linear")
        for seed in range(needed)
    ]
    samples = samples_of(paths, rule, FIT + TEST)
    fit, test = samples.split(FIT)
    rows, seconds = table_of(fit, test, options)
    best = ceilings(fit, test)
    for name, of in best.items():
        print(f"any function of {name} (trees): R {of['pearson_r']:.4f}")
    print(f"{seconds:.0f} s for the front")
    for row in rows:
        print(f"  {row['from']:15} {row['complexity']:3} R {row['pearson_r_test'] or 0:.4f} {row['expression']}")
    texts = {**chosen(rows), **{f"paper, {name}": text for name, text in EXPRESSIONS.items()}}
    runs: dict[str, Any] = {}
    for task in tasks:
        arms = {"LSTM": TaskArm(learned(rule, options.steps), (1.0,), key=f"rule-{rule.fingerprint}")}
        for name, text in texts.items():
            of = SymbolicRule(RuleConfig(expression=text))
            arms[name] = TaskArm(learned(of, options.steps), (1.0,), key=f"rule-{of.fingerprint}")
        tuned = arms_of("default", rule, options.steps, task.basis.layout)
        arms |= {name: tuned[f"subspace_{name}"] for name in ("adamw", "momentum")}
        runs[task.name] = compare_on(task, arms, options.steps, seeds=options.seeds, cache=options.output_dir / "runs")
        lstm = runs[task.name]["LSTM"]["final_eval_loss"]
        for arm, run in runs[task.name].items():
            loss = run["final_eval_loss"]
            print(f"{task.name:16} {arm:22} {loss:.4f}, {loss / lstm:.3f} of the LSTM's", flush=True)
    sample = {name: [float(f"{x:.4g}") for x in getattr(test, name)] for name in ("m", "g", "delta")}
    settings = {
        name: getattr(options, name) for name in ("steps", "seeds", "meta_epochs", "generations", "population")
    }
    result = {
        "study": "symbolic", **settings, "samples": {"fit": FIT, "test": TEST, "of": tasks[0].name}, "table": rows,
        "ceilings": best, "seconds_of_search": seconds, "expressions": texts, "runs": runs, "sample": sample,
    }  # fmt: skip
    return finish(result, options.json, plot)


if __name__ == "__main__":
    run_script(main)
