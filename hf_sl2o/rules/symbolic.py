"""A rule without a network: an expression that was fitted to a learned one."""

from __future__ import annotations

import torch

from .config import EXPRESSIONS, RuleConfig
from .rule import Rule


class SymbolicRule(Rule):
    """A rule written as an expression of m~ and g~ (supplement 2.5, Table 2): no weights, no network state.

    Args:
        config ([`RuleConfig`], *optional*): Defaults to the preset `"symbolic"`.

    Raises:
        `ValueError`: `config` names no expression, or not the normalised inputs.

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

    def _state_shape(self) -> tuple[int, int]:
        return 0, 0

    def _output(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, of_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.config.expression is not None
        return EXPRESSIONS[self.config.expression](inputs[:, 0], inputs[:, 1]), hidden, cell
