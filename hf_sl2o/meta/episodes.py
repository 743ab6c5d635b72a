"""One episode of meta-training: a run of N steps on one task, advanced a window at a time, saved and resumed."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from ..foundation.checked import check_flag, check_integer, shown
from ..foundation.files import load_metadata, load_tensors, parse_json
from ..rules.rule import Rule
from ..subspace import IdentityBasis
from .arguments import MetaTrainingArguments
from .checkpoints import REMEDY, check_like, under
from .estimators import Carry, Estimator
from .task import InnerRun, Task, schedule_factor

logger = logging.getLogger(__name__)

# Batches that an estimator may draw in a step; a file that says more is false.
_MOST_BATCHES = 1000


class Episode:
    """The state of one episode; a seed decides its batches, its dropout, its scales and what its estimator draws.

    Args:
        index (`int`): Its number among a meta-epoch's episodes.
        task ([`Task`]): What is run.
        estimator ([`~hf_sl2o.meta.estimators.Estimator`]): Of the meta-gradient.
        seed (`int`): See above.
        steps (`int`): N.
        random_scaling (`float`): s: coefficient i (with an identity: tensor i), and where the rule begins to look for
            its scale, are scaled by exp(U(-s, s)); 0: not.
        device (`torch.device`): Where the model goes.
        autocast (`torch.dtype`, *optional*): Precision of the network's forward pass.
    """

    def __init__(
        self,
        index: int,
        task: Task,
        estimator: Estimator,
        *,
        seed: int,
        steps: int,
        random_scaling: float,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.index, self.task, self.estimator, self.seed, self.steps = index, task, estimator, seed, steps
        scales, gain = None, 1.0
        if random_scaling:
            generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
            of_tensors = isinstance(task.basis, IdentityBasis)  # else each coefficient has its own
            uniform = torch.rand(len(task.basis.tensor_sizes) if of_tensors else task.basis.dim, generator=generator)
            scales = torch.exp(random_scaling * (2 * uniform - 1))  # (k,) or (d,)
            if of_tensors:
                scales = scales.repeat_interleave(torch.tensor(task.basis.tensor_sizes))  # (d,)
            gain = math.exp(random_scaling * (2 * float(torch.rand((), generator=generator)) - 1))
        options: dict[str, Any] = {"device": device, "autocast": autocast, "scales": scales, "gain": gain}
        self.runs = [InnerRun(task, seed, **options) for _ in range(estimator.runs)]
        self.carry: Carry = {}
        self.done, self.diverged = 0, False
        self.first = self.mean = float("nan")
        self.seconds = 0.0

    def begin(self, rule: Rule) -> None:
        self.carry = self.estimator.begin(rule, self.runs)

    def advance(self, rule: Rule, args: MetaTrainingArguments) -> torch.Tensor | None:
        """Runs the next window; returns its meta-gradient, flat, divided by the episode's first loss.

        With `meta_loss="log"` each step's part is divided by the level of the losses there instead: late steps, where
        losses are small, then count as much as early ones. None if the episode has ended, or diverges in this window.
        """
        length = min(args.unroll_length, self.steps - self.done)
        if self.diverged or length < 2:
            return None
        start = time.perf_counter()
        steps = range(self.done, self.done + length)
        lr = self.runs[0].gain if rule.own_scale else args.learning_rate
        lrs = [lr * schedule_factor(args.lr_scheduler_type, step, self.steps) for step in steps]
        generator = torch.Generator().manual_seed((self.seed * 7919 + self.done + 1) & 0x7FFF_FFFF_FFFF)
        window = self.estimator.window(
            rule, self.runs, self.carry, lrs, total_steps=self.steps, generator=generator, log=args.meta_loss == "log"
        )
        self.carry = window.carry
        if self.done == 0:
            self.first = float(window.losses[0])
        self.done += length
        self.mean = float(window.losses.mean())
        unit = 1.0 if args.meta_loss == "log" else max(abs(self.first), 1e-12)
        gradient = torch.cat([g.reshape(-1) for g in window.gradients]) / unit
        self.seconds += time.perf_counter() - start
        # The comparison is also false of NaN.
        if self.mean <= args.divergence_factor * abs(self.first) and bool(torch.isfinite(gradient).all()):
            return gradient
        self.diverged = True
        logger.warning(
            "task %r diverged after %d steps (loss %g): its episode ends", self.task.name, self.done, self.mean
        )
        of_use = self.estimator.bounded and args.meta_loss == "log" and bool(torch.isfinite(gradient).all())
        return gradient if of_use else None

    def summary(self) -> dict[str, Any]:
        """What the log holds of it."""
        return {
            "task": self.task.name,
            "first_loss": self.first,
            "last_loss": self.mean,
            "steps": self.done,
            "diverged": self.diverged,
            "seconds": self.seconds,
        }

    # Files

    def state_dict(self) -> dict[str, torch.Tensor]:
        tensors = {f"carry.{name}": value for name, value in self.carry.items()}
        for i, run in enumerate(self.runs):
            tensors |= {f"run.{i}.{name}": value for name, value in run.state_dict().items()}
        return tensors

    def numbers(self) -> dict[str, str]:
        return {"episode": json.dumps([self.done, self.diverged, self.first, self.mean, self.seconds])}

    def load(self, path: Path) -> None:
        """Goes to where it was saved.

        What the estimator carries is compared with what it now begins with, where `begin` was called before.

        Raises:
            `ValueError`: the file is damaged, or of another episode: tensors, shapes or dtypes differ.
        """
        tensors = load_tensors(path)
        done, diverged, first, mean, seconds = self._numbers_in(path)
        runs, carry = under(tensors, "run."), under(tensors, "carry.")
        expected = {
            f"{i}.{name}": value for i, run in enumerate(self.runs) for name, value in run.state_dict().items()
        }
        of_gpus = {name for name in runs if ".rng." in name and name not in expected}  # saved where there was one
        check_like({name: value for name, value in runs.items() if name not in of_gpus}, expected, str(path))
        check_like({name: value for name, value in carry.items() if name in self.carry}, self.carry, str(path))
        for i in range(len(self.runs)):
            drawn = int(runs[f"{i}.drawn"])
            if not 0 <= drawn <= _MOST_BATCHES * max(done, 1):
                raise ValueError(f"{path} says that {drawn} batches were drawn in {done} steps; {REMEDY}")
            try:
                torch.Generator().set_state(runs[f"{i}.rng.0"])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{path} holds no state of random numbers ({error}); {REMEDY}") from error
        self.done, self.diverged, self.first, self.mean, self.seconds = done, diverged, first, mean, seconds
        self.carry = {name: value.to(self.runs[0].device) for name, value in carry.items()}
        for i, run in enumerate(self.runs):
            run.load_state_dict(under(runs, f"{i}."))

    def _numbers_in(self, path: Path) -> tuple[int, bool, float, float, float]:
        """What `numbers` wrote."""
        text = load_metadata(path).get("episode", "nothing")
        try:
            done, diverged, *floats = parse_json(text)
            check_integer("done", done, 0, self.steps)
            check_flag("diverged", diverged)
            first, mean, seconds = floats
            if not all(type(value) is float for value in floats):
                raise ValueError("a loss is no float")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} says {shown(text)} of its episode ({error}); {REMEDY}") from error
        return done, diverged, first, mean, seconds
