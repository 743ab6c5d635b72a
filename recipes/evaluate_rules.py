"""Judges the shipped rules on networks and data that they never saw, beside tuned optimizers in the same coordinates.

    python recipes/evaluate_rules.py --what default --data PATH --json recipes/results/rule_default.json
    python recipes/evaluate_rules.py --what default-lora --data PATH --json recipes/results/rule_default_lora.json
    python recipes/evaluate_rules.py --what pretrained --set aside --data PATH --json recipes/results/pretrained.json

`default`: 40 coefficients in whitened units. The rule is not tuned; AdamW (whitened), momentum and SGD (the better of
whitened and orthonormal units) are, on validation; so are AdamW in a random subspace and in the full space.
`default-lora`: the scalars of LoRA factors. AdamW with its tuned rate and with its usual 2e-4, and momentum.
The rule is evaluated at its running average, as in a Trainer, and without; AdamW and momentum too. Every learning rate
decays linearly to zero. Killed and started again it goes on.
`pretrained`: networks of released weights, beside optimizers that promise no tuning at their authors' defaults, and
AdamW tuned. With `--learning_rates 0.1 0.3 1 3` the rule's arm also at rates that are wrong. It needs
`pip install "hf-sl2o[judge]"`. Each run of an arm is kept, so that another rule runs its own arm only; processes on
different `--tasks` may share `--output_dir`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from hf_sl2o import Rule
from hf_sl2o.experiments.command_line.flags import load_named, parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import plot_cells, plot_tasks
from hf_sl2o.experiments.judging import OURS, TOLERANCE, beside, geometric_mean, judge, over_cells, spread, summary
from hf_sl2o.experiments.kept.files import read_object
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.rivals import RIVALS, TUNED, check_rivals, versions
from hf_sl2o.experiments.tasks.named import (
    arms_of,
    check_tasks,
    full_space_loss,
    learned,
    lora_task,
    named_task,
)
from hf_sl2o.rules import SHIPPED_RULES

# Fixed before the rules were trained; none is in recipes/meta_train.py.
UNSEEN = {
    "default": ("cifar-resnet8", "cifar-vit", "docs-gru"),
    "default-lora": ("e2e-gpt2", "cifar-vit", "code-llama"),
}


# Fixed before any rule was judged on them. Those aside are never used for choosing among rules.
SETS = {
    "choosing": (
        "lite0-cifar-lora8@16", "lite0-cifar-own-lora4x1@16", "cifar-vit-of-192-lora16", "docs-gpt2-of-256-lora8@4",
    ),
    "aside": (
        "minilm-food-lora8@16", "minilm-match-lora4x1@8", "lite1-cifar-lora16x1@32", "lite2-cifar-lora8x4@8",
        "minilm-area-lora16@4", "docs-gpt2-of-768-lora8@2",
    ),
}  # fmt: skip
#: Flags of `pretrained`, and what they are where they are not given.
ITS_OWN: dict[str, Any] = {"set": "choosing", "lengths": [100, 300], "arms": [*OURS, *RIVALS], "learning_rates": []}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=200, seeds=3, rank=8, output_dir=Path("outputs/evaluate_rules"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--what", choices=[*sorted(UNSEEN), "pretrained"], default="default")
    parser.add_argument("--rule", help="a folder or Hub id; default: the shipped rule of that name")
    parser.add_argument("--tasks", nargs="+", help="default: the unseen ones, or those of --set")
    parser.add_argument("--set", choices=SETS, help="of pretrained: whose tasks; default: choosing")
    parser.add_argument("--lengths", nargs="+", type=int, help="of pretrained: steps; default: 100 300")
    parser.add_argument("--arms", nargs="+", choices=ITS_OWN["arms"], help="of pretrained; default: all")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="of pretrained: the rule at each of them too")
    options = parse_options(parser, argv)
    if options.what == "pretrained":
        return judge_pretrained(options)
    for flag in ITS_OWN:
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is of --what pretrained, and --what is {options.what}; leave one of them out")
    names = options.tasks or UNSEEN[options.what]
    check_tasks(names, options.data, plain=True, lora=options.what == "default-lora")
    where = options.rule or SHIPPED_RULES / options.what
    rule = load_named("rule", where, lambda: Rule.from_pretrained(where))
    provenance(options.rule or SHIPPED_RULES / options.what)  # what is wrong with it is said before
    results: dict[str, Any] = {}
    for name in names:
        if options.what == "default":
            task = named_task(name, options.data, options.tasks_dir)
        else:
            task = lora_task(name, options.data, options.tasks_dir, options.rank)
        arms, cache = arms_of(options.what, rule, options.steps, task.basis.layout), options.output_dir / options.what
        runs = compare_on(task, arms, options.steps, seeds=options.seeds, cache=cache)
        results[task.name] = {"d": task.basis.dim, "runs": runs, "levels": judge(runs)}
        if options.what == "default":
            results[task.name]["full_space_loss"] = full_space_loss(name, options.data, options.tasks_dir)
        print(f"{task.name} (d = {task.basis.dim:,})")
        for arm, run in runs.items():
            print(f"  {arm:30} lr {run['learning_rate']:<8g} final held-out loss {run['final_eval_loss']:.4f}")
        for level, entry in results[task.name]["levels"].items():
            steps = {arm: entry["steps_of_mean"][arm] for arm in (*OURS, level) if arm in runs}
            print(f"  to {level}'s {entry['loss']:.4f} (+1 %): " + ", ".join(f"{k} {v}" for k, v in steps.items()))
    result = {
        "recipe": {"what": options.what, "steps": options.steps, "seeds": options.seeds, "tolerance": TOLERANCE},
        "rule": {
            "fingerprint": rule.fingerprint,
            "provenance": provenance(options.rule or SHIPPED_RULES / options.what),
        },
        "tasks": results,
        "summary": summary(results),
    }
    for level, entry in result["summary"].items():
        print(f"mean over tasks, steps over those of {level} to {level}'s final loss: {entry['mean_ratios']}")
    draw = lambda _, path: plot_tasks({name: entry["runs"] for name, entry in results.items()}, path)  # noqa: E731
    return finish(result, options.json, draw)


def judge_pretrained(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm on networks of released weights, at several lengths, beside AdamW tuned: in each, and over all."""
    for flag, default in ITS_OWN.items():
        if getattr(options, flag) is None:
            setattr(options, flag, default)
    names = options.tasks or SETS[options.set]
    check_tasks(names, options.data)
    check_rivals(options.arms)
    where = options.rule or SHIPPED_RULES / "default-lora"
    rule = load_named("rule", where, lambda: Rule.from_pretrained(where))
    rates = [f"sl2o_x{rate:g}" for rate in options.learning_rates]
    data = "embedded" if options.data == "embedded" else "real"
    cells: dict[str, dict[str, Any]] = {}
    for name in names:
        for steps in options.lengths:
            task = named_task(name, options.data, options.tasks_dir)
            runs = compare_on(
                task, arms_beside(rule, steps, options.arms, options.learning_rates), steps, seeds=options.seeds,
                eval_every=steps // 10, cache=options.output_dir / f"pretrained-{data}" / f"steps-{steps}",
            )  # fmt: skip
            cell = cells[f"{task.name}, {steps} steps"] = {"d": task.basis.dim, "runs": runs}
            if TUNED in runs:
                cell |= beside(runs, TUNED)
            print(f"{task.name} (d = {task.basis.dim:,}), {steps} steps")
            for arm, run in runs.items():
                print(
                    f"  {arm:16} lr {run['learning_rate']:<8g} {run['final_eval_loss']:.4f}" + shares(cell, arm),
                    flush=True,
                )
    result: dict[str, Any] = {
        "recipe": {
            "what": options.what, "tasks": list(names), "lengths": options.lengths, "seeds": options.seeds,
            "arms": options.arms, "learning_rates": options.learning_rates, "tolerance": TOLERANCE, "data": data,
            "packages": versions(),
        },
        "rule": {"fingerprint": rule.fingerprint, "provenance": provenance(where)},
        "cells": cells,
        "summary": {},
    }  # fmt: skip
    if TUNED in options.arms:
        groups = {"all": cells} | {
            f"{steps} steps": {name: cell for name, cell in cells.items() if name.endswith(f", {steps} steps")}
            for steps in options.lengths
        }
        result["summary"] = {group: over_cells(of, TUNED, rates) for group, of in groups.items()}
        for arm, entry in result["summary"]["all"].items():
            print(f"{arm:16} " + ", ".join(f"{key} {value}" for key, value in entry.items()))
    if rates:
        spreads = {name: spread([runs_loss(cell, arm) for arm in rates]) for name, cell in cells.items()}
        result["spread_over_rates"] = {"cells": spreads, "geometric_mean": geometric_mean(list(spreads.values()))}
        print(f"largest over smallest final loss at {', '.join(rates)}: {result['spread_over_rates']}")
    columns = len(options.lengths) if len(options.lengths) > 1 else min(3, len(cells))
    draw = lambda _, path: plot_cells({name: cell["runs"] for name, cell in cells.items()}, columns, path)  # noqa: E731
    return finish(finite(result), options.json, draw)


