"""Optimizers beside each other on a task: every arm tuned on validation, with what was paid before it began.

Through a Trainer, from an ordinary run to the table (`Comparison`):

- `subject`: what is compared: model, data, loss;  `images`: the same for CIFAR
- `comparison`: the stages;  `meta_stage`: the one that trains a rule;  `kept/`: what stays on disk between two starts
- `generation`: sentences from the weights of a comparison's runs, and their scores
- `arguments`, `arms`: what a comparison is told, and its optimizers;  `tuning`: learning rates and seeds
- `cards`: what a comparison says for the model card of its rule
- `levels`, `curves`, `judging`: steps to a loss, and what was paid;  `table`, `figures`, `environment`,
  `timing`: what is written
- `report/`: a page to look at, from a run or a comparison
- `command_line/`: flags of recipes and studies;  `data/`: E2E and CIFAR;  `p_bfgs`: a baseline of the paper

In a plain loop, on small tasks (`compare_on`):

- `on_task`: the same on a `Task`;  `tasks/`: problems, networks, and tasks by name
- `rivals`: optimizers that promise to need no tuning, as arms
- `one_run`: schedules, averages and finishes of one run within a budget
- `planning`: bytes, wire and time of a step, before anything is made
- `wire`: two processes at the ends of a thin wire
- `plans`: how the rules that ship were meta-trained
- `supplement`: the paper's tables and figures: which command redoes each, and what became of its claim

It may import everything below it; nothing imports it but recipes, benchmarks and users.
"""

from .arguments import ComparisonArguments, training_arguments
from .arms import ARMS, Arm, grid
from .comparison import Comparison
from .environment import environment
from .on_task import TaskArm, compare_on
from .table import table

__all__ = [
    "ARMS",
    "Arm",
    "Comparison",
    "ComparisonArguments",
    "TaskArm",
    "compare_on",
    "environment",
    "grid",
    "table",
    "training_arguments",
]
