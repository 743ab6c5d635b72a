"""What a learned rule is: every choice it makes, and the published configurations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..foundation.checked import check_flag, check_integer, check_number, shown
from .expressions import parse

# Choices that the first saved rules did not have to make.
ADDED_LATER: dict[str, Any] = {
    "momenta": (), "progress": False, "tensor_scale": False, "agreement": False,
    "average": 0.0, "per_tensor": 0, "distance": False,
}  # fmt: skip

ROUNDING, CEASED = 1e-6, 0.03  # shares of a tensor's scale, and of m~ and g~, below which nothing moves

# Supplement, Table 2: expressions fitted to a rule that was meta-trained on ResNet-20.
EXPRESSIONS = {
    "tanh": "0.2326 * tanh(g - 0.1094)",
    "exp-tanh": "0.2097 * exp(tanh(g)) - 0.2523",
    "exp-tanh-cubic": "0.0627 * exp(tanh(g + m**3))",
}


# The most units or layers of a network: what is made of them can be counted without overflow.
_LARGEST = 1 << 24
_FLOAT32 = torch.finfo(torch.float32)


def check_average(average: float) -> None:
    """Raises `ValueError` unless `average` is a finite number of at least 0; 0 is no average."""
    check_number("average", average, least=0)


@dataclass(frozen=True)
class RuleConfig:
    """Every choice a rule makes; saved with its weights. Presets: [`RuleConfig.preset`].

    Example:

    ```python
    >>> from hf_sl2o import RuleConfig
    >>> RuleConfig.preset("paper-transformer").output_scale
    0.0001
    ```
    """

    inputs: str = dataclasses.field(
        default="normalized", metadata={"help": '"normalized": m~ and g~; "gradient": g alone (L2O-DM).'}
    )
    beta1: float = dataclasses.field(default=0.9, metadata={"help": "Decay of m (official code, networks.py)."})
    beta2: float = dataclasses.field(default=0.99, metadata={"help": "Decay of v (official code, networks.py)."})
    eps: float = dataclasses.field(default=1e-8, metadata={"help": "Added to sqrt(v^) (official code)."})
    log_sign: float | None = dataclasses.field(
        default=None,
        metadata={"help": "p: each input x becomes (log|x| / p, sign x), linear below e^-p. None: x itself."},
    )
    embed_size: int = dataclasses.field(default=0, metadata={"help": "Linear + ELU before the LSTM; 0: none."})
    hidden_size: int = dataclasses.field(default=8, metadata={"help": "h (supplement 1)."})
    num_layers: int = dataclasses.field(default=1, metadata={"help": "LSTM layers (supplement 1)."})
    squash: bool = dataclasses.field(default=True, metadata={"help": "tanh on the head's output (supplement 1)."})
    output_scale: float = dataclasses.field(
        default=1.0, metadata={"help": "delta per unit of the head's output, in units of the coordinates."}
    )
    bias_correction_offset: int = dataclasses.field(
        default=0, metadata={"help": "1 restores the exponent t + 1 of the published CNN and ViT scripts."}
    )
    reset_cell_every: int = dataclasses.field(
        default=0,
        metadata={"help": "Steps after which the cell state is zeroed; 391 (an epoch) restores the published runs."},
    )
    expression: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": 'An expression of m~ and g~ instead of the LSTM, such as "0.2 * tanh(g + m)" (see '
            f"`hf_sl2o.rules.expressions`), or one of {sorted(EXPRESSIONS)} (supplement 2.5, Table 2)."
        },
    )
    momenta: tuple[float, ...] = dataclasses.field(
        default=(),
        metadata={"help": "Decays of further momenta, each an input as m~ is; the paper has none."},
    )
    progress: bool = dataclasses.field(
        default=False,
        metadata={"help": "The share of the run that is done is an input; the optimizer then needs total_steps."},
    )
    tensor_scale: bool = dataclasses.field(
        default=False,
        metadata={"help": "m^ / s and g / s are inputs too, with s^2 the mean of v^ over the coordinate's tensor."},
    )
    agreement: bool = dataclasses.field(
        default=False,
        metadata={"help": "The cosine of g and the last step's m over the coordinate's tensor is an input."},
    )
    per_tensor: int = dataclasses.field(
        default=0,
        metadata={
            "help": "Size of an LSTM over whole tensors, which sets the length of steps and mixes their direction; a "
            "coordinate then has no network of its own. 0: none. See `TensorLSTMRule`."
        },
    )
    distance: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "The LSTM of a tensor also sees how far the tensor is from its start, in its steps, and whether "
            "gradients still point away from there; costs a number a coordinate."
        },
    )
    average: float = dataclasses.field(
        default=0.0,
        metadata={
            "help": "eta of the running average at which a Trainer evaluates and saves, where its user sets none; "
            "0: none. No part of the update."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.momenta, list | tuple):
            raise ValueError(f"momenta are {shown(self.momenta)}, expected a list of values in [0, 1)")
        object.__setattr__(self, "momenta", tuple(self.momenta))  # JSON has lists
        self._check_numbers()
        if self.inputs not in ("normalized", "gradient"):
            raise ValueError(f'inputs is {shown(self.inputs)}, expected "normalized" or "gradient"')
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"betas are {self.beta1} and {self.beta2}, expected values in [0, 1)")
        if any(not 0 <= beta < 1 for beta in self.momenta) or (self.momenta and self.inputs != "normalized"):
            raise ValueError(f'momenta are {self.momenta}, expected values in [0, 1), beside inputs "normalized"')
        for name in ("tensor_scale", "agreement", "per_tensor"):
            if getattr(self, name) and self.inputs != "normalized":
                raise ValueError(f'{name} adds to inputs "normalized", and inputs is {self.inputs!r}')
        if self.expression is not None:
            parse(EXPRESSIONS.get(self.expression, self.expression))
        if self.per_tensor and (self.agreement or self.expression is not None):
            raise ValueError(
                "per_tensor is another kind of rule, which sees agreement: leave agreement and expression"
            )
        if self.distance and not self.per_tensor:
            raise ValueError("distance is seen by the LSTM of a tensor, and per_tensor is 0")

    def _check_numbers(self) -> None:
        """Raises `ValueError` on a number of another type, NaN, Inf, or one that fp32 cannot compute with."""
        for name in ("inputs", "expression"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, expected a string")
        for name in ("squash", "progress", "tensor_scale", "agreement", "distance"):
            check_flag(name, getattr(self, name))
        for name, least, most in (
            ("embed_size", 0, _LARGEST),
            ("hidden_size", 1, _LARGEST),
            ("num_layers", 1, _LARGEST),
            ("per_tensor", 0, _LARGEST),
            ("bias_correction_offset", 0, _LARGEST),
            ("reset_cell_every", 0, 1 << 53),
        ):
            check_integer(name, getattr(self, name), least, most)
        check_number("beta1", self.beta1)
        check_number("beta2", self.beta2)
        for beta in self.momenta:
            check_number("one of the momenta", beta)
        check_number("eps", self.eps, least=_FLOAT32.tiny, most=_FLOAT32.max)
        check_number("output_scale", self.output_scale, least=-_FLOAT32.max, most=_FLOAT32.max)
        if self.log_sign is not None:
            check_number("log_sign", self.log_sign, above=0, most=80)  # e^80 is about as large as fp32 holds
        check_average(self.average)

    @classmethod
    def preset(cls, name: str, *, published_quirks: bool = False) -> RuleConfig:
        """Returns a published configuration.

        Args:
            name (`str`): `"paper-cnn"` and `"paper-transformer"` (SL2O's official code), `"rnnprop"` and `"l2o-dm"`
                (earlier learned optimizers the paper compares with), `"symbolic"` (Table 2, first expression).
            published_quirks (`bool`, *optional*, defaults to `False`): Restore what the official scripts did and we
                hold for slips: the exponent t + 1 in the bias correction (CNN and ViT scripts), and the cell state
                set to zero every epoch of 391 steps (evaluation scripts). The published numbers were probably made
                with both.
        """
        presets = {
            "paper-cnn": cls(),
            "paper-transformer": cls(log_sign=10.0, output_scale=1e-4),
            "rnnprop": cls(beta1=0.95, beta2=0.95, embed_size=20, hidden_size=20, num_layers=2, output_scale=0.1),
            "l2o-dm": cls(
                inputs="gradient", log_sign=5.0, hidden_size=20, num_layers=2, squash=False, output_scale=0.01
            ),
            "symbolic": cls(expression="tanh"),
        }
        if name not in presets:
            raise ValueError(f"there is no preset {name!r}, expected one of {sorted(presets)}")
        config = presets[name]
        if published_quirks:
            config = dataclasses.replace(config, bias_correction_offset=1, reset_cell_every=391)
        return config

    def of_update(self) -> dict[str, Any]:
        """Every choice that the update depends on: all but `average`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "average"}

    @property
    def input_size(self) -> int:
        """Numbers per coordinate that reach the network."""
        gradients = (2 if self.inputs == "normalized" else 1) + len(self.momenta) + 2 * self.tensor_scale
        return gradients * (1 if self.log_sign is None else 2) + self.progress + self.agreement
