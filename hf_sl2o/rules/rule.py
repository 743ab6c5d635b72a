"""A learned update rule as a pure function of gradient and state: what every rule does, whatever its network.

g gradient, m and v its first and second moment, m~ and g~ the normalised inputs, h hidden size, delta the output; the
caller moves theta (or a coefficient) by -lr * delta. One rule is shared by all coordinates; N is their number.

    m = beta1 m + (1 - beta1) g        m~ = m^ / (sqrt(v^) + eps)        with m^, v^ bias-corrected
    v = beta2 v + (1 - beta2) g^2      g~ = g  / (sqrt(v^) + eps)
    hidden, cell = LSTM([m~, g~], hidden, cell)        delta = output_scale * tanh(W hidden)

m~ and g~ do not tell a coordinate with large gradients from one with small ones. A rule with `tensor_scale` also sees
m^ / s and g / s, with s^2 the mean of v^ over the tensor (all d coefficients; one LoRA factor). Nor do they tell
whether its steps are too short or too long for a network: a rule with `agreement` also sees the cosine of g and the
last step's m over the tensor: near 1 while gradients keep their direction, about 0 in noise, negative after a step too
far.

A network's output at inputs of zero is not zero. So that a coordinate without a history of gradient stays where it is,
and rounding is not amplified, every rule's delta is multiplied by v^ / (v^ + eps^2 + (1e-6 s)^2): 0 where there never
was a gradient, next to 0 where it is below eps or a millionth of its tensor's scale s, and 1 to fp32's last digits
elsewhere. And by the larger of |m~| and |g~| over 0.03 where that is below 1: a row of an embedding that was seen once
comes to rest as its momentum fades, instead of walking on until v has forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..foundation.checked import check_float, check_shapes
from ..foundation.hub import HubFiles, take
from .config import ADDED_LATER, CEASED, ROUNDING, RuleConfig
from .inputs import network_inputs, tensor_index, tensor_inputs
from .kernel import Network, fused_update_

R = TypeVar("R", bound="Rule")

# Coordinates of one call of a rule in `update_`.
_CHUNK = {"cpu": 1 << 13, "cuda": 1 << 20}


# A choice of earlier versions, as they saved it where it was not made.
GONE = (("base_width", 0),)


def _without_gone(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Leaves out choices of earlier versions that were not made.

    Raises:
        `ValueError`: one was made.
    """
    for name, off in GONE:
        if settings.get(name, off) != off:
            raise ValueError(
                f"the rule in {where} has {name} {settings[name]!r}, which this version does not know: an earlier one "
                f"multiplied its steps by {name} / width over wide matrices. Set it to {off} in config.json and give "
                "the learning rate that width calls for, or use the rule that ships, which finds its scale by itself"
            )
    return {name: value for name, value in settings.items() if (name, value) not in GONE}


class RuleState(NamedTuple):
    """What a rule remembers, for N coordinates of k tensors: fp32."""

    step: torch.Tensor  # (), updates done
    exp_avg: torch.Tensor  # (N,), m
    exp_avg_sq: torch.Tensor  # (N,), v
    hidden: torch.Tensor  # (N, layers, h)
    cell: torch.Tensor  # (N, layers, h)
    momenta: torch.Tensor  # (N, j), the further momenta of the configuration, and the way from the start; mostly j = 0
    tensors: torch.Tensor  # (k, s), what is kept of each of the k tensors that the coordinates are of; mostly s = 0

    def detach(self) -> RuleState:
        """Returns the same numbers without their graph."""
        return RuleState(*(tensor.detach() for tensor in self))

    def at(self, part: slice | torch.Tensor) -> RuleState:
        """Returns the state of some of the coordinates: views for a slice, copies for indices."""
        step = self.step if self.step.ndim == 0 else self.step[part]
        mine = {name: getattr(self, name)[part] for name in self._fields[1:-1]}
        return RuleState(step=step, tensors=self.tensors, **mine)


