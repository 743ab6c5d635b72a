"""Optimizers for any torch loop: a learned rule over tensors, any torch optimizer over the coefficients of a basis."""

from ._common import average_weight
from .learned import LearnedOptimizer
from .subspace import Inner, SubspaceOptimizer

__all__ = ["Inner", "LearnedOptimizer", "SubspaceOptimizer", "average_weight"]
