"""Linear algebra on lists of parameters: which numbers of a model are covered, and directions in them.

- `layout`, `names`: the parameters of a model as one vector of length n
- `basis`: what every basis does: `project` a gradient, `lift` a step;  `dense`, `random`, `identity`: the directions
- `compiled`: the two for all parameters in one call, by `columns.cpp` on a CPU and `triton_columns` on CUDA
- `quantized`, `thin`, `tucker`, `factors`: directions of few bits, or that share factors, and their fits
- `host`: directions that stay in host memory, or in their file, and go to a device in pieces
- `sharded`, `shards`: a basis cut as FSDP2 cuts the parameters, and sums over the processes
- `storage`: bytes of each storage, and which fits
- `exact`: theta_0 + lift(c) to the bit, on any machine
- `trajectory`, `fit`: recorded snapshots, and their principal directions
- `stored`: what a saved basis says of its layout

It may import `foundation`, and torch; no transformers.
"""

from .basis import Basis
from .dense import DenseBasis
from .fit import Trajectory, fit_basis
from .identity import IdentityBasis
from .layout import Layout
from .quantized import QuantizedBasis
from .random import RandomBasis
from .storage import Ranks, storage_bytes
from .tucker import TuckerBasis

__all__ = [
    "Basis", "DenseBasis", "IdentityBasis", "Layout", "QuantizedBasis", "RandomBasis", "Ranks", "Trajectory",
    "TuckerBasis", "fit_basis", "storage_bytes",
]  # fmt: skip
