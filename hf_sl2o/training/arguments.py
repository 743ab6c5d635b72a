"""The command line of a training run: `TrainingArguments` with the choices of the subspace and the rule."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..foundation.checked import check_integer
from .step_size import OPTIMIZERS, OwnStepSize, check_range

logger = logging.getLogger(__name__)

_TRAINER_LEARNING_RATE = 5e-5


@dataclass
class SL2OTrainingArguments(TrainingArguments):
    """Arguments of [`SL2OTrainer`]; everything of `TrainingArguments` holds as well.

    Defaults that differ from `TrainingArguments`, and why: `optim` is `"sl2o"`; `learning_rate` is the optimizer's own
    (1.0 for sl2o and subspace_sgd, 0.3 for subspace_adamw; where the optimizer is made a rate below a twentieth of it,
    which is one for Adam, is replaced by it with a warning); `max_grad_norm` is 0.0, since the official code does not
    clip (if set, it clips the projected gradient). `lr_scheduler_type` stays `"linear"`: the rules `default` and
    `default-lora` were meta-trained under it; for `paper-cnn` and `paper-transformer` pass `"constant"`.

    Example:

    ```python
    >>> from hf_sl2o import SL2OTrainingArguments
    >>> SL2OTrainingArguments("out", optim="subspace_adamw", sl2o_basis="user/basis").learning_rate
    0.3
    ```
    """

    optim: str = field(  # type: ignore[assignment]
        default="sl2o", metadata={"help": '"sl2o", "subspace_adamw", "subspace_sgd", or any of transformers\' own.'}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: the optimizer's own step size."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the projected gradient; 0: no clipping."})
    sl2o_basis: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a basis; without one sl2o acts on every trainable scalar."},
    )
    sl2o_rule: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a rule; default: the one that ships with the package."}
    )
    sl2o_units: str | None = field(
        default=None, metadata={"help": '"std" or "orthonormal"; default: the units the basis was saved with.'}
    )
    sl2o_momentum: float = field(default=0.0, metadata={"help": "Of subspace_sgd; the paper's Momentum has 0.9."})
    sl2o_average: float | None = field(
        default=None,
        metadata={
            "help": "eta of a running average of what is moved, at which the model is evaluated and saved; step t "
            "weighs as t^eta. 0: none. Default: the rule's own, and none without a rule."
        },
    )
    sl2o_outside: str = field(
        default="freeze",
        metadata={"help": 'Trainable parameters outside the basis: "freeze", or "adamw" (a second param group).'},
    )
    sl2o_stream_gradients: bool = field(
        default=False,
        metadata={"help": "Project each gradient as backward makes it and free it; send d numbers instead of n."},
    )
    sl2o_warmup_steps: int = field(
        default=0,
        metadata={"help": "One run: AdamW for so many steps while recording, fit a basis, go on in it. 0: off."},
    )
    sl2o_warmup_learning_rate: float = field(
        default=1e-3, metadata={"help": "AdamW's learning rate in those steps (constant)."}
    )
    sl2o_snapshots: int = field(default=60, metadata={"help": "Snapshots of those steps, at least (paper: 60)."})
    sl2o_dim: int = field(default=40, metadata={"help": "Directions fitted to those snapshots (paper: 40)."})

    def __post_init__(self) -> None:
        name = str(getattr(self.optim, "value", self.optim))
        ours = name in OPTIMIZERS
        not_negative = "a finite number >= 0"
        if self.learning_rate is None or isinstance(self.learning_rate, OwnStepSize):
            self.learning_rate = OwnStepSize.of(OPTIMIZERS.get(name, _TRAINER_LEARNING_RATE))
        else:
            self.learning_rate = check_range("learning_rate", self.learning_rate, 0, expected=not_negative)
        self.sl2o_momentum = check_range("sl2o_momentum", self.sl2o_momentum, 0, 1, expected="a number in [0, 1)")
        self.weight_decay = check_range("weight_decay", self.weight_decay, 0, expected=not_negative)
        if self.max_grad_norm is not None:
            clip = f"{not_negative} (0: no clipping)"
            self.max_grad_norm = check_range("max_grad_norm", self.max_grad_norm, 0, expected=clip)
        super().__post_init__()
        if self.sl2o_units not in (None, "std", "orthonormal"):
            raise ValueError(f'sl2o_units is {self.sl2o_units!r}, expected "std" or "orthonormal"')
        if self.sl2o_average is not None:
            expected = "a finite number > 0, 0 for no average, or None for the rule's"
            self.sl2o_average = check_range("sl2o_average", self.sl2o_average, 0, expected=expected)
        if self.sl2o_outside not in ("freeze", "adamw"):
            raise ValueError(f'sl2o_outside is {self.sl2o_outside!r}, expected "freeze" or "adamw"')
        for name_of in ("sl2o_warmup_steps", "sl2o_snapshots", "sl2o_dim"):
            check_integer(name_of, getattr(self, name_of))
        if self.sl2o_warmup_steps:
            self._check_warmup(name, ours)

    def _check_warmup(self, name: str, ours: bool) -> None:
        if not ours:
            raise ValueError(
                f'sl2o_warmup_steps is {self.sl2o_warmup_steps} with optim="{name}": the warm-up fits a basis, in '
                f"which only {', '.join(OPTIMIZERS)} go on; choose one of them, or set sl2o_warmup_steps to 0"
            )
        if self.sl2o_basis is not None:
            raise ValueError("sl2o_warmup_steps fits a basis and sl2o_basis names one; set one of the two")
        lowest = 5e-324  # above 0
        rate = check_range(
            "sl2o_warmup_learning_rate", self.sl2o_warmup_learning_rate, lowest, expected="a finite number > 0"
        )
        self.sl2o_warmup_learning_rate = rate
        if not 1 <= self.sl2o_dim < self.sl2o_snapshots <= self.sl2o_warmup_steps + 1:
            raise ValueError(
                f"sl2o_dim {self.sl2o_dim} must be at least 1 and below sl2o_snapshots {self.sl2o_snapshots}, and "
                f"that at most sl2o_warmup_steps + 1 = {self.sl2o_warmup_steps + 1}"
            )


def check_optim_args(optim_args: str | None) -> None:
    """Raises `ValueError` where a Trainer could not read its `optim_args`, in words that say how to write them."""
    if not optim_args:
        return
    if not isinstance(optim_args, str) or any(pair.count("=") != 1 for pair in optim_args.split(",")):
        raise ValueError(
            f"optim_args is {optim_args!r}, expected key=value pairs joined by commas, such as "
            '"basis=user/name,rule=path"; write a comma, an equals sign or a space inside a value as %2C, %3D or %20'
        )
