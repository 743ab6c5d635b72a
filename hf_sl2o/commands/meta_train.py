"""Meta-trains a rule on the tasks that come with the package.

    hf-sl2o meta-train my-rule --tasks quadratic digits-mlp --inner-steps 200 --meta-epochs 10

The tasks are small networks and data sets. "digits-mlp" moves 40 coefficients of a recorded run of that network,
"digits-mlp-lora4" the LoRA factors of rank 4, "digits-mlp-full" all weights; "@8" after a name cuts batches to 8 rows.
For a network and data of your own use MetaTrainer from Python (docs/guide.md).

Where nothing else is said, a rule for coefficients is built as the shipped "default", and trained by first-order; one
for LoRA factors or all weights as "default-lora", and by pes: its steps change what it sees next.

Interrupted, the same command goes on from the last checkpoint in OUTPUT. At the end OUTPUT is what
optim_args="rule=OUTPUT" and Rule.from_pretrained take.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import types
import typing
from pathlib import Path
from typing import Any

from ..experiments.environment import environment
from ..experiments.kept.keys import stamp
from ..experiments.plans import PLANS
from ..experiments.tasks.named import RECORDED, named_task, parse_task
from ..foundation.checked import check_flag, check_integer, shown
from ..foundation.files import load_json, save_json
from ..meta import PES, Estimator, FirstOrder, MetaTrainer, MetaTrainingArguments, SecondOrder
from ..meta.checkpoints import MANIFEST
from ..rules import Rule, RuleConfig, load_rule
from .folders import check_kept
from .settings import add_config, check_names, check_task_names, merged
from .words import human_time, known

_ESTIMATORS: dict[str, type[Estimator]] = {"first-order": FirstOrder, "second-order": SecondOrder, "pes": PES}
_CHOICES = {
    "meta_loss": ("sum", "log"),
    "lr_scheduler_type": ("constant", "linear"),
    "meta_lr_scheduler_type": ("constant", "cosine"),
    "mixed_precision": ("no", "bf16"),
    "estimator": tuple(_ESTIMATORS),
    "preset": tuple(PLANS),
}
# What a command sets itself, or has no processes for.
_NOT_OFFERED = ("output_dir", "disable_tqdm", "process_timeout")
_FIELDS = [field for field in dataclasses.fields(MetaTrainingArguments) if field.name not in _NOT_OFFERED]
_OWN: dict[str, Any] = {
    "tasks": ["quadratic", "digits-mlp"], "data": "embedded", "preset": None, "rule": None, "estimator": None,
}  # fmt: skip


def _defaults() -> dict[str, Any]:
    values = MetaTrainingArguments("")
    return {**_OWN, **{field.name: getattr(values, field.name) for field in _FIELDS}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder of the rule, and of checkpoints")
    add_config(parser)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"built-in tasks ({' '.join(_OWN['tasks'])})")
    parser.add_argument("--data", metavar="PATH", help="embedded (default), or a folder with e2e_nlg and cifar10")
    parser.add_argument("--rule", metavar="RULE", help="begin at this rule: a folder, a Hub id, or one that ships")
    parser.add_argument("--preset", metavar="NAME", help=f"begin at a new rule, built as {', '.join(PLANS)}")
    parser.add_argument("--estimator", metavar="NAME", help=f"of the meta-gradient: {', '.join(_ESTIMATORS)}")
    hints, values = typing.get_type_hints(MetaTrainingArguments), MetaTrainingArguments("")
    for field in _FIELDS:
        default, flag = getattr(values, field.name), f"--{field.name.replace('_', '-')}"
        if hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", default=None, help=field.metadata["help"])
            continue
        kind, many = _kind(hints[field.name])
        said = "" if default in (None, []) else f" ({default})"
        more: dict[str, Any] = {"nargs": "+"} if many else {}
        # argparse formats its help with %
        text = field.metadata["help"].replace("%", "%%") + said
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text, **more)


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there may be several."""
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), False
    return hint, False


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Meta-trains the rule, or goes on with it."""
    settings, output, start = merged(arguments, _defaults()), arguments.output, time.perf_counter()
    for name, choices in _CHOICES.items():
        if settings[name] is not None:
            known(f"--{name.replace('_', '-')}", str(settings[name]), choices)
    tasks, data = check_names(settings["tasks"], "--tasks"), str(settings["data"])
    check_task_names(tasks, data)
    _choose(settings, tasks)
    for field in _FIELDS:
        if isinstance(field.default, bool):
            check_flag(field.name, settings[field.name])
    args = MetaTrainingArguments(str(output), **{field.name: settings[field.name] for field in _FIELDS})
    rule = _first_rule(settings)
    _check_output(output)
    _check_begun(output, settings, rule)
    trainer = MetaTrainer(
        rule,
        args,
        [named_task(name, data, output / "tasks") for name in tasks],
        estimator=_ESTIMATORS[settings["estimator"]](),
    )
    trainer.train()
    checked = [entry for entry in trainer.log_history if "score" in entry]
    facts = {
        "output": str(output), "tasks": [task.name for task in trainer.tasks], "rule": dataclasses.asdict(rule.config),
        "estimator": repr(trainer.estimator), "settings": {**dataclasses.asdict(args), "output_dir": None},
        "finished": trainer.epoch == args.meta_epochs, "meta_steps": trainer.meta_step, "best_score": trainer.best,
        "validation": checked, "fingerprint": rule.fingerprint, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    if trainer.accelerator.is_main_process:
        # "seconds" are those of this start alone
        made = {name: value for name, value in facts.items() if name not in ("output", "seconds")}
        save_json(output / "provenance.json", {**made, "environment": environment()})
    return facts, _text(facts, output)


def _text(facts: dict[str, Any], output: Path) -> str:
    first, last = facts["validation"][0], min(facts["validation"], key=lambda entry: entry["score"])
    took = human_time(facts["seconds"])
    state = f"after {took}" if facts["finished"] else f"stopped after {took}; the same command goes on"
    lines = [f"{output}: a rule of {facts['meta_steps']:,} meta-steps, {state}.", "", "held-out loss, mean over a run"]
    width = max(map(len, facts["tasks"])) + 2
    for name in facts["tasks"]:
        before, after = first["validation"][name], last["validation"][name]
        lines.append(f"  {name:<{width}}{before:.4g} -> {after:.4g}")
    lines += ["", f"score (lower is better)  {first['score']:.4g} -> {facts['best_score']:.4g}"]
    if last is first:
        lines.append("It is no better than where it began: train longer, or on tasks of its kind.")
    return "\n".join(lines)


def _choose(settings: dict[str, Any], tasks: list[str]) -> None:
    """Fills in what fits the tasks: a rule for coefficients makes steps that are far too long for weights."""
    if settings["rule"] is not None and settings["preset"] is not None:
        raise ValueError("--rule and --preset both say where to begin; leave one of them out")
    of_weights = [bool(parse_task(name)[1]) for name in tasks if not name.endswith(RECORDED)]
    of_weights += [False for name in tasks if name.endswith(RECORDED)]
    if settings["rule"] is None and settings["preset"] is None:
        if len({*of_weights}) > 1:
            raise ValueError(
                "--tasks are some of coefficients and some of LoRA factors or all weights; say by --preset or --rule "
                "which rule is to be trained on both"
            )
        settings["preset"] = "default-lora" if of_weights[0] else "default"
    if settings["estimator"] is None:
        settings["estimator"] = "pes" if all(of_weights) else "first-order"


def _first_rule(settings: dict[str, Any]) -> Rule:
    """The rule that meta-training begins at."""
    import torch

    if settings["rule"] is not None:
        return load_rule(str(settings["rule"]), with_basis=True)
    config: RuleConfig = PLANS[settings["preset"]].config
    check_integer("seed", settings["seed"], 0, (1 << 32) - 1)
    torch.manual_seed(settings["seed"])
    return Rule.from_config(config)


def _check_begun(output: Path, settings: dict[str, Any], rule: Rule) -> None:
    """Raises `ValueError` where an earlier start had other data or began at another rule: no checkpoint says so."""
    path, data = output / "tasks" / "begun.json", str(settings["data"])
    begun = {
        "data": data if data == "embedded" else f"folder-{stamp(str(Path(data).resolve()))}",
        "rule": rule.fingerprint if settings["rule"] is not None else f"preset-{settings['preset']}",
    }
    if not (output / MANIFEST).is_file():
        save_json(path, begun)
    known = load_json(path, dict) if path.is_file() else begun  # earlier versions wrote none
    for name, value in begun.items():
        if known.get(name) != value:
            raise ValueError(
                f"OUTPUT is {output}, where a meta-training began with {name} {shown(known.get(name))}, and this one "
                f"has {value!r}; give a new folder"
            )


def _check_output(output: Path) -> None:
    """Raises `ValueError` where OUTPUT is no folder of an earlier start and not a new one."""
    if not (output / MANIFEST).is_file() or (output / "trajectory.json").is_file():
        check_kept("OUTPUT", output, ("tasks",), "meta-training")
