"""Training a rule by gradient descent on the losses of networks that it trains.

- `task`: a model, batches, a loss and a basis;  one run in them
- `unrolled`: a window of steps with the graph of the rule alone;  `estimators`: from a window to the meta-gradient
- `episodes`: one run of a task beside others, resumable in the middle
- `trainer`, `arguments`, `checkpoints`: `MetaTrainer`

It may import `optim` and what that stands on; not `training`.
"""

from .arguments import MetaTrainingArguments
from .estimators import PES, Estimator, FirstOrder, SecondOrder
from .task import Task, train_on
from .trainer import MetaTrainer
from .unrolled import unroll

__all__ = [
    "PES",
    "Estimator",
    "FirstOrder",
    "MetaTrainer",
    "MetaTrainingArguments",
    "SecondOrder",
    "Task",
    "train_on",
    "unroll",
]
