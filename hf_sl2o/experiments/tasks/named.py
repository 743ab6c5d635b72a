"""From a problem to a task: a subspace of it, or LoRA factors; and what drives a task.

`subspace_task` records an AdamW run, fits 40 directions and returns a task in them; `lora_task` adapts a base that was
pretrained on one part of the data (pretrain_base.py) to the part that was held back, each scalar of the LoRA factors a
coordinate. Both keep what they made in a folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...meta import Task
from ...optim import LearnedOptimizer
from ...rules import Rule
from ...subspace import IdentityBasis, Layout, RandomBasis
from ..kept.files import read_object, tensors_once
from ..kept.keys import stamp
from ..on_task import TaskArm
from . import problems
from .pretrained import PRETRAINED, check_package
from .problem import Problem
from .problems import check_data
from .recorded import SEED, recorded_basis, train

RECORDED = "-pca"  # after a name: in the subspace of a recorded run
#: All problems by name.
PROBLEMS = ChainMap(PRETRAINED, problems.PROBLEMS)


def train_full(problem: Problem, part: str, model: nn.Module, name: str) -> None:
    """Trains all weights of a problem as its base, or the run that is recorded, is trained."""
    train(
        model, problem.loss, problem.batches(part, SEED),
        learning_rate=problem.learning_rate, steps=problem.steps, name=name,
    )  # fmt: skip


def first_rows(batch: Any, rows: int) -> Any:
    """Cuts every tensor of a batch."""
    if torch.is_tensor(batch):
        return batch[:rows]
    if isinstance(batch, Mapping):
        return {key: first_rows(value, rows) for key, value in batch.items()}
    return type(batch)(first_rows(value, rows) for value in batch)


def cut(batches: Callable[[int], Iterator[Any]], rows: str) -> Callable[[int], Iterator[Any]]:
    """Cuts the batches to so many rows; "": leaves them."""
    return (lambda seed: (first_rows(batch, int(rows)) for batch in batches(seed))) if rows else batches


def subspace_task(name: str, data: str, folder: Path, dim: int = 40) -> Task:
    """A problem in the subspace of a recorded AdamW run, made once and kept in `folder`.

    `name` may end in @ROWS: batches are then cut to so many rows, in the same subspace. Their gradients are noisier.
    """
    task_name, (name, _, _, rows) = name, parse_task(name, plain=True)
    problem = PROBLEMS[name](data)
    if not problem.steps:
        raise ValueError(f"{name} is a pretrained network; after its name must stand -full or -loraRANK")
    basis = recorded_basis(
        recorded_in(name, problem, data, folder, dim), problem.build_model, problem.loss,
        lambda seed: problem.batches("all", seed), problem.eval_batches("all"),
        learning_rate=problem.learning_rate, steps=problem.steps, dim=dim,
    )  # fmt: skip
    return Task(
        task_name, problem.build_model, cut(lambda seed: problem.batches("all", seed), rows), problem.loss, basis,
        problem.eval_batches("all"),
    )  # fmt: skip


def recorded_in(name: str, problem: Problem, data: str, folder: Path, dim: int) -> Path:
    return folder / f"{name}-{stamp(problem.learning_rate, problem.steps, dim, data)}"


def full_space_loss(name: str, data: str, folder: Path, dim: int = 40) -> float:
    """Held-out loss at the end of the run that was recorded for a task in its subspace."""
    if name.endswith(RECORDED):
        task = name.removesuffix(RECORDED)
        where = place_of(named_task(task, data, folder).name, rate_of(task), folder)
        return float(read_object(where / "done.json", "full_space_loss")["full_space_loss"])
    name = parse_task(name, plain=True)[0]
    where = recorded_in(name, PROBLEMS[name](data), data, folder, dim)
    return float(read_object(where / "done.json", "full_space_loss")["full_space_loss"])


def pretrained_base(name: str, data: str, folder: Path) -> tuple[Problem, Path, dict[str, torch.Tensor]]:
    """Trains the base of a problem on its "base" part, once; returns the problem, and the weights and their file.

    A network of released weights is its own base: there is nothing to load into it.
    """
    problem = PROBLEMS[name](data)
    if not problem.lora_targets:
        raise ValueError(f"{name} has no base for LoRA: it has no matrices that are adapted; give another task")
    if not problem.steps:
        return problem, folder, {}
    where = folder / f"{name}-base-{stamp(problem.learning_rate, problem.steps, data)}.safetensors"

    def make() -> dict[str, torch.Tensor]:
        model = problem.build_model()
        train_full(problem, "base", model, f"{name} base")
        once = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # a tied weight is in it once
        return {name: tensor for name, tensor in once.items() if name in model.state_dict()}

    return problem, where, tensors_once(where, make)


def lora_task(name: str, data: str, folder: Path, rank: int = 8, scaling: float = 2.0) -> Task:
    """LoRA factors of a pretrained base on the held-back part of its data; each scalar is a coordinate.

    `scaling` is alpha / rank: what the adapter's output is multiplied by. `name` may end in @ROWS: smaller batches.
    """
    from peft import LoraConfig, get_peft_model

    name, _, _, rows = parse_task(name, plain=True)
    at = "@" if rows else ""
    problem, _, weights = pretrained_base(name, data, folder)

    def build() -> nn.Module:
        model = problem.build_model()
        heads = tuple(f"{head}." for head in problem.heads)
        kept = {key: value for key, value in weights.items() if not key.startswith(heads)}
        _, unexpected = model.load_state_dict(kept, strict=False)  # a tied weight is in the file once
        assert not unexpected, unexpected
        torch.manual_seed(1)
        config = LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,  # type: ignore[arg-type]  # PEFT divides it by the rank
            target_modules=problem.lora_targets,
            fan_in_fan_out="gpt2" in name,  # Conv1D keeps its weights transposed
            modules_to_save=list(problem.heads) or None,
        )
        return get_peft_model(model, config)  # type: ignore[arg-type, no-any-return]

    basis = IdentityBasis(Layout.from_named_parameters(build().named_parameters()))
    adapter = f"{name}-lora{rank}" + ("" if scaling == 2 else f"x{scaling:g}") + at + rows
    return Task(
        adapter, build, cut(lambda seed: problem.batches("held-back", seed), rows), problem.loss, basis,
        problem.eval_batches("held-back"),
    )  # fmt: skip


def full_task(name: str, data: str) -> Task:
    """All weights of a problem, from the start of its network; each scalar is a coordinate. @ROWS as elsewhere."""
    problem_name, _, _, rows = parse_task(name, plain=True)
    problem = PROBLEMS[problem_name](data)
    basis = IdentityBasis(Layout.from_named_parameters(problem.build_model().named_parameters()))
    return Task(
        name.replace(problem_name, f"{problem_name}-full"), problem.build_model,
        cut(lambda seed: problem.batches("all", seed), rows), problem.loss, basis, problem.eval_batches("all"),
    )  # fmt: skip


def named_task(name: str, data: str, folder: Path) -> Task:
    """Returns the task of a name.

    "digits-mlp"; "digits-mlp-lora4": LoRA, rank 4; "digits-mlp-lora4x16": LoRA, rank 4, alpha 16 times that (else
    twice); "digits-mlp-full": all weights; each may end in @ROWS, such as "digits-mlp@8": smaller batches. After LoRA
    or all weights may stand "-pca": in the subspace of a recorded run.
    """
    if name.endswith(RECORDED):
        whole = named_task(name.removesuffix(RECORDED), data, folder)
        return in_recorded(whole, rate_of(name.removesuffix(RECORDED)), folder)
    problem, rank, scaling, rows = parse_task(name)
    at_rows = f"@{rows}" if rows else ""
    if rank == "full":
        return full_task(problem + at_rows, data)
    if not rank:
        return subspace_task(problem + at_rows, data, folder)
    return lora_task(problem + at_rows, data, folder, int(rank), float(scaling or 2))


def in_recorded(task: Task, learning_rate: float, folder: Path, *, steps: int = 300, dim: int = 40) -> Task:
    """A task whose coordinates are its weights, or LoRA factors, in the subspace of a recorded run of its own."""
    basis = recorded_basis(
        place_of(task.name, learning_rate, folder, steps, dim), task.build_model, task.loss, task.batches,
        task.eval_batches, learning_rate=learning_rate, steps=steps, dim=dim,
    )  # fmt: skip
    return dataclasses.replace(task, name=f"{task.name}{RECORDED}", basis=basis)


def place_of(name: str, learning_rate: float, folder: Path, steps: int = 300, dim: int = 40) -> Path:
    return folder / f"{name}{RECORDED}-{stamp(learning_rate, steps, dim)}"


def rate_of(name: str) -> float:
    """AdamW's, of the run that is recorded: of LoRA factors, or of all weights of a network that is there."""
    return 3e-4 if parse_task(name)[1] == "full" else 3e-3


