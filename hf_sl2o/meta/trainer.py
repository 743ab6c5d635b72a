"""Meta-training: the rule's weights follow the gradient of the losses of the runs it drives, on one machine or many.

T unroll length, N inner steps. An episode is one run of N steps on one task. All tasks' episodes advance side by side,
a window of T steps at a time; their meta-gradients ([`~hf_sl2o.meta.estimators`]) are averaged, over processes too,
and one step of the meta-optimizer follows.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object, reduce
from tqdm.auto import tqdm

from ..foundation.files import save_json
from ..foundation.ranks import as_json, basis_facts, check_same_on_all_ranks, optimizer_facts, rule_facts
from ..optim import LearnedOptimizer
from ..rules import ADDED_LATER, GONE, Rule
from .arguments import MetaTrainingArguments
from .checkpoints import MANIFEST, Checkpoints, check_like, check_progress, optimizer_state, under
from .episodes import Episode
from .estimators import Estimator, FirstOrder
from .task import Task, train_on

logger = logging.getLogger(__name__)

_PROGRESS = ("epoch", "meta_step", "window", "best", "log_history")  # in a checkpoint, beside tensors
# Changing these does not change what a run has computed so far.
_FREE = ("output_dir", "disable_tqdm", "max_seconds", "save_steps", "logging_steps", "report_to", "process_timeout")
# What each process may have to itself: what it shows, and the time that it has left.
_LOCAL = ("disable_tqdm", "report_to", "max_seconds")


class MetaTrainer:
    """Trains a rule on tasks, in one process or many; the best rule on held-out batches wins.

    Each meta-epoch runs `episodes_per_task` episodes of N steps on every task, with a meta-step every T steps.
    Episodes are dealt out to the processes that `accelerate launch` or `torchrun` started; with the same tasks and
    seeds any number of processes gives the same rule, to rounding. `train()` in the same folder goes on from the last
    checkpoint, in the middle of an episode too, to the bit. An episode whose loss becomes non-finite or far above its
    start ends there, counted and logged; its last meta-gradient is not used.

    With several tasks each one's meta-gradient is divided by the first loss of its episode, so that no loss drowns the
    others; the best rule has the lowest mean of (held-out loss / held-out loss before training).

    Args:
        rule ([`Rule`]): Changed in place.
        args ([`MetaTrainingArguments`]): How.
        tasks (`list[Task]`): What it is trained on.
        eval_tasks (`list[Task]`, *optional*): What chooses the best rule; defaults to `tasks`.
        estimator ([`~hf_sl2o.meta.estimators.Estimator`], *optional*): Defaults to `FirstOrder()`.
        meta_optimizer (`Callable`, *optional*): Makes the optimizer of the rule's weights; defaults to Adam (official
            code).
        callbacks (`Sequence[Callable[[MetaTrainer, dict], None]]`, *optional*): Each is called with every entry of the
            log, on every process; one may set `trainer.should_stop = True`.

    Raises:
        `ValueError`: no task, two of one name, one without held-out batches, more processes than episodes; a
            checkpoint of other settings in the folder, or a process with other settings (the first difference is
            named).
        `RuntimeError`: a task raised (named), or another process is gone.

    Example: see README, "Learn an optimizer".
    """

    def __init__(
        self,
        rule: Rule,
        args: MetaTrainingArguments,
        tasks: list[Task],
        eval_tasks: list[Task] | None = None,
        *,
        estimator: Estimator | None = None,
        meta_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
        callbacks: Sequence[Callable[[MetaTrainer, dict[str, Any]], None]] = (),
    ) -> None:
        self.rule, self.args, self.callbacks = rule, args, list(callbacks)
        self.tasks, self.eval_tasks = list(tasks), list(tasks if eval_tasks is None else eval_tasks)
        self.estimator = FirstOrder() if estimator is None else estimator
        if not self.tasks:
            raise ValueError("MetaTrainer needs at least one task and got none")
        if not list(rule.parameters()):
            raise ValueError(f"a {type(rule).__name__} has no weights to train; use LSTMRule")
        for of in (self.tasks, self.eval_tasks):
            if len({task.name for task in of}) < len(of):
                raise ValueError(f"the tasks are named {[task.name for task in of]}; give each a name of its own")
        for task in self.eval_tasks:
            if not len(task.eval_batches):
                raise ValueError(
                    f"task {task.name!r} has no eval_batches; the best rule is chosen on held-out batches"
                )
        tracker = None if args.report_to in ("none", "") else args.report_to
        self.accelerator = Accelerator(
            cpu=args.use_cpu,
            log_with=tracker,
            project_dir=args.output_dir if tracker else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.process_timeout))],
        )
        episodes = len(self.tasks) * args.episodes_per_task
        if episodes < self.accelerator.num_processes:
            raise ValueError(
                f"{self.accelerator.num_processes} processes share {episodes} episodes, so some would have none; "
                "raise episodes_per_task, or start fewer processes"
            )
        self.device = self.accelerator.device
        precision = self.accelerator.mixed_precision if args.mixed_precision is None else args.mixed_precision
        self.autocast = torch.bfloat16 if precision == "bf16" else None
        self.rule.to(self.device)
        weights = list(rule.parameters())
        self.optimizer = (
            torch.optim.Adam(weights, lr=args.meta_learning_rate)
            if meta_optimizer is None
            else meta_optimizer(weights)
        )
        self._meta_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.folder = Path(args.output_dir)
        self.epoch = self.meta_step = self.window = 0
        self.episodes: list[Episode] = []  # this process'; empty between meta-epochs
        self.best, self.log_history = float("inf"), []  # type: ignore[var-annotated]
        self.best_weights = {name: tensor.detach().clone() for name, tensor in rule.state_dict().items()}
        self.should_stop = False

    # The loop

    def train(self) -> Rule:
        """Meta-trains, or goes on from the folder's checkpoint; returns the rule with its best weights.

        `output_dir` then holds the rule as `save_pretrained` writes it.
        """
        args, start = self.args, time.perf_counter()
        check_same_on_all_ranks(self._facts(), "meta-training", timeout=args.process_timeout)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._wait()
        self._broadcast_weights()
        self.best_weights = {name: tensor.detach().clone() for name, tensor in self.rule.state_dict().items()}
        self.episodes, self.should_stop = [], False
        self._resume()
        if args.report_to not in ("none", ""):
            self.accelerator.init_trackers("meta-training", {k: str(v) for k, v in asdict(args).items()})
        if self.epoch == 0 and not self.log_history:
            self._validate()
        windows = [math.ceil((args.steps_at(e) - 1) / args.unroll_length) for e in range(args.meta_epochs)]
        hidden = args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(total=sum(windows), initial=sum(windows[: self.epoch]) + self.window, unit="meta-step",
                  desc="meta-train", disable=hidden) as bar:  # fmt: skip
            while self.epoch < args.meta_epochs and not self.should_stop:
                if not self.episodes:
                    self._begin_episodes()
                while self.window < windows[self.epoch]:
                    late = args.max_seconds is not None and time.perf_counter() - start > args.max_seconds
                    alive, stop = self._meta_step(stop=late or self.should_stop)
                    bar.set_postfix(best=f"{self.best:.4f}")
                    bar.update()
                    if stop:
                        self.should_stop = True
                        break
                    if not alive:
                        bar.update(windows[self.epoch] - self.window)
                        break
                    if self.meta_step % args.save_steps == 0:
                        self._save()
                if self.should_stop:
                    self._save()
                    logger.warning("stopped in meta-epoch %d of %d; a new start goes on", self.epoch, args.meta_epochs)
                    break
                self._end_episodes()
        if args.report_to not in ("none", ""):
            self.accelerator.end_training()
        self.rule.load_state_dict(self.best_weights)
        if self.accelerator.is_main_process:
            self.rule.save_pretrained(self.folder)
        self._wait()
        return self.rule

    def _facts(self) -> dict[str, Any]:
        """What all processes must share, as JSON values; the rule's weights become the first one's."""
        facts = {key: as_json(value) for key, value in asdict(self.args).items() if key not in _LOCAL}
        facts |= {"rule": rule_facts(self.rule, weights=False), "estimator": repr(self.estimator)}
        for kind, tasks in (("tasks", self.tasks), ("eval_tasks", self.eval_tasks)):
            facts[kind] = [task.name for task in tasks]
            facts |= {f"basis of {kind} {task.name!r}": basis_facts(task.basis) for task in tasks}
            facts |= {f"eval_batches of {kind} {task.name!r}": len(task.eval_batches) for task in tasks}
        return {**facts, "meta_optimizer": optimizer_facts(self.optimizer), "bf16": self.autocast is not None}

    def _seed(self, epoch: int, episode: int) -> int:
        return self.args.seed * 1_000_003 + epoch * 1_009 + episode

    def _begin_episodes(self) -> None:
        self.window = 0
        for index in self._own_episodes():
            self.episodes.append(self._episode(index))
            self.episodes[-1].begin(self.rule)

    def _own_episodes(self) -> range:
        """Numbers of the episodes of a meta-epoch that are dealt out to this process."""
        episodes = len(self.tasks) * self.args.episodes_per_task
        return range(self.accelerator.process_index, episodes, self.accelerator.num_processes)

    def _episode(self, index: int) -> Episode:
        task = self.tasks[index // self.args.episodes_per_task]
        return Episode(
            index,
            task,
            self.estimator,
            seed=self._seed(self.epoch, index),
            steps=self.args.steps_at(self.epoch),
            random_scaling=self.args.random_scaling,
            device=self.device,
            autocast=self.autocast,
        )

    def _meta_step(self, *, stop: bool) -> tuple[int, bool]:
        """A window of every episode and one step of the meta-optimizer; returns how many still run, and who stops."""
        args, weights = self.args, list(self.rule.parameters())
        sizes = [p.numel() for p in weights]
        # One vector, so that processes meet once: the gradients, the episodes behind them, the wish to stop.
        total = torch.zeros(sum(sizes) + 2, dtype=weights[0].dtype, device=self.device)
        for episode in self.episodes:
            gradient = episode.advance(self.rule, args)
            if gradient is not None:
                total[:-2] += gradient
                total[-2] += 1
        total[-1] = float(stop)
        total = self._sum(total)
        alive = int(total[-2])
        if alive:
            for p, gradient in zip(weights, (total[:-2] / alive).split(sizes), strict=True):
                p.grad = gradient.view_as(p)
            norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm if args.max_grad_norm > 0 else math.inf)
            for group, lr in zip(self.optimizer.param_groups, self._meta_lrs, strict=True):
                group["lr"] = lr * self._meta_lr_factor()
            if bool(torch.isfinite(norm)):
                self.optimizer.step()
            if self.meta_step % args.logging_steps == 0 and args.report_to not in ("none", ""):
                self.accelerator.log({"meta_grad_norm": float(norm)}, step=self.meta_step)
        self.window += 1
        self.meta_step += 1
        return alive, bool(total[-1] > 0)

    def _meta_lr_factor(self) -> float:
        if self.args.meta_lr_scheduler_type == "constant":
            return 1.0
        windows = math.ceil((self.args.steps_at(self.epoch) - 1) / self.args.unroll_length)
        done = (self.epoch + self.window / windows) / self.args.meta_epochs
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _end_episodes(self) -> None:
        entries = self._gather([(e.index, {"meta_epoch": self.epoch, **e.summary()}) for e in self.episodes])
        for _, entry in sorted(entries, key=lambda pair: pair[0]):
            self._log(entry)
        self.episodes, self.window = [], 0
        self.epoch += 1
        if self.epoch % self.args.eval_every == 0 or self.epoch == self.args.meta_epochs:
            self._validate()
        self.should_stop = bool(self._sum(torch.tensor(float(self.should_stop), device=self.device)) > 0)
        self._save()

    def _log(self, entry: dict[str, Any]) -> None:
        self.log_history.append(entry)
        for callback in self.callbacks:
            callback(self, entry)
        if self.args.report_to not in ("none", ""):
            if "task" in entry:
                values = {f"{entry['task']}/{key}": entry[key] for key in ("first_loss", "last_loss")}
            else:
                values = {f"validation/{name}": loss for name, loss in entry["validation"].items()}
                values["validation_loss"] = entry["validation_loss"]
            self.accelerator.log(values, step=self.meta_step)

    # Validation

    def _validate(self) -> None:
        """Mean held-out loss of the frozen rule at 1/8, 1/4, 1/2 and all of N: speed counts as much as the end."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = {i: self._validation_losses(self.eval_tasks[i]) for i in range(rank, len(self.eval_tasks), processes)}
        losses = dict(sorted(pair for pair in self._gather(list(mine.items()))))
        names = [task.name for task in self.eval_tasks]
        means = {names[i]: sum(points) / len(points) for i, (_, *points) in losses.items()}
        # The geometric mean: a per cent less counts the same early and late, on every task.
        logs = [math.log(max(point / first, 1e-12)) for first, *points in losses.values() for point in points]
        score = math.exp(sum(logs) / len(logs))
        score = score if score == score else math.inf
        if score < self.best:
            self.best = score
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.rule.state_dict().items()}
        mean = sum(means.values()) / len(means)
        self._log(
            {"meta_epoch": self.epoch, "validation_loss": mean, "validation": means, "score": score, "best": self.best}
        )

    def _validation_losses(self, task: Task) -> list[float]:
        """Held-out loss before training and at points of a run with the frozen rule; inf where it is not finite."""
        args, n = self.args, self.args.inner_steps
        result = train_on(
            task,
            lambda c: LearnedOptimizer(c, self.rule, lr=args.learning_rate, capturable=True, total_steps=n),
            n,
            seed=args.seed + 999_983,
            schedule=args.lr_scheduler_type,
            evaluate_at={0, max(1, n // 8), max(1, n // 4), max(1, n // 2), n},
            device=self.device,
            autocast=self.autocast,
        )
        return [loss if math.isfinite(loss) else math.inf for _, loss in result["eval"]]

    # Between processes

    def _sum(self, vector: torch.Tensor) -> torch.Tensor:
        try:
            return reduce(vector, "sum")  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise self._alone(error) from error

    def _gather(self, entries: list[Any]) -> list[Any]:
        try:
            return list(gather_object(entries))
        except RuntimeError as error:
            raise self._alone(error) from error

    def _wait(self) -> None:
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError as error:
            raise self._alone(error) from error

    def _alone(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"process {self.accelerator.process_index} waits for one that is gone ({str(error).splitlines()[0]}); the "
            f"other's output says why. Start the same command again: it goes on from the checkpoint in {self.folder}"
        )

    def _broadcast_weights(self) -> None:
        """All processes begin with the first one's weights."""
        main = self.accelerator.is_main_process
        for p in self.rule.parameters():
            p.data.copy_(self._sum(p.data.clone() if main else torch.zeros_like(p.data)))

    # Checkpoints

    def _checkpoints(self) -> Checkpoints:
        args = {key: value for key, value in asdict(self.args).items() if key not in _FREE}
        if self.args.meta_lr_scheduler_type == "constant" and not self.args.curriculum:
            args.pop("meta_epochs")  # a longer run may go on from a shorter one
        tasks = [[task.name, task.basis.fingerprint] for task in self.tasks]
        stamp = {"args": args, "rule": self.rule.config.of_update(), "tasks": tasks, "estimator": repr(self.estimator)}
        later = {"rule": ADDED_LATER, "args": {k: v for k, v in vars(MetaTrainingArguments).items() if k in args}}
        return Checkpoints(self.folder, *json.loads(json.dumps([stamp, later, {"rule": dict(GONE)}])))

    def _save(self) -> None:
        checkpoints = self._checkpoints()
        for episode in self.episodes:
            name = f"episode-{episode.index}"
            checkpoints.write(self.meta_step, name, episode.state_dict(), **episode.numbers())
        self._wait()
        if self.accelerator.is_main_process:
            tensors = {f"rule.{name}": tensor for name, tensor in self.rule.state_dict().items()}
            tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
            checkpoints.write(self.meta_step, "meta", tensors)
            progress = {name: getattr(self, name) for name in _PROGRESS}
            save_json(self.folder / "log.json", self.log_history)  # before what a new start would go on from
            checkpoints.complete(self.meta_step, {**progress, "in_episode": bool(self.episodes)})
        self._wait()

    def _resume(self) -> None:
        """Goes to the newest checkpoint, if there is one; raises `ValueError` where it is not what was saved."""
        checkpoint = self._checkpoints().newest()
        if self.accelerator.is_main_process:
            self._checkpoints().remove_leftovers()
        if checkpoint is None:
            return
        check_progress(checkpoint.progress, str(self.folder / MANIFEST))
        tensors, path = checkpoint.tensors("meta"), str(checkpoint.path("meta"))
        for head in ("rule.", "best."):
            check_like(under(tensors, head), self.rule.state_dict(), path, finite=True)
        groups = self.optimizer.state_dict()["param_groups"]
        moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = optimizer_state(under(tensors, "optimizer."), moved, path)
        for name in _PROGRESS:
            setattr(self, name, checkpoint.progress[name])
        self.rule.load_state_dict(under(tensors, "rule."))
        self.best_weights = {name: tensor.to(self.device) for name, tensor in under(tensors, "best.").items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if checkpoint.progress["in_episode"]:
            for index in self._own_episodes():
                self.episodes.append(self._episode(index))
                self.episodes[-1].begin(self.rule)
                self.episodes[-1].load(checkpoint.path(f"episode-{index}"))
