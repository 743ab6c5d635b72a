"""What stands in a Trainer of transformers.

- `registration`: the names `optim="sl2o"`, `"subspace_adamw"`, `"subspace_sgd"`, and the handler behind them
- `build`: strings become bases, rules and optimizers here
- `hooks`: all that is changed in transformers' Trainer, and why
- `arguments`, `trainer`: `SL2OTrainingArguments`, `SL2OTrainer`
- `step_size`: own step sizes, and learning rates that were written for Adam
- `callbacks`, `batch_norm`: recording, logs, running statistics
- `finetuned`, `starting`, `sharing`: a fine-tune as coefficients, from which weights, and where it is kept
- `resume`, `facts`: which checkpoint is whole; what processes must have in common
- `startup/`: for the processes that `python -m hf_sl2o.run` starts

It may import `optim` and what that stands on; not `meta`.
"""

from .arguments import SL2OTrainingArguments
from .batch_norm import BatchNormCallback, recalibrate_batch_norm
from .build import SubspaceOptimizerFactory, build_optimizer
from .callbacks import SubspaceLogCallback, TrajectoryCallback
from .finetuned import FineTune
from .registration import register
from .sharing import load_finetuned, save_finetuned
from .trainer import SL2OTrainer

__all__ = [
    "BatchNormCallback",
    "FineTune",
    "SL2OTrainer",
    "SL2OTrainingArguments",
    "SubspaceLogCallback",
    "SubspaceOptimizerFactory",
    "TrajectoryCallback",
    "build_optimizer",
    "load_finetuned",
    "recalibrate_batch_norm",
    "register",
    "save_finetuned",
]
