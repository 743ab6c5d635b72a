"""How the rules that ship were meta-trained: tasks and stages; `recipes/meta_train.py` is the command."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ..foundation.files import save_json
from ..meta import PES, Estimator, FirstOrder, MetaTrainer, MetaTrainingArguments
from ..rules import Rule, RuleConfig
from .command_line.flags import check_flags, check_places
from .environment import environment, portable
from .tasks.named import check_tasks, named_task


@dataclass(frozen=True)
class Stage:
    """One MetaTrainer; it goes on with the rule of the stage before."""

    tasks: tuple[str, ...]  # see named_task
    settings: dict[str, Any]
    estimator: Estimator = FirstOrder()
    still: tuple[str, ...] = ()  # parts of the rule that do not learn in it


@dataclass(frozen=True)
class Plan:
    """What a shipped rule is meta-trained on; evaluate_rules.py judges it on tasks that are not among them."""

    config: RuleConfig
    stages: tuple[Stage, ...]


PAPER: dict[str, Any] = {
    "inner_steps": 1000,
    "unroll_length": 10,
    "meta_epochs": 20,
    "lr_scheduler_type": "constant",
    "meta_lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
OURS: dict[str, Any] = {
    "inner_steps": 200,
    "unroll_length": 20,
    "meta_epochs": 16,
    "eval_every": 2,
    "lr_scheduler_type": "linear",  # what the Trainer does where nobody says otherwise
    "meta_lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
}
# Small and quick ones, of many widths, ranks, alphas and batch sizes, with and without a new head.
SCALE_FREE = (
    "digits-mlp-lora4",
    "digits-mlp-lora16x0.5@16",
    "digits-mlp-of-384-lora8@16",
    "digits-mlp-of-96-lora4x4@8",
    "digits-mlp-full@32",
    "docs-gpt2-of-32-lora8@4",
    "docs-gpt2-of-32-lora16x1@2",
    "figures-vit-lora8@8",
)
# Where alpha is large, so that what elsewhere is a good length is far too long.
TOO_LONG = ("digits-mlp-of-384-lora8x16@8", "digits-mlp-of-96-lora4x32@16", "docs-gpt2-of-32-lora8x16@4")
EVOLVED: dict[str, Any] = {
    "inner_steps": 200,
    "unroll_length": 100,
    "curriculum": [100, 200, 400, 200] * 5,
    "eval_every": 5,
    "lr_scheduler_type": "linear",
    "meta_lr_scheduler_type": "cosine",
    "meta_loss": "log",
    "random_scaling": 1.0,  # of each tensor, and of where the rule begins to look
}
PLANS = {
    "default": Plan(
        RuleConfig(tensor_scale=True, progress=True, average=4.0),  # recipes/studies/average.py
        (
            Stage(
                ("quadratic", "teacher", "teacher@8", "digits-mlp", "digits-mlp@8", "e2e-gpt2@8"),
                {
                    **OURS,
                    "meta_epochs": 40,
                    "meta_loss": "log",
                    "curriculum": [100, 400, 200],  # the rule sees the share of a run that is done: several lengths
                    "random_scaling": 0.5,
                },
            ),
        ),
    ),
    "default-lora": Plan(
        RuleConfig(per_tensor=8, momenta=(0.99,), tensor_scale=True, average=9.0),
        # What the rule sees follows from what it did. A gradient that leaves this out is false here.
        (
            Stage(SCALE_FREE, {**EVOLVED, "meta_epochs": 60, "meta_learning_rate": 0.01}, PES(sigma=0.05), ("lstm",)),
            Stage(SCALE_FREE, {**EVOLVED, "meta_epochs": 30, "meta_learning_rate": 0.003}, PES(sigma=0.03)),
            Stage(
                (*SCALE_FREE, *TOO_LONG),
                {**EVOLVED, "meta_epochs": 40, "meta_learning_rate": 0.01, "random_scaling": 2.0},
                PES(sigma=0.05),
            ),
            Stage(
                (*SCALE_FREE[:-1], "figures-vit-lora8", *TOO_LONG),
                {**EVOLVED, "meta_epochs": 30, "meta_learning_rate": 0.007},
                PES(sigma=0.05),
            ),
        ),
    ),
    # The published constants, T, N and schedule, on a network of two cores' size.
    "paper-cnn": Plan(RuleConfig.preset("paper-cnn"), (Stage(("digits-mlp",), PAPER),)),
    "paper-transformer": Plan(
        RuleConfig.preset("paper-transformer"),
        (Stage(("docs-gpt2-lora4",), {**PAPER, "inner_steps": 200}, FirstOrder(coordinates=2000)),),
    ),
}

# Judged, and not shipped (RESULTS.md): better on its own tasks, far behind on larger networks.
PLANS["default-lora-longer"] = Plan(
    PLANS["default-lora"].config,
    (
        *PLANS["default-lora"].stages,
        Stage(
            PLANS["default-lora"].stages[-1].tasks,
            {
                **EVOLVED,
                "inner_steps": 600,
                "curriculum": [300, 1000, 600] * 7,
                "meta_epochs": 21,
                "eval_every": 3,
                "meta_learning_rate": 0.005,
            },
            PES(sigma=0.05),
        ),
    ),
)


@dataclass
class MetaTrainArguments:
    """What the recipe adds to nothing: a rule, data, and what may be tried instead of the plan."""

    rule: str = field(default="default", metadata={"help": f"One of {', '.join(PLANS)}."})
    data: str = field(default="embedded", metadata={"help": "embedded, or a folder with e2e_nlg and cifar10."})
    output_dir: str = field(default="outputs/meta_train", metadata={"help": "Bases, checkpoints, logs."})
    name: str | None = field(default=None, metadata={"help": "Of the folder in it; default: the rule's."})
    save_to: str | None = field(default=None, metadata={"help": "Also keep the rule and how it was made here."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Instead of the plan's, in every stage."})
    meta_epochs: int | None = field(default=None, metadata={"help": "Instead of the plan's."})
    inner_steps: int | None = field(default=None, metadata={"help": "Instead of the plan's."})
    unroll_length: int | None = field(default=None, metadata={"help": "Instead of the plan's."})
    meta_learning_rate: float | None = field(default=None, metadata={"help": "Instead of the plan's; of Adam."})
    random_scaling: float | None = field(default=None, metadata={"help": "Instead of the plan's."})
    lr_scheduler_type: str | None = field(default=None, metadata={"help": "Instead of the plan's: linear, constant."})
    output_scale: float | None = field(default=None, metadata={"help": "Instead of the plan's."})
    momenta: list[float] | None = field(default=None, metadata={"help": "Instead of the plan's: further momenta."})
    progress: bool | None = field(default=None, metadata={"help": "Instead of the plan's: it sees what is done."})
    tensor_scale: bool | None = field(default=None, metadata={"help": "Instead of the plan's: it sees g / s too."})
    agreement: bool | None = field(default=None, metadata={"help": "Instead of the plan's: do gradients agree?"})
    distance: bool | None = field(default=None, metadata={"help": "Instead of the plan's: how far from the start?"})
    meta_loss: str | None = field(default=None, metadata={"help": "Instead of the plan's: sum, log."})
    seed: int = field(default=0, metadata={"help": "Of the fresh rule, batches and dropout."})
    max_seconds: float | None = field(default=None, metadata={"help": "Stop after so long; a new start goes on."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


#: What may be in the folder of --save_to, which is replaced.
RULE_FILES = {"config.json", "model.safetensors", "README.md", "provenance.json"}


def parse(argv: list[str] | None) -> MetaTrainArguments:
    """Returns the flags; raises `ValueError` or `FileNotFoundError` before any work where one cannot be right."""
    parser = HfArgumentParser(MetaTrainArguments)  # type: ignore[arg-type]
    try:
        (options,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise ValueError(str(error)) from error  # a flag that nobody knows
    check_flags(vars(options))
    if options.rule not in PLANS:
        raise ValueError(f"--rule is {options.rule!r}, expected one of {', '.join(PLANS)}")
    plan = PLANS[options.rule]
    check_tasks([name for stage in plan.stages for name in options.tasks or stage.tasks], options.data)
    config_of(plan, options)
    for stage in plan.stages:
        arguments(stage, Path(options.output_dir), options, time.perf_counter())
    if options.save_to is not None and Path(options.save_to).is_dir():
        if others := sorted({path.name for path in Path(options.save_to).iterdir()} - RULE_FILES):
            raise ValueError(
                f"--save_to is {options.save_to}, a folder that is replaced, and it holds {others[0]!r}; give a new "
                "one, or one of a rule"
            )
    check_places(vars(options))
    return options  # type: ignore[no-any-return]


def config_of(plan: Plan, options: MetaTrainArguments) -> RuleConfig:
    """The plan's rule with what the command line changes."""
    names = ("output_scale", "momenta", "tensor_scale", "progress", "agreement", "distance")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(plan.config, **changes)


