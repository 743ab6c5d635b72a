"""A rule without a network: an expression that was fitted to a learned one."""

from __future__ import annotations

import torch

from .config import EXPRESSIONS, RuleConfig
from .expressions import parse
from .rule import Rule

_MET = torch.tensor([1e-3, 0.03, 0.3, 1.0, 3.0, 10.0, 31.6])  # g~ is at most 1 / sqrt(1 - beta2), 31.6 for 0.999


class SymbolicRule(Rule):
    """A rule written as an expression of m~ and g~ (supplement 2.5, Table 2): no weights, no network state.

    Args:
        config ([`RuleConfig`], *optional*): Defaults to the preset `"symbolic"`.

    Raises:
        `ValueError`: `config` has no expression, or not the normalised inputs; the expression is not finite for some
            m~ and g~ that a run may meet, such as 0.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import SymbolicRule
    >>> rule = SymbolicRule()
    >>> round(rule(torch.ones(1), rule.init_state(1))[0].item(), 4)
    0.1655
    ```
    """

    def __init__(self, config: RuleConfig | None = None) -> None:
        config = RuleConfig.preset("symbolic") if config is None else config
        if config.expression is None or config.inputs != "normalized" or config.log_sign is not None:
            raise ValueError("an expression needs the inputs m~ and g~ themselves: inputs 'normalized', no log_sign")
        super().__init__(config)
        #: What is computed, a [`~hf_sl2o.rules.expressions.Node`].
        self.expression = parse(EXPRESSIONS.get(config.expression, config.expression))
        self._check_finite()

    def _check_finite(self) -> None:
        side = torch.cat([_MET, -_MET, _MET.new_zeros(1)])
        m, g = (points.reshape(-1) for points in torch.meshgrid(side, side, indexing="ij"))
        wrong = ~self.expression(m, g).isfinite()
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"the expression {self.expression} is {float(self.expression(m, g)[i])} at m = {m[i]:g}, g = "
                f"{g[i]:g}, which a run may meet; bound it, with tanh say"
            )

    def _state_shape(self) -> tuple[int, int]:
        return 0, 0

    def _output(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, of_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.expression(inputs[:, 0], inputs[:, 1]), hidden, cell
