"""Learned update rules as pure functions: from a gradient and a state to a step and the next state.

- `config`: every choice a rule makes, and the paper's presets
- `inputs`: what a rule sees, the columns of its network's input
- `rule`: what all rules do;  `lstm`, `tensor_lstm`, `symbolic`: the three kinds
- `expressions`: the texts of a symbolic rule, and their grammar
- `load`, `shipped/`: the four rules that ship, and how a user's words name one
- `kernel`: a step in one pass, by `lstm_kernel` and `tensor_sums` (C++) on a CPU, by `triton_kernel` on CUDA

It may import `foundation`, and torch; no transformers.
"""

from .config import ADDED_LATER, RuleConfig
from .load import SHIPPED_RULES, load_rule
from .lstm import LSTMRule
from .rule import GONE, Rule, RuleState
from .symbolic import SymbolicRule
from .tensor_lstm import TensorLSTMRule

__all__ = [
    "ADDED_LATER", "GONE", "SHIPPED_RULES", "LSTMRule", "Rule", "RuleConfig", "RuleState", "SymbolicRule",
    "TensorLSTMRule", "load_rule",
]  # fmt: skip