def parse_task(name: str, *, plain: bool = False) -> tuple[str, str, str, str]:
    """Returns problem, rank ("full": all weights), scaling and rows of a name, "" for what is not in it.

    `plain`: only the problem and its rows.

    Raises:
        `ValueError`: there is no such task.
    """
    match = re.fullmatch(r"([\w-]+?)(?:-lora([1-9]\d*)(?:x(\d*\.?\d+))?|-(full))?(?:@([1-9]\d*))?", name)
    suffix = match is not None and (match[2] or match[4])
    if match is None or match[1] not in PROBLEMS or (plain and suffix) or (match[3] and not float(match[3]) > 0):
        further = "@ROWS" if plain else "-loraRANK, -loraRANKxSCALING or -full, and @ROWS"
        raise ValueError(
            f"there is no task {name!r}, expected one of {', '.join(PROBLEMS)}; after it may stand {further}"
        )
    problem, rank, scaling, full, rows = match.groups(default="")
    return problem, rank or full, scaling, rows


def check_tasks(
    names: Iterable[str], data: str, *, plain: bool = False, lora: bool = False, flag: str = "tasks"
) -> None:
    """Raises before anything is trained where there is no such task, or no data for it; `lora`: all are adapted."""
    names = list(names)
    try:
        parsed = [parse_task(name.removesuffix(RECORDED), plain=plain and RECORDED not in name) for name in names]
        for name, (_, rank, *_) in zip(names, parsed, strict=True):
            if RECORDED in name and (not rank or not plain):
                raise ValueError(f"{name!r} is in a subspace of LoRA factors or all weights: -pca stands after these")
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error
    for problem, rank, *_ in parsed:
        if problem in PRETRAINED:
            check_package(problem)
            if not (lora or rank):
                raise ValueError(f"--{flag}: {problem} is a pretrained network; give {problem}-full or -loraRANK")
    adapted = [bool(lora or rank not in ("", "full")) for _, rank, *_ in parsed]
    check_data([problem for problem, *_ in parsed], data, adapted)