class Rule(nn.Module, HubFiles):
    """A learned update rule as a pure function; [`LSTMRule`] and [`SymbolicRule`] are the two kinds.

    `rule(g, state)` returns the update `delta` and the next state. It changes nothing in place and computes in the
    dtype of its weights (fp32), whatever autocast says.
    """

    key = "rule"

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def from_config(config: RuleConfig) -> Rule:
        """Builds the rule that `config` describes, with fresh weights."""
        from .lstm import LSTMRule  # the three kinds stand on this class
        from .symbolic import SymbolicRule
        from .tensor_lstm import TensorLSTMRule

        if config.expression is not None:
            return SymbolicRule(config)
        return TensorLSTMRule(config) if config.per_tensor else LSTMRule(config)

    def init_state(
        self,
        n: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        weights: Sequence[torch.Tensor] | None = None,
        rate: float | torch.Tensor = 1.0,
    ) -> RuleState:
        """Returns the state of `n` coordinates before the first step: zeros.

        Args:
            n (`int`): N.
            device, dtype (*optional*): Of the state.
            weights (`Sequence[torch.Tensor]`, *optional*): The tensors that the coordinates are of, as they begin; by
                default one vector of zeros. A rule that keeps something of each tensor looks at them.
            rate (`float`, *optional*, defaults to 1.0): Where a rule begins to look for its scale, over its own guess;
                a schedule multiplies it.
        """
        layers, size = self._state_shape()

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        hidden, cell, momenta = (
            zeros(n, layers, size),
            zeros(n, layers, size),
            zeros(n, len(self.config.momenta) + self.config.distance),
        )
        weights = [zeros(n)] if weights is None else weights
        kept = self._of_tensors(weights, rate).to(device=device, dtype=dtype)
        return RuleState(zeros(), zeros(n).to(self._m_dtype(dtype)), zeros(n), hidden, cell, momenta, kept)

    def _m_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which m is kept between steps."""
        return dtype

    def _of_tensors(self, weights: Sequence[torch.Tensor], rate: float | torch.Tensor) -> torch.Tensor:
        """What is kept of each of k tensors before the first step, (k, s)."""
        return torch.zeros(len(weights), 0)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what makes the update, configuration and weights; optimizer states carry it."""
        config = {k: v for k, v in self.config.of_update().items() if ADDED_LATER.get(k, ...) != v}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _state_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _output(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, of_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps (N, k) inputs and the network's state to (N,) outputs and the next state."""
        raise NotImplementedError

    def for_kernel(self) -> Network | None:
        """What a kernel computes of a coordinate; None: there is none, and torch does it."""
        return None

    @property
    def own_scale(self) -> bool:
        """Whether a rate is no more than where it begins to look, so that delta is not multiplied by it."""
        return False

    def lengths(self, tensors: torch.Tensor, rate: float | torch.Tensor) -> torch.Tensor:
        """Returns the unit of delta for each of k tensors, (k,), for what is kept of them; weight decay is in it."""
        return tensors.new_full((len(tensors),), abs(self.config.output_scale))

    def tensor_step(
        self, inputs: torch.Tensor, tensors: torch.Tensor, rate: float | torch.Tensor = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps what counts of each tensor in this step, and what is kept of it, to the numbers for its coordinates.

        Args:
            inputs (`torch.Tensor` of shape `(k, c)`): From [`~Rule.tensor_inputs`].
            tensors (`torch.Tensor` of shape `(k, s)`): `state.tensors`.
            rate (`float`, or `torch.Tensor` of shape `()` or `(k,)`, *optional*, defaults to 1.0): The learning rate
                of this step, for a rule that finds its own scale.

        Returns:
            `(k, o)`, and the next `tensors`.
        """
        return inputs, tensors

    def tensor_inputs(
        self,
        g: torch.Tensor,
        state: RuleState,
        sizes: Sequence[int] | None = None,
        *,
        betas: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """Returns what counts of each tensor in the flat `g`, before the step; no vector of N numbers is made.

        Args:
            g, state, betas: As for [`~Rule.forward`].
            sizes (`Sequence[int]`, *optional*): Of the k tensors; by default `g` is one tensor.

        Returns:
            `(k, 2)`: s, the square root of the mean of v^ over the tensor, and the cosine of g and m (0 at first, and
            for a rule without `agreement`).
        """
        beta2 = self.config.beta2 if betas is None else betas[1]
        step = state.step + 1 + self.config.bias_correction_offset
        sizes = (g.numel(),) if sizes is None else tuple(sizes)
        return tensor_inputs(
            g, state.exp_avg, state.exp_avg_sq, step, sizes, beta2=beta2, agreement=self.config.agreement
        )

    def forward(
        self,
        g: torch.Tensor,
        state: RuleState,
        *,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        total_steps: float | None = None,
        rate: float | torch.Tensor = 1.0,
        of_tensor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RuleState]:
        """Returns the update for one step.

        Args:
            g (`torch.Tensor` of shape `(N,)`): The gradient of each coordinate.
            state ([`RuleState`]): From [`~Rule.init_state`] or the previous step.
            betas, eps (*optional*): Instead of the configuration's.
            total_steps (`float`, *optional*): Steps of the whole run, for a rule whose configuration has `progress`.
            rate (`float` or 0-d `torch.Tensor`, *optional*, defaults to 1.0): As for [`~Rule.tensor_step`].
            of_tensor (`torch.Tensor` of shape `(N, o)` or `(1, o)`, *optional*): The numbers of each coordinate's
                tensor, from [`~Rule.tensor_step`], which the caller then goes on with; by default `g` is one tensor.

        Returns:
            `delta` of shape `(N,)`, to be subtracted, and the next [`RuleState`].

        Raises:
            `ValueError`: the rule needs `total_steps` and got none.
        """
        config = self.config
        beta1, beta2 = (config.beta1, config.beta2) if betas is None else betas
        eps = config.eps if eps is None else eps
        step = state.step + 1
        if config.progress and not total_steps:
            raise ValueError(
                f"this rule sees the share of the run that is done, and total_steps is {total_steps}: pass the number "
                "of steps of the run (max_steps to the Trainer)"
            )
        tensors = state.tensors
        if of_tensor is None:
            of_tensor, tensors = self.tensor_step(self.tensor_inputs(g, state, betas=betas), tensors, rate)
        momenta = state.momenta
        with torch.autocast(g.device.type, enabled=False):
            v = torch.lerp(g * g, state.exp_avg_sq, beta2)  # (N,)
            exponent = step + config.bias_correction_offset
            v_hat = v / (1 - beta2**exponent)
            m = torch.lerp(g, state.exp_avg.to(g.dtype), beta1)  # (N,)
            inverse = 1 / (v_hat.sqrt() + eps)
            m_hat = m / (1 - beta1**exponent)
            seen = [m_hat * inverse, g * inverse]  # m~ and g~
            recent = torch.maximum(seen[0].abs(), seen[1].abs())  # (N,)
            if config.momenta:
                further = [
                    torch.lerp(g, old, beta) for old, beta in zip(momenta.unbind(-1), config.momenta, strict=False)
                ]
                seen += [
                    new / (1 - beta**exponent) * inverse for new, beta in zip(further, config.momenta, strict=True)
                ]
                momenta = torch.stack(further + [*momenta.unbind(-1)][len(further) :], dim=-1)  # (N, j)
            done = state.step / total_steps if config.progress and total_steps else None
            inputs = network_inputs(config, seen, g, m_hat, of_tensor, eps, done)
            cell = state.cell
            if config.reset_cell_every:
                kept = (step - 1) % config.reset_cell_every != 0  # () or (N,)
                cell = cell * kept.reshape(-1, 1, 1)
            output, hidden, cell = self._output(inputs, state.hidden, cell, of_tensor)
            rounding = eps**2 + (ROUNDING * of_tensor[:, 0].detach()).square()  # (N,) or (1,)
            history = v_hat / (v_hat + rounding).clamp_min(torch.finfo(v_hat.dtype).tiny)  # (N,)
            history = history * (recent / CEASED).clamp_max(1.0)
            delta = config.output_scale * history * output
            if config.distance:
                momenta = torch.cat([momenta[:, :-1], momenta[:, -1:] - delta.detach()[:, None]], dim=-1)
        return delta, RuleState(step, m.to(state.exp_avg.dtype), v, hidden, cell, momenta, tensors)

    @torch.no_grad()
    def update_(
        self,
        g: torch.Tensor,
        state: RuleState,
        *,
        finite: torch.Tensor | None = None,
        sizes: Sequence[int] | None = None,
        of_tensors: tuple[torch.Tensor, torch.Tensor] | None = None,
        rate: float | torch.Tensor = 1.0,
        **options: Any,
    ) -> torch.Tensor:
        """Turns `g` into delta and `state` into the next one, in place, without a graph.

        One computation over all coordinates, by a kernel where there is one, else a chunk at a time: what the rule
        keeps per coordinate then stays in the cache, and there is no second vector of N numbers.

        Args:
            g (`torch.Tensor` of shape `(N,)`): The gradient; overwritten.
            state ([`RuleState`]): Overwritten.
            finite (0-d `torch.Tensor`, *optional*): Where false, delta is 0 and the state stays as it is.
            sizes (`Sequence[int]`, *optional*): Of the tensors that `g` holds; by default it is one tensor.
            of_tensors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): From [`~Rule.tensor_step`], if it is known:
                `(k, o)`, and `(k, s)`.
            rate (`float` or 0-d `torch.Tensor`, *optional*, defaults to 1.0): As for [`~Rule.tensor_step`].
            **options: As for [`~Rule.forward`].

        Returns:
            `g`, which holds delta of shape `(N,)`.
        """
        chunk = _CHUNK.get(g.device.type, 1 << 16)
        if of_tensors is None:
            inputs = self.tensor_inputs(g, state, sizes, betas=options.get("betas"))
            of_tensors = self.tensor_step(inputs, state.tensors, rate)
        tensors, kept = of_tensors  # (k, o), (k, s)
        done = fused_update_(self, g, state, tensors, sizes=sizes, finite=finite, **options)
        for start in () if done else range(0, g.numel(), chunk):
            part = slice(start, min(start + chunk, g.numel()))
            old = state.at(part)
            of_tensor = tensors
            if len(tensors) > 1:
                assert sizes is not None
                of_tensor = tensors[tensor_index(torch.arange(part.start, part.stop, device=g.device), sizes)]
            delta, new = self(g[part], old, of_tensor=of_tensor, **options)
            for previous, following in zip(old[1:-1], new[1:-1], strict=True):
                previous.copy_(following if finite is None else torch.where(finite, following, previous))
            g[part] = delta if finite is None else torch.where(finite, delta, 0)
        state.tensors.copy_(kept if finite is None else torch.where(finite, kept, state.tensors))
        state.step.add_(1 if finite is None else finite)
        return g

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {"rule": dataclasses.asdict(self.config)}, dict(self.state_dict())

    @classmethod
    def from_files(cls: type[R], config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> R:
        take(config, {"rule"}, where)
        fields = {field.name for field in dataclasses.fields(RuleConfig)}
        if not isinstance(config["rule"], dict):
            raise ValueError(f'config.json in {where} has "rule": {config["rule"]!r}, expected a JSON object')
        given = _without_gone(config["rule"], where)
        take({**ADDED_LATER, **given}, fields, where)
        try:
            settings = RuleConfig(**given)
            # Shapes alone, and of no more layers than there are tensors: nothing large is made for a false config.
            few = dataclasses.replace(settings, num_layers=min(settings.num_layers, len(tensors) + 1))
            with torch.device("meta"):
                expected = Rule.from_config(few).state_dict()
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.json in {where} is malformed: {error}; restore it from its source") from error
        weights = f"model.safetensors in {where}"
        check_shapes(tensors, expected, weights, "that is not what its config.json describes; restore both")
        for name, tensor in tensors.items():
            check_float(tensor, f"{name!r} in {weights}")
        rule = Rule.from_config(settings)
        if not isinstance(rule, cls):
            raise ValueError(f"{where} holds a {type(rule).__name__}, not a {cls.__name__}; use Rule.from_pretrained")
        rule.load_state_dict(tensors)
        return rule

    @staticmethod
    def settings_of(config: dict[str, Any]) -> dict[str, Any]:
        """Without what a file may leave out: choices that the first saved rules did not have to make."""
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in config["rule"].items() if (k, v) not in GONE}
        return {**config, "rule": {k: v for k, v in given.items() if ADDED_LATER.get(k, ...) != v}}

    def card(self) -> dict[str, str]:
        config, size = self.config, self.config.per_tensor or self.config.hidden_size
        kind = f"the expression {config.expression!r}" if config.expression else f"an LSTM of size {size}"
        limits = "It is good for runs like those that it was meta-trained on. Elsewhere, compare it with AdamW first."
        known = " It sees the share of the run that is done: the number of steps must be known when a run begins."
        average = f"A Trainer evaluates and saves at its running average, eta {config.average:g}."
        return {
            "title": "A learned optimizer",
            "summary": f"An update rule for `hf_sl2o`: {kind}, {sum(p.numel() for p in self.parameters())} weights, "
            f"inputs {config.inputs}, output scale {config.output_scale}.",
            "usage": "import hf_sl2o\nfrom transformers import TrainingArguments\n\n"
            'args = TrainingArguments("out", optim="sl2o", optim_args="rule=user/name")',
            "limits": limits + known * config.progress,
            "details": average if config.average else "",
        }