def make_rule(argv: list[str] | None = None) -> dict[str, Any]:
    """Meta-trains the rule that a command line asks for, stage by stage; goes on where it was killed.

    Returns:
        What stands in its provenance.json: tasks, settings, scores, and whether all stages are finished.
    """
    options = parse(argv)
    plan, folder = PLANS[options.rule], Path(options.output_dir)
    start, environment_ = time.perf_counter(), environment()
    torch.manual_seed(options.seed)
    rule = Rule.from_config(config_of(plan, options))
    last = folder / (options.name or options.rule)
    stages: list[dict[str, Any]] = []
    for number, stage in enumerate(plan.stages, 1):
        where = last if number == len(plan.stages) else last / f"stage-{number}"
        for name, part in rule.named_children():
            part.requires_grad_(name not in stage.still)
        trainer = MetaTrainer(
            rule,
            arguments(stage, where, options, start),
            [named_task(name, options.data, folder / "tasks") for name in options.tasks or stage.tasks],
            estimator=stage.estimator,
        )
        trainer.train()
        rule.requires_grad_(True)
        stages.append(
            {
                "tasks": [task.name for task in trainer.tasks],
                "estimator": repr(trainer.estimator),
                "still": list(stage.still),
                "settings": {**dataclasses.asdict(trainer.args), "output_dir": None},
                "finished": trainer.epoch == trainer.args.meta_epochs,
                "best_score": trainer.best,
                "validation": [entry for entry in trainer.log_history if "score" in entry],
            }
        )
        if not stages[-1]["finished"]:
            break
    result = {
        "command": " ".join(["python", "recipes/meta_train.py", *portable(sys.argv[1:] if argv is None else argv)]),
        "tasks": list(dict.fromkeys(name for stage in stages for name in stage["tasks"])),
        "rule": dataclasses.asdict(rule.config),
        "finished": len(stages) == len(plan.stages) and stages[-1]["finished"],
        "seconds": time.perf_counter() - start,
        "stages": stages,
        "environment": environment_,
    }
    if trainer.accelerator.is_main_process:
        save_json(last / "provenance.json", result)
        if options.save_to and result["finished"]:
            shutil.rmtree(options.save_to, ignore_errors=True)
            rule.save_pretrained(options.save_to)
            shutil.copy(last / "provenance.json", options.save_to)
    return result


def arguments(stage: Stage, folder: Path, options: MetaTrainArguments, start: float) -> MetaTrainingArguments:
    """The settings of a stage with what the command line changes; `start` is when the recipe began."""
    changed = ("meta_epochs", "inner_steps", "unroll_length", "random_scaling", "lr_scheduler_type", "meta_loss")
    settings = dict(stage.settings)
    for name in (*changed, "meta_learning_rate"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.inner_steps is not None:
        settings["curriculum"] = []
    if options.max_seconds is not None:
        settings["max_seconds"] = options.max_seconds - (time.perf_counter() - start)
    return MetaTrainingArguments(
        str(folder), seed=options.seed, use_cpu=options.use_cpu, disable_tqdm=options.disable_tqdm, **settings
    )