# What drives a task


def learned(rule: Rule, steps: int) -> Any:
    """Makes the learned optimizer of `[c]` for a learning rate, for a run of `steps`."""
    return lambda lr: lambda c: LearnedOptimizer(c, rule, lr=lr, total_steps=steps)


def arms_of(what: str, rule: Rule, steps: int, layout: Layout) -> dict[str, TaskArm]:
    """The rule, not tuned, and the baselines with their grids; `what` is "default" or "default-lora".

    `sl2o` is evaluated at the running average that the rule asks for, `sl2o_last` is not; `..._average` of a baseline
    has the same average, and its rate is tuned for it.
    """

    def adamw(lr: float) -> Any:
        return lambda c: torch.optim.AdamW(c, lr=lr, weight_decay=0.0)

    def sgd(momentum: float) -> Any:
        return lambda lr: lambda c: torch.optim.SGD(c, lr=lr, momentum=momentum)

    eta = rule.config.average
    ours = TaskArm(learned(rule, steps), (1.0,), key=f"rule-{rule.fingerprint}")
    arms = {"sl2o": dataclasses.replace(ours, average=eta), "sl2o_last": ours}
    if what == "default-lora":
        arms |= {
            "adamw": TaskArm(adamw, (1e-3, 3e-3, 1e-2)),
            "adamw_average": TaskArm(adamw, (1e-3, 3e-3, 1e-2), average=eta),
            "adamw_2e-4": TaskArm(adamw, (2e-4,)),
            "momentum": TaskArm(sgd(0.9), (0.01, 0.03, 0.1)),
        }
    else:
        random = RandomBasis(layout, 40, seed=1).to_dense()
        arms |= {
            "subspace_adamw": TaskArm(adamw, (0.03, 0.1, 0.3)),
            "subspace_adamw_average": TaskArm(adamw, (0.03, 0.1, 0.3), average=eta),
            "subspace_momentum": TaskArm(sgd(0.9), (0.03, 0.1, 0.3)),
            "subspace_momentum_average": TaskArm(sgd(0.9), (0.03, 0.1, 0.3), average=eta),
            "subspace_momentum_orthonormal": TaskArm(sgd(0.9), (0.3, 1.0, 3.0), "orthonormal"),
            "subspace_sgd": TaskArm(sgd(0.0), (0.3, 1.0, 3.0)),
            "subspace_sgd_orthonormal": TaskArm(sgd(0.0), (3.0, 10.0, 30.0), "orthonormal"),
            "random_adamw": TaskArm(adamw, (0.1, 0.3, 1.0), "orthonormal", basis=random),
            "full_adamw": TaskArm(adamw, (1e-3, 3e-3, 1e-2), basis=IdentityBasis(layout)),
        }
    return {name: arm for name, arm in arms.items() if eta or not name.endswith(("_last", "_average"))}
