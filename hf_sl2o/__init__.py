"""hf_sl2o: train large models with a learned optimizer in a tiny subspace, through the Hugging Face Trainer.

Importing the package adds `optim="sl2o"`, `"subspace_adamw"` and `"subspace_sgd"` to transformers.
"""

import warnings

from .meta import PES, Estimator, FirstOrder, MetaTrainer, MetaTrainingArguments, SecondOrder, Task, train_on, unroll
from .optim import LearnedOptimizer, SubspaceOptimizer
from .rules import LSTMRule, Rule, RuleConfig, RuleState, SymbolicRule
from .subspace import (
    Basis,
    DenseBasis,
    IdentityBasis,
    Layout,
    QuantizedBasis,
    RandomBasis,
    Trajectory,
    TuckerBasis,
    fit_basis,
)
from .training import (
    BatchNormCallback,
    FineTune,
    SL2OTrainer,
    SL2OTrainingArguments,
    SubspaceLogCallback,
    SubspaceOptimizerFactory,
    TrajectoryCallback,
    build_optimizer,
    load_finetuned,
    recalibrate_batch_norm,
    register,
    save_finetuned,
)

__version__ = "0.1.0"

__all__ = [
    "Basis",
    "BatchNormCallback",
    "DenseBasis",
    "Estimator",
    "FineTune",
    "FirstOrder",
    "IdentityBasis",
    "LSTMRule",
    "Layout",
    "LearnedOptimizer",
    "MetaTrainer",
    "MetaTrainingArguments",
    "PES",
    "QuantizedBasis",
    "RandomBasis",
    "Rule",
    "RuleConfig",
    "RuleState",
    "SL2OTrainer",
    "SL2OTrainingArguments",
    "SecondOrder",
    "SubspaceLogCallback",
    "SubspaceOptimizer",
    "SubspaceOptimizerFactory",
    "SymbolicRule",
    "Task",
    "Trajectory",
    "TrajectoryCallback",
    "TuckerBasis",
    "build_optimizer",
    "fit_basis",
    "load_finetuned",
    "recalibrate_batch_norm",
    "register",
    "save_finetuned",
    "train_on",
    "unroll",
]

try:
    register()
except ImportError as error:  # the rest of the package works
    warnings.warn(str(error), stacklevel=2)
