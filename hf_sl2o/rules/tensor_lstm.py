"""A rule that finds its own scale: an LSTM per tensor sets the length of its steps, and mixes their direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .config import RuleConfig
from .inputs import tensor_facts
from .kernel import Network
from .rule import Rule, RuleState

_KINDS = 3  # of tensors: a matrix, one that begins at zero, a vector or scalar
_FASTEST = 0.25  # the most that the logarithm of a step's length changes in a step
_FADING = 0.005  # the share of the way back to the first guess that it goes by itself
_SLIGHT = 0.1  # what always is there (time, kind, where the length stands) counts less than what is measured
_LARGEST = 1.5  # of a direction
_KEPT = 3 + _KINDS  # of a tensor, beside the LSTM's state: log of length over guess, the guess, the rate, its kind
_HEARD = (0.1, 10.0)  # the rates that it hears


class TensorLSTMRule(Rule):
    """A rule that measures how long its steps may be while it trains.

    For each tensor an LSTM sees whether its gradients agree with the momenta, how noisy they are, the same over all
    tensors, what a schedule leaves of the rate, and where the length of its steps stands. It changes the logarithm of
    that length a little, and mixes the direction of a step from m~, g~, further momenta and m / s, g / s. A coordinate
    keeps momenta alone. The first guess of the length is a share of the tensor's root mean square, or, where it begins
    at zero, of what a matrix of its size would begin with: rescaling a tensor rescales the guess.

        delta = rate / first rate * exp(guess + length) * 1.5 tanh(mix . inputs / 1.5)

    Args:
        config ([`RuleConfig`]): With `per_tensor` above 0.

    Raises:
        `ValueError`: `config` has no `per_tensor`, or an expression.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.rules import RuleConfig, TensorLSTMRule
    >>> rule = TensorLSTMRule(RuleConfig(per_tensor=8, momenta=[0.99]))
    >>> delta, state = rule(torch.ones(40), rule.init_state(40))
    >>> delta.shape, int(state.step)
    (torch.Size([40]), 1)
    ```
    """

    def __init__(self, config: RuleConfig) -> None:
        if not config.per_tensor or config.expression is not None:
            raise ValueError("the config has no per_tensor, or an expression; use Rule.from_config(config)")
        super().__init__(config)
        h, facts, columns = config.per_tensor, 1 + 2 * (1 + len(config.momenta) + config.distance), config.input_size
        seen = 3 * facts + 3 + 2 + _KINDS + 1
        self.lstm = nn.LSTMCell(seen, h)
        self.guess = nn.Parameter(torch.full((_KINDS,), math.log(0.1)))
        self.change = nn.Linear(seen + h, 1, bias=False)  # of the logarithm of the length
        self.mix = nn.Linear(1 + h, columns, bias=False)  # of the columns that make a direction
        with torch.no_grad():
            # The mean cosine of g and m over all tensors: about 0 where steps are of the right length. Early it is
            # followed at once, later slowly, to somewhat below 0, and at the end above.
            self.change.weight.zero_()
            self.change.weight[0, facts + 1] = 0.1
            self.change.weight[0, 2 * facts + 1] = 1.0
            self.change.weight[0, 3 * facts + 3] = 0.3  # by what a schedule leaves of the rate
            self.change.weight[0, seen - 1] = -0.05
            self.mix.weight.zero_()
            self.mix.weight[0, 0] = 1.0  # m~: Adam's direction
            self.mix.weight[1, 0] = 0.1  # g~

    def _state_shape(self) -> tuple[int, int]:
        return 0, 0

    def _m_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # A tenth of m is new at each step, far above a bf16 unit of it. Slow momenta and v would stall.
        return torch.bfloat16 if dtype == torch.float32 else dtype

    def _of_tensors(self, weights: Sequence[torch.Tensor], rate: float | torch.Tensor) -> torch.Tensor:
        rows = []
        for w in weights:
            size = torch.tensor(0.03)
            if w.ndim > 1:
                rms = w.detach().float().square().mean().sqrt()
                size = torch.where(rms > 0, rms, (3 * max(w.shape)) ** -0.5)
            row = torch.zeros(_KEPT + 2 * self.config.per_tensor, device=w.device)
            row[0] = torch.as_tensor(rate).clamp(*_HEARD).log()
            row[1] = size.log()
            row[2] = rate
            if w.ndim > 1:
                row[3:5] = torch.stack([rms > 0, rms == 0])
            else:
                row[5] = 1.0
            rows.append(row)
        return torch.stack(rows)

    def tensor_inputs(
        self,
        g: torch.Tensor,
        state: RuleState,
        sizes: Sequence[int] | None = None,
        *,
        betas: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        config = self.config
        beta1, beta2 = (config.beta1, config.beta2) if betas is None else betas
        momenta = state.momenta.unbind(-1)
        averages = [(state.exp_avg, beta1), *zip(momenta, config.momenta, strict=False)]
        moved = momenta[-1] if config.distance else None
        sizes = (g.numel(),) if sizes is None else tuple(sizes)
        step = state.step + 1 + config.bias_correction_offset
        return tensor_facts(g, averages, state.exp_avg_sq, step, sizes, beta2=beta2, moved=moved)

    def tensor_step(
        self, inputs: torch.Tensor, tensors: torch.Tensor, rate: float | torch.Tensor = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(inputs.device.type, enabled=False):
            return self._tensor_step(inputs, tensors, rate)

    def _tensor_step(
        self, inputs: torch.Tensor, tensors: torch.Tensor, rate: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.config.per_tensor
        s, step, facts = inputs[:, :1], inputs[:, 1:2], inputs[:, 2:]
        length, size, base, kind, hidden, cell = tensors.split([1, 1, 1, _KINDS, h, h], dim=-1)
        if self.config.distance:  # in steps of this length, and as a random walk goes
            way = inputs[:, -1:] - (length + size + kind @ self.guess[:, None]).detach() - step.clamp_min(1).log() / 2
            facts = torch.cat([facts[:, :-1], way.clamp(-4, 4) / 2], dim=-1)
        moves = (step > 0).to(s.dtype)  # (k, 1)
        mean = (facts * moves).sum(dim=0, keepdim=True) / moves.sum().clamp_min(1.0)  # (1, c)
        time = torch.cat([torch.exp(-step / steps) for steps in (4.0, 30.0, 200.0)], dim=-1)
        share = _share(base[:, 0], rate)[:, None]
        mean = mean.expand_as(facts)
        always = torch.cat([time, share, length / 3, kind, torch.ones_like(share)], dim=-1)
        seen = torch.cat([facts, mean, mean * time[:, 1:2], _SLIGHT * always], dim=-1)
        hidden, cell = self.lstm(seen, (hidden, cell))
        change = _FASTEST * torch.tanh(self.change(torch.cat([seen, _SLIGHT * hidden], dim=-1)))
        length = length + moves * (change - _FADING * length)
        mix = self.mix(torch.cat([torch.ones_like(s), hidden], dim=-1))  # (k, columns)
        kept = torch.cat([length, size, base, kind, hidden, cell], dim=-1)
        return torch.cat([s, self.lengths(kept, rate)[:, None], mix], dim=-1), kept

    @property
    def own_scale(self) -> bool:
        return True

    def lengths(self, tensors: torch.Tensor, rate: float | torch.Tensor) -> torch.Tensor:
        guess = (tensors[:, 3:_KEPT] * self.guess).sum(dim=-1)  # (k,)
        steps = torch.exp(tensors[:, 0] + tensors[:, 1] + guess)  # (k,)
        return _share(tensors[:, 2], rate) * steps

    def for_kernel(self) -> Network | None:
        return Network(0, 0, self.mix.weight, _LARGEST) if type(self) is TensorLSTMRule else None

    def _output(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, of_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        direction = (inputs * of_tensor[:, 2:]).sum(dim=-1)  # (N,)
        return of_tensor[:, 1] * _LARGEST * torch.tanh(direction / _LARGEST), hidden, cell


def _share(base: torch.Tensor, rate: float | torch.Tensor) -> torch.Tensor:
    """What a schedule multiplies the rate by now; `rate` itself where a run began at 0."""
    same = rate.to(base).expand_as(base) if torch.is_tensor(rate) else torch.full_like(base, rate)
    return torch.where(base > 0, same / base, same)
