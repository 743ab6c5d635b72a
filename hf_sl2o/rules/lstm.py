"""The rule of SL2O: one small LSTM, shared by all coordinates."""

from __future__ import annotations

import torch
from torch import nn

from .config import RuleConfig
from .kernel import Network
from .rule import Rule


class LSTMRule(Rule):
    """SL2O's rule: one LSTM of size 8, a bias-free linear head and tanh, shared by all coordinates.

    Args:
        config ([`RuleConfig`], *optional*): Defaults to the paper's choices for CNNs; 392 weights.

    Raises:
        `ValueError`: `config` names an expression.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import LSTMRule
    >>> rule = LSTMRule()
    >>> delta, state = rule(torch.ones(40), rule.init_state(40))
    >>> delta.shape, int(state.step)
    (torch.Size([40]), 1)
    ```
    """

    def __init__(self, config: RuleConfig | None = None) -> None:
        config = RuleConfig() if config is None else config
        if config.expression is not None:
            raise ValueError(f"the config names the expression {config.expression!r}; use SymbolicRule(config)")
        super().__init__(config)
        size = config.embed_size or config.input_size
        self.embed = nn.Linear(config.input_size, config.embed_size) if config.embed_size else None
        self.cells = nn.ModuleList(
            nn.LSTMCell(size if layer == 0 else config.hidden_size, config.hidden_size)
            for layer in range(config.num_layers)
        )
        self.head = nn.Linear(config.hidden_size, 1, bias=False)

    def _state_shape(self) -> tuple[int, int]:
        return self.config.num_layers, self.config.hidden_size

    def for_kernel(self) -> Network | None:
        cells = [cell for cell in self.cells if type(cell) is nn.LSTMCell and cell.bias]
        if type(self) is not LSTMRule or self.embed is not None or len(cells) < len(self.cells):
            return None
        h, parts = self.config.hidden_size, []
        for cell in cells:
            of_gates = torch.cat([(cell.bias_ih + cell.bias_hh)[:, None], cell.weight_ih, cell.weight_hh], dim=1)
            parts.append(of_gates.view(4, h, -1).permute(1, 2, 0).reshape(-1))  # of each unit, of its four gates
        return Network(len(cells), h, torch.cat([*parts, self.head.weight.reshape(-1)]))

    def _output(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, of_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = inputs if self.embed is None else nn.functional.elu(self.embed(inputs))
        hiddens, cells = [], []
        for layer, lstm in enumerate(self.cells):
            x, next_cell = lstm(x, (hidden[:, layer], cell[:, layer]))
            hiddens.append(x)
            cells.append(next_cell)
        output = self.head(x).squeeze(-1)  # (N,)
        if self.config.squash:
            output = torch.tanh(output)
        return output, torch.stack(hiddens, dim=1), torch.stack(cells, dim=1)
