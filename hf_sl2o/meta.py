"""Meta-training: the rule's weights follow the gradient of the losses of the runs it drives.

T unroll length, N inner steps. The rule's inputs are detached (the second-order term is dropped, as in the official
code), so the gradient of sum_t L(theta_0 + U c_t) equals that of sum_t <g_t, c_t>, where g_t is the projected gradient
that `loss.backward()` gives anyway. The graph holds d-sized tensors only.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .files import load_tensors, open_tensors, save_json, save_tensors
from .rule import Rule, RuleState
from .tasks import InnerRun, Task

logger = logging.getLogger(__name__)


@dataclass
class MetaTrainingArguments:
    """How a rule is meta-trained; defaults are the official code's (README, `--unroll 10 --training_steps 1000`).

    Example:

    ```python
    >>> from hf_sl2o import MetaTrainingArguments
    >>> MetaTrainingArguments("rule", inner_steps=200).unroll_length
    10
    ```
    """

    output_dir: str = field(metadata={"help": "Checkpoints, log.jsonl, and the best rule."})
    unroll_length: int = field(default=10, metadata={"help": "T: inner steps of a meta-step; at least 2."})
    inner_steps: int = field(default=1000, metadata={"help": "N: steps of an episode; the last window may be short."})
    meta_epochs: int = field(default=20, metadata={"help": "Episodes on each task."})
    meta_learning_rate: float = field(default=1e-2, metadata={"help": "Of Adam on the rule's weights."})
    learning_rate: float = field(default=1.0, metadata={"help": "lr of the inner run; multiplies the rule's output."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the meta-gradient; 0: no clipping."})
    eval_every: int = field(default=2, metadata={"help": "Meta-epochs between validations of the rule."})
    divergence_factor: float = field(
        default=4.0, metadata={"help": "An episode ends when a window's mean loss exceeds this times its first loss."}
    )
    seed: int = field(default=0, metadata={"help": "Of batches and dropout."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if self.unroll_length < 2:
            raise ValueError(
                f"unroll_length is {self.unroll_length}, expected at least 2: losses are taken before each update, "
                "so a window of one step has no meta-gradient"
            )
        if self.inner_steps < self.unroll_length:
            raise ValueError(
                f"inner_steps {self.inner_steps} is below unroll_length {self.unroll_length}; raise the first or "
                "lower the second"
            )
        if self.meta_epochs < 1 or self.eval_every < 1:
            raise ValueError("meta_epochs and eval_every must be at least 1")


def unroll(
    rule: Rule, run: InnerRun, c: torch.Tensor, state: RuleState, *, steps: int, lr: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, RuleState, torch.Tensor]:
    """Runs `steps` inner steps with `rule`, moving the weights of `run`.

    Args:
        rule ([`Rule`]): The rule that is meta-trained.
        run ([`~hf_sl2o.tasks.InnerRun`]): A model in training.
        c (`torch.Tensor` of shape `(d,)`): Its coefficients, detached.
        state ([`RuleState`]): The rule's state, detached.
        steps (`int`): T, at least 2.
        lr (`float`, *optional*, defaults to 1.0): Multiplies the rule's output.

    Returns:
        A scalar whose gradient is the meta-gradient, c and state after the window (with graph), and `(steps,)` losses
        before each update.

    Raises:
        `ValueError`: `steps` is below 2.
    """
    if steps < 2:
        raise ValueError(f"an unroll of {steps} steps has no meta-gradient; use at least 2")
    surrogate, losses = c.new_zeros(()), []
    for _ in range(steps):
        loss, g = run.gradient()
        surrogate = surrogate + torch.dot(g, c)  # g at c_t with c_t, not with c_{t+1}
        delta, state = rule(g, state)
        c = c - lr * delta
        run.move(-lr * delta.detach())
        losses.append(loss)
    return surrogate, c, state, torch.stack(losses)


class MetaTrainer:
    """Trains a rule on tasks, one process; the best rule on the tasks' held-out batches wins.

    Each meta-epoch runs one episode of N steps on every task, with a meta-step (Adam) every T steps. A checkpoint is
    written after each meta-epoch; `train()` in the same folder goes on from it, to the bit. An episode whose loss
    becomes non-finite or far above its start ends there, counted in the log; its last meta-gradient is not used.

    Args:
        rule ([`Rule`]): Changed in place.
        args ([`MetaTrainingArguments`]): How.
        tasks (`list[Task]`): What it is trained on.
        eval_tasks (`list[Task]`, *optional*): What chooses the best rule; defaults to `tasks`.

    Raises:
        `ValueError`: no task, or one without held-out batches; a checkpoint of other settings in the folder.

    Example: see README, "Learn an optimizer".
    """

    def __init__(
        self, rule: Rule, args: MetaTrainingArguments, tasks: list[Task], eval_tasks: list[Task] | None = None
    ) -> None:
        self.rule, self.args = rule, args
        self.tasks, self.eval_tasks = list(tasks), list(tasks if eval_tasks is None else eval_tasks)
        if not self.tasks:
            raise ValueError("MetaTrainer needs at least one task and got none")
        if not list(rule.parameters()):
            raise ValueError(f"a {type(rule).__name__} has no weights to train; use LSTMRule")
        for task in self.eval_tasks:
            if not len(task.eval_batches):
                raise ValueError(
                    f"task {task.name!r} has no eval_batches; the best rule is chosen on held-out batches"
                )
        self.optimizer = torch.optim.Adam(rule.parameters(), lr=args.meta_learning_rate)
        self.folder = Path(args.output_dir)
        self.epoch, self.best, self.log_history = 0, float("inf"), []  # type: ignore[var-annotated]
        self.best_weights = {name: tensor.clone() for name, tensor in rule.state_dict().items()}

    def train(self) -> Rule:
        """Meta-trains, or goes on from the folder's checkpoint; returns the rule with its best weights.

        `output_dir` then holds the rule as `save_pretrained` writes it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        if self.epoch == 0 and not self.log_history:
            self._validate()
        total = self.args.meta_epochs * len(self.tasks)
        with tqdm(total=total, initial=self.epoch * len(self.tasks), unit="episode", desc="meta-train",
                  disable=self.args.disable_tqdm) as bar:  # fmt: skip
            while self.epoch < self.args.meta_epochs:
                for index, task in enumerate(self.tasks):
                    entry = self.episode(task, seed=self._seed(self.epoch, index))
                    self.log_history.append({"meta_epoch": self.epoch, "task": task.name, **entry})
                    bar.set_postfix(loss=f"{entry['last_loss']:.4f}", best=f"{self.best:.4f}")
                    bar.update()
                self.epoch += 1
                if self.epoch % self.args.eval_every == 0 or self.epoch == self.args.meta_epochs:
                    self._validate()
                self._save()
        self.rule.load_state_dict(self.best_weights)
        self.rule.save_pretrained(self.folder)
        return self.rule

    def _seed(self, epoch: int, task: int) -> int:
        return self.args.seed * 1_000_003 + epoch * 1_009 + task

    def episode(self, task: Task, seed: int) -> dict[str, Any]:
        """Trains the rule during one run of `task`; returns what the log holds of it."""
        args, start = self.args, time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            run = InnerRun(task, seed)
            self._to(run.device)
            c = torch.zeros(run.basis.dim, device=run.device, dtype=run.basis.compute_dtype)
            state = self.rule.init_state(run.basis.dim, device=run.device, dtype=c.dtype)
            first = mean = float("nan")
            done, diverged = 0, False
            while args.inner_steps - done >= 2:
                steps = min(args.unroll_length, args.inner_steps - done)
                surrogate, c, state, losses = unroll(self.rule, run, c, state, steps=steps, lr=args.learning_rate)
                done += steps
                if done == steps:
                    first = float(losses[0])
                mean = float(losses.mean())
                if not mean <= args.divergence_factor * first:  # also true of NaN
                    diverged = True
                    logger.warning("task %r diverged after %d steps (loss %g): episode ended", task.name, done, mean)
                    break
                self.optimizer.zero_grad()
                surrogate.backward()  # type: ignore[no-untyped-call]
                if args.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(self.rule.parameters(), args.max_grad_norm)
                if all(bool(p.grad is None or torch.isfinite(p.grad).all()) for p in self.rule.parameters()):
                    self.optimizer.step()
                c, state = c.detach(), state.detach()
        seconds = time.perf_counter() - start
        return {"first_loss": first, "last_loss": mean, "steps": done, "diverged": diverged, "seconds": seconds}

    def _to(self, device: torch.device) -> None:
        self.rule.to(device)
        for state in self.optimizer.state.values():  # a resumed Adam was loaded where the rule was then
            state.update({key: value.to(device) for key, value in state.items() if key != "step"})

    def _validate(self) -> None:
        """Mean held-out loss of the frozen rule at 1/8, 1/4, 1/2 and all of N: speed counts as much as the end."""
        losses = [self._validation_loss(task) for task in self.eval_tasks]
        loss = sum(losses) / len(losses)
        if loss < self.best:
            self.best = loss
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.rule.state_dict().items()}
        self.log_history.append({"meta_epoch": self.epoch, "validation_loss": loss, "best": self.best})

    @torch.no_grad()
    def _validation_loss(self, task: Task) -> float:
        n = self.args.inner_steps
        points, losses = {max(1, n // 8), max(1, n // 4), max(1, n // 2), n}, []
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            run = InnerRun(task, seed=self.args.seed - 1)
            self.rule.to(run.device)
            state = self.rule.init_state(run.basis.dim, device=run.device, dtype=run.basis.compute_dtype)
            for step in range(1, n + 1):
                with torch.enable_grad():
                    _, g = run.gradient()
                delta, state = self.rule(g, state)
                run.move(-self.args.learning_rate * delta)
                if step in points:
                    losses.append(float(run.evaluate()))
        mean = sum(losses) / len(losses)
        return mean if mean == mean else float("inf")

    # Checkpoints: one file of tensors whose metadata say where the run stands, so that it changes as a whole.

    def _stamp(self) -> str:
        settings = {
            key: value for key, value in asdict(self.args).items() if key not in ("output_dir", "disable_tqdm")
        }
        settings.pop("meta_epochs")  # a longer run may go on from a shorter one
        tasks = [[task.name, task.basis.fingerprint] for task in self.tasks]
        return json.dumps({"args": settings, "rule": asdict(self.rule.config), "tasks": tasks}, sort_keys=True)

    def _save(self) -> None:
        tensors = {f"rule.{name}": tensor for name, tensor in self.rule.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
        progress = {"epoch": self.epoch, "best": self.best, "log_history": self.log_history}
        save_tensors(
            self.folder / "checkpoint.safetensors", tensors, stamp=self._stamp(), progress=json.dumps(progress)
        )
        save_json(self.folder / "log.json", self.log_history)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        if not path.is_file():
            return
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
        if metadata.get("stamp") != self._stamp():
            raise ValueError(
                f"{path} was made with other settings, another rule or tasks; use another output_dir, or delete it"
            )
        progress = json.loads(metadata["progress"])
        self.epoch, self.best, self.log_history = progress["epoch"], progress["best"], progress["log_history"]
        tensors = load_tensors(path)
        part = lambda head: {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}  # noqa: E731
        self.rule.load_state_dict(part("rule."))
        self.best_weights = part("best.")
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in part("adam.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