def arms_beside(rule: Rule, steps: int, names: list[str], rates: list[float]) -> dict[str, TaskArm]:
    """The arms of these names, and the rule's at further rates; a run at rate 1 is that of the first."""
    last = TaskArm(learned(rule, steps), (1.0,), key=f"rule-{rule.fingerprint}")
    ours = dataclasses.replace(last, average=rule.config.average)
    arms = {"sl2o": ours, "sl2o_last": last, **RIVALS}
    return {name: arms[name] for name in names} | {
        f"sl2o_x{rate:g}": dataclasses.replace(ours, learning_rates=(rate,)) for rate in rates
    }


def runs_loss(cell: dict[str, Any], arm: str) -> float | None:
    loss: float = cell["runs"][arm]["final_eval_loss"]
    return loss if math.isfinite(loss) else None


def shares(cell: dict[str, Any], arm: str) -> str:
    if "ratio" not in cell:
        return ""
    ratio, share = cell["ratio"][arm], cell["share_of_steps"][arm]
    reached = "never there" if share is None else f"there after {share:.0%} of the steps"
    return "  diverged" if ratio is None else f"  {ratio:.3f} of {TUNED}'s, {reached}"


def finite(value: Any) -> Any:
    """JSON has no NaN: where a run diverged stands None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def provenance(folder: str | Path) -> Any:
    path = Path(folder) / "provenance.json"
    if not path.is_file():
        return None
    known = read_object(path)
    return {key: known[key] for key in ("command", "tasks", "seconds") if key in known}


if __name__ == "__main__":
    run_script(main)
