"""Linear algebra on parameter lists: layouts, bases and how to fit them. Knows no optimizer and no Trainer."""

from .basis import Basis
from .dense import DenseBasis
from .identity import IdentityBasis
from .layout import Layout
from .pca import Trajectory, fit_basis
from .random import RandomBasis

__all__ = ["Basis", "DenseBasis", "IdentityBasis", "Layout", "RandomBasis", "Trajectory", "fit_basis"]
