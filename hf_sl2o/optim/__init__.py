"""Optimizers for any torch loop.

- `learned`: a rule over tensors, such as LoRA factors or coefficients
- `subspace`: any torch optimizer over the d coefficients of a basis
- `_streaming`, `_sharded_streaming`: gradients that are projected as backward makes them
- `_piece`, `_kept`, `_gradients`, `_sharding`, `_inner`, `_weights`, `_two_points`, `_state`, `_common`: their parts

It may import `rules`, `subspace` and `foundation`, and torch; no transformers.
"""

from ._common import average_weight
from ._streaming import send_nothing
from .learned import LearnedOptimizer
from .subspace import Inner, SubspaceOptimizer

__all__ = ["Inner", "LearnedOptimizer", "SubspaceOptimizer", "average_weight", "send_nothing"]
