"""The settings of meta-training."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..foundation.checked import check_integer, check_number, shown
from .task import schedule_factor

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

    output_dir: str = field(metadata={"help": "Checkpoints, log.json, and the best rule."})
    unroll_length: int = field(default=10, metadata={"help": "T: inner steps of a meta-step; at least 2."})
    inner_steps: int = field(default=1000, metadata={"help": "N: steps of an episode; the last window may be short."})
    meta_epochs: int = field(default=20, metadata={"help": "Episodes on each task."})
    meta_learning_rate: float = field(default=1e-2, metadata={"help": "Of the meta-optimizer."})
    learning_rate: float = field(default=1.0, metadata={"help": "lr of the inner run; multiplies the rule's output."})
    meta_loss: str = field(
        default="sum",
        metadata={"help": '"sum" of the losses over the first one (official code), or of their "log"arithms.'},
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the meta-gradient; 0: no clipping."})
    eval_every: int = field(default=2, metadata={"help": "Meta-epochs between validations of the rule."})
    divergence_factor: float = field(
        default=4.0, metadata={"help": "An episode ends when a window's mean loss exceeds this times its first loss."}
    )
    seed: int = field(default=0, metadata={"help": "Of batches and dropout."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})
    meta_lr_scheduler_type: str = field(
        default="constant", metadata={"help": '"constant" (official code), or "cosine" to zero over all meta-epochs.'}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": 'Of the inner runs: "constant" (official code), or "linear" to zero.'}
    )
    curriculum: list[int] = field(
        default_factory=list,
        metadata={"help": "N of the first, ..., last meta-epochs, in equal parts (official code, `--cl`)."},
    )
    random_scaling: float = field(
        default=0.0,
        metadata={"help": "s: each episode scales each coefficient by exp(U(-s, s)) (official code: 3); 0: off."},
    )
    episodes_per_task: int = field(default=1, metadata={"help": "Episodes of each task side by side."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": '"no" or "bf16", of the networks; default: what `accelerate launch` was told.'}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    save_steps: int = field(
        default=500, metadata={"help": "Meta-steps between checkpoints; one after each meta-epoch."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Meta-steps between values sent to `report_to`."})
    report_to: str = field(
        default="none", metadata={"help": 'A tracker of Accelerate ("tensorboard", "wandb"), or "none".'}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Stop after so long, with a checkpoint; a new start goes on."}
    )
    process_timeout: float = field(
        default=1800.0, metadata={"help": "Seconds a process waits for the others before it gives up."}
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.unroll_length < 2:
            raise ValueError(
                f"unroll_length is {self.unroll_length}, expected at least 2: losses are taken before each update, "
                "so a window of one step has no meta-gradient"
            )
        for n in (self.inner_steps, *self.curriculum):
            if n < self.unroll_length:
                raise ValueError(
                    f"inner_steps {n} is below unroll_length {self.unroll_length}; raise the first or lower the second"
                )
            if rest := n % self.unroll_length:
                last = f"the last window has {rest} steps" if rest > 1 else "the last step is left out"
                logger.warning("inner_steps %d is not a multiple of unroll_length %d: %s", n, self.unroll_length, last)
        if self.meta_lr_scheduler_type not in ("constant", "cosine"):
            raise ValueError(
                f'meta_lr_scheduler_type is {self.meta_lr_scheduler_type!r}, expected "constant" or "cosine"'
            )
        if self.meta_loss not in ("sum", "log"):
            raise ValueError(f'meta_loss is {self.meta_loss!r}, expected "sum" or "log"')
        schedule_factor(self.lr_scheduler_type, 0, 1)
        if self.mixed_precision not in (None, "no", "bf16"):
            raise ValueError(f'mixed_precision is {self.mixed_precision!r}, expected "no" or "bf16"')

    def _check_numbers(self) -> None:
        """Raises `ValueError` on a number of another type or range, NaN and Inf included; names it."""
        check_integer("unroll_length", self.unroll_length, -(1 << 53))  # its own sentence says why at least 2
        check_integer("inner_steps", self.inner_steps)
        if not isinstance(self.curriculum, list | tuple):
            raise ValueError(f"curriculum is {shown(self.curriculum)}, expected a list of steps")
        for steps in self.curriculum:
            check_integer("one of the curriculum's steps", steps)
        for name in ("meta_epochs", "eval_every", "episodes_per_task", "save_steps", "logging_steps"):
            check_integer(name, getattr(self, name), -(1 << 53))
        if min(self.meta_epochs, self.eval_every, self.episodes_per_task, self.save_steps, self.logging_steps) < 1:
            raise ValueError(
                "meta_epochs, eval_every, episodes_per_task, save_steps and logging_steps must be at least 1"
            )
        check_integer("seed", self.seed, 0, (1 << 32) - 1)
        check_number("meta_learning_rate", self.meta_learning_rate, above=0)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("max_grad_norm", self.max_grad_norm, least=0)
        check_number("divergence_factor", self.divergence_factor, above=0)
        check_number("random_scaling", self.random_scaling, least=0, most=40)  # e^40 squared is still in fp32
        check_number("process_timeout", self.process_timeout, above=0, most=1e9)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds, least=0)

    def steps_at(self, epoch: int) -> int:
        """N of a meta-epoch."""
        if not self.curriculum:
            return self.inner_steps
        return self.curriculum[min(epoch * len(self.curriculum) // self.meta_epochs, len(self.curriculum) - 1)]
