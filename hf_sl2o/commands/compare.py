"""Compares a learned rule with tuned optimizers on tasks that come with the package, in the same coordinates.

    hf-sl2o compare first-look --tasks digits-mlp --rule default --steps 100 --seeds 2

The rule is not tuned. Each other arm has the best learning rate of a grid, by held-out loss over all seeds. OUTPUT
gets comparison.json, comparison.png and every run. Interrupted, the same command goes on; another rule runs its own
arm only. The tasks are named as for hf-sl2o meta-train. For a network and data of your own use Comparison from Python
(docs/compare.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..experiments.environment import environment
from ..experiments.figures import plot_tasks
from ..experiments.judging import OURS, TOLERANCE, judge
from ..experiments.on_task import TaskArm, compare_on
from ..experiments.tasks.named import arms_of, named_task
from ..foundation.checked import check_integer
from ..foundation.files import load_json, save_json
from ..meta import Task
from ..rules import Rule, load_rule
from ..subspace import IdentityBasis
from .folders import check_kept
from .settings import add_config, check_names, check_task_names, merged
from .words import finite, human_time, known

_DEFAULTS: dict[str, Any] = {
    "tasks": ["digits-mlp"], "rule": None, "arms": None, "steps": 200, "seeds": 3, "data": "embedded",
}  # fmt: skip
_RESULT = "comparison.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder that keeps runs and results")
    add_config(parser)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="built-in tasks (digits-mlp)")
    parser.add_argument("--rule", metavar="RULE", help="a folder, a Hub id, or one that ships (the task's default)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of the others, such as subspace_adamw (all)")
    parser.add_argument("--steps", type=int, metavar="N", help="of each run (200)")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of an arm at its best rates (3)")
    parser.add_argument("--data", metavar="PATH", help="embedded (default), or a folder with e2e_nlg and cifar10")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs what is missing of the comparison, and writes it."""
    settings, output, start = merged(arguments, _DEFAULTS), arguments.output, time.perf_counter()
    names, data = check_names(settings["tasks"], "--tasks"), str(settings["data"])
    check_task_names(names, data)
    for name in ("steps", "seeds"):
        check_integer(f"--{name}", settings[name], 1, 10**9)
    _check_output(output)
    tasks = [named_task(name, data, output / "tasks") for name in names]
    given = None if settings["rule"] is None else load_rule(str(settings["rule"]), with_basis=True)
    chosen = {task.name: _arms(task, given, settings) for task in tasks}  # what is wrong is said before any run
    results = {task.name: _compare(task, *chosen[task.name], settings, output) for task in tasks}
    result = {
        "recipe": {**settings, "tolerance": TOLERANCE},
        "tasks": results,
        "seconds": time.perf_counter() - start,
        "environment": environment(),
    }
    result = finite(result)
    save_json(output / _RESULT, result)
    drawn = _draw(results, output / "comparison.png")
    text = [_table(name, entry) for name, entry in result["tasks"].items()]
    files = f"{output / _RESULT}{drawn}, after {human_time(result['seconds'])}."
    return {"output": str(output), **result}, "\n\n".join([*text, files])


def _arms(task: Task, given: Rule | None, settings: dict[str, Any]) -> tuple[Rule, dict[str, TaskArm]]:
    """The rule and the arms of a task."""
    in_basis = not isinstance(task.basis, IdentityBasis)
    rule = load_rule(None, with_basis=in_basis) if given is None else given
    arms = arms_of("default" if in_basis else "default-lora", rule, settings["steps"], task.basis.layout)
    if settings["arms"] is None:
        return rule, arms
    others = [known(f"an arm of {task.name}", name, arms) for name in check_names(settings["arms"], "--arms")]
    if not set(others) - set(OURS):
        raise ValueError(f"--arms has {', '.join(others)}, and the rule runs always; name what it is compared with")
    return rule, {name: arm for name, arm in arms.items() if name in (*OURS, *others)}


def _check_output(output: Path) -> None:
    """Raises `ValueError` where OUTPUT is no folder of an earlier start and not a new one."""
    made = load_json(output / _RESULT, dict) if (output / _RESULT).is_file() else {}
    if not {"recipe", "tasks"} <= made.keys():  # that of Comparison has "runs"
        runs = [path.name for path in output.glob("runs*")]
        check_kept("OUTPUT", output, ("tasks", *runs), "comparison of this command")


def _compare(
    task: Task, rule: Rule, arms: dict[str, TaskArm], settings: dict[str, Any], output: Path
) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    with tqdm(total=len(arms), unit="arm", desc=task.name) as bar:
        for name, arm in arms.items():
            told = dataclasses.replace(arm, make=_telling(bar, name, arm.make), key=arm.key or name)
            where = {"seeds": settings["seeds"], "cache": output / "runs"}
            try:
                runs |= compare_on(task, {name: told}, settings["steps"], **where)
            except FloatingPointError as error:
                lost = f"{name} diverged on {task.name}; give another rule, or leave the task out ({error})"
                raise RuntimeError(lost) from error
            bar.update()
    levels = judge(runs)
    shipped = {"fingerprint": rule.fingerprint, "config": dataclasses.asdict(rule.config)}
    return {"d": task.basis.dim, "rule": shipped, "runs": runs, "levels": levels}


def _telling(bar: Any, name: str, make: Callable[[float], Any]) -> Callable[[float], Any]:
    """As `make`, and the bar says which rate is run."""

    def told(lr: float) -> Any:
        bar.set_postfix_str(f"{name}, rate {lr:g}")
        return make(lr)

    return told


def _draw(results: dict[str, Any], path: Path) -> str:
    """Draws the figure where there is matplotlib, and says where it is."""
    try:
        plot_tasks({name: entry["runs"] for name, entry in results.items()}, path)
    except ImportError as error:
        print(error, file=sys.stderr)
        return ""
    return f" and {path.name}"


def _table(task: str, entry: dict[str, Any]) -> str:
    runs, levels = entry["runs"], entry["levels"]
    level = min(levels, key=lambda name: _or_inf(levels[name]["loss"]))
    steps = levels[level]["steps_of_mean"]
    wide = max(map(len, runs))
    lines = [
        f"{task}: {entry['d']:,} coordinates",
        f"{'arm':<{wide}}  {'learning rate':>13}  {'held-out loss':>13}  {'steps to ' + level:>{len(level) + 9}}",
    ]
    for name, of_arm in sorted(runs.items(), key=lambda pair: _or_inf(pair[1]["final_eval_loss"])):
        loss = "diverged" if of_arm["final_eval_loss"] is None else f"{of_arm['final_eval_loss']:.4g}"
        reached = "never" if steps[name] is None else f"{steps[name]:g}"
        rate = "not tuned" if name in OURS else f"{of_arm['learning_rate']:g}"
        lines.append(f"{name:<{wide}}  {rate:>13}  {loss:>13}  {reached:>{len(level) + 9}}")
    return "\n".join(lines)


def _or_inf(loss: float | None) -> float:
    return math.inf if loss is None else loss
