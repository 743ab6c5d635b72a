"""hf_sl2o: train large models with a learned optimizer in a tiny subspace, through the Hugging Face Trainer.

Importing the package adds `optim="sl2o"`, `"subspace_adamw"` and `"subspace_sgd"` to transformers.
"""

import warnings

from .arguments import SL2OTrainingArguments
from .batch_norm import BatchNormCallback, recalibrate_batch_norm
from .build import SubspaceOptimizerFactory, build_optimizer
from .callbacks import SubspaceLogCallback, TrajectoryCallback
from .estimators import PES, Estimator, FirstOrder, SecondOrder, unroll
from .meta import MetaTrainer
from .meta_arguments import MetaTrainingArguments
from .optim import LearnedOptimizer, SubspaceOptimizer
from .registry import register
from .rule import LSTMRule, Rule, RuleConfig, RuleState, SymbolicRule
from .subspace import Basis, DenseBasis, IdentityBasis, Layout, RandomBasis, Trajectory, fit_basis
from .tasks import Task, train_on
from .trainer import SL2OTrainer

__version__ = "0.1.0"

__all__ = [
    "Basis",
    "BatchNormCallback",
    "DenseBasis",
    "Estimator",
    "FirstOrder",
    "IdentityBasis",
    "LSTMRule",
    "Layout",
    "LearnedOptimizer",
    "MetaTrainer",
    "MetaTrainingArguments",
    "PES",
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
    "build_optimizer",
    "fit_basis",
    "recalibrate_batch_norm",
    "register",
    "train_on",
    "unroll",
]

try:
    register()
except ImportError as error:  # the rest of the package works
    warnings.warn(str(error), stacklevel=2)
