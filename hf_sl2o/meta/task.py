"""What meta-training needs of a task: a model at its starting weights, batches, a loss, a basis."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..optim import average_weight
from ..subspace import Basis, IdentityBasis


@dataclass(frozen=True)
class Task:
    """One training problem on which a rule is meta-trained or judged.

    Args:
        name (`str`): Appears in logs and errors.
        build_model (`Callable[[], nn.Module]`): Returns the model at theta_0, the same weights at each call.
        batches (`Callable[[int], Iterable]`): Maps a seed to training batches, at least as many as steps are made.
        loss (`Callable[[nn.Module, Any], torch.Tensor]`): Mean loss of a batch, 0-d.
        basis ([`Basis`]): The subspace; [`IdentityBasis`] for raw tensors such as LoRA factors.
        eval_batches (`Sequence`, *optional*): Held-out batches; they choose the best rule.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, Task
    >>> def build():
    ...     torch.manual_seed(0)
    ...     return torch.nn.Linear(30, 20)
    >>> basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), dim=4)
    >>> data = [torch.ones(2, 30)] * 10
    >>> task = Task("regression", build, lambda seed: data, lambda model, x: model(x).square().mean(), basis, data[:1])
    ```
    """

    name: str
    build_model: Callable[[], nn.Module]
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    basis: Basis
    eval_batches: Sequence[Any] = field(default=())


class InnerRun:
    """One run of a task's model: hands out (loss, projected gradient) and moves the weights along the basis.

    It has random numbers of its own (dropout, augmentation), so that what runs beside it does not change it.

    Args:
        task ([`Task`]): What is run.
        seed (`int`): Of the batches and of dropout.
        device (`torch.device`, *optional*): Where the model and the batches go; by default they stay where they are.
        autocast (`torch.dtype`, *optional*): Precision of the network's forward pass, such as `torch.bfloat16`.
        scales (`torch.Tensor` of shape `(d,)`, *optional*): Runs in coordinates c' with c = scales * c'.
        gain (`float`, *optional*, defaults to 1.0): As for [`~hf_sl2o.rules.rule.Rule.init_state`].

    Raises:
        `ValueError`: the basis does not fit the model (task named).
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        device: torch.device | None = None,
        autocast: torch.dtype | None = None,
        scales: torch.Tensor | None = None,
        gain: float = 1.0,
    ) -> None:
        self.task, self.drawn, self.gain = task, 0, gain
        self._autocast = autocast
        outside = _rng_state()
        self.model = task.build_model() if device is None else task.build_model().to(device)
        self.model.train()  # as `from_pretrained` does not leave it
        self._rng = {}
        for offset, of in enumerate(("batches", "network")):
            torch.manual_seed(seed + offset)
            self._rng[of] = _rng_state()
        _set_rng_state(outside)
        try:
            self.parameters, _ = task.basis.layout.select(self.model.named_parameters())
        except ValueError as error:
            raise ValueError(f"task {task.name!r}: {error}") from error
        self.basis = task.basis.to(device=self.device)
        self._send = device is not None
        self._scales = None if scales is None else scales.to(self.device, self.basis.compute_dtype)
        with self.own_randomness("batches"):
            self._batches = iter(task.batches(seed))

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @contextmanager
    def own_randomness(self, of: str = "network") -> Iterator[None]:
        """Draws from this run's random numbers inside the block."""
        outside = _rng_state()
        _set_rng_state(self._rng[of])
        try:
            yield
        finally:
            self._rng[of] = _rng_state()
            _set_rng_state(outside)

    @contextmanager
    def _naming_the_task(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"task {self.task.name!r} failed at batch {self.drawn}: {type(error).__name__}: {error}"
            ) from error

    def next_batch(self) -> Any:
        """Returns the next training batch, on the model's device.

        Raises:
            `ValueError`: the batches ran out.
            `RuntimeError`: the task's own code raised (task and batch named); so do the methods below.
        """
        with self.own_randomness("batches"), self._naming_the_task():
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError(f"task {self.task.name!r} ran out of batches; yield at least inner_steps of them")
        self.drawn += 1
        return send_to_device(batch, self.device) if self._send else batch

    def loss(self, batch: Any) -> torch.Tensor:
        """Returns the mean loss of a batch, 0-d, with its graph."""
        autocast = torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)
        with self._naming_the_task(), autocast:
            return self.task.loss(self.model, batch)

    def gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of the next batch and g of shape `(d,)`, both without a graph."""
        with self.own_randomness():
            loss = self.loss(self.next_batch())
            self.model.zero_grad(set_to_none=True)
            with self._naming_the_task():
                loss.backward()
        return loss.detach(), self.scaled(self.basis.project([p.grad for p in self.parameters]))

    def weights(self) -> list[torch.Tensor] | None:
        """The tensors whose scalars are the coordinates, in this run's scales; None in a subspace."""
        if not isinstance(self.basis, IdentityBasis):
            return None
        flat = torch.cat([p.detach().reshape(-1).to(self.basis.compute_dtype) for p in self.parameters])  # (d,)
        flat = flat if self._scales is None else flat / self._scales
        parts = zip(flat.split(self.basis.tensor_sizes), self.basis.tensor_shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def scaled(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns `scales * vector`: a movement in the basis' coordinates, or a gradient in this run's."""
        return vector if self._scales is None else vector * self._scales

    @torch.no_grad()
    def move(self, delta: torch.Tensor) -> None:
        """theta = theta + lift(delta)."""
        self.basis.add_(self.parameters, self.scaled(delta))

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """Returns the mean loss over the held-out batches, 0-d, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        batches = self.task.eval_batches
        kept = self._rng["network"]
        with self.own_randomness():
            losses = [self.loss(send_to_device(b, self.device) if self._send else b).float() for b in batches]
        self._rng["network"] = kept  # a look does not change what follows
        self.model.train(training)
        return torch.stack(losses).mean()

    # Where the run stands, as tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns weights, buffers, random state and the number of batches drawn."""
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        tensors |= {f"rng.{i}": state for i, state in enumerate(self._rng["network"])}
        return {**tensors, "drawn": torch.tensor(self.drawn)}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes to where `state_dict` was taken; of the batches in between the generator is run, not the model."""
        for i, p in enumerate(self.parameters):
            p.copy_(tensors[f"parameter.{i}"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        while self.drawn < int(tensors["drawn"]):
            self.next_batch()
        self._rng["network"] = [tensors[f"rng.{i}"].cpu() for i in range(len(self._rng["network"]))]


def _rng_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_rng_state(states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def train_on(
    task: Task,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    steps: int,
    *,
    seed: int = 0,
    schedule: str = "constant",
    evaluate_at: Collection[int] = (),
    metric: Callable[[nn.Module], float] | None = None,
    average: float = 0.0,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Trains a task's model by moving its coefficients with any torch optimizer, a learned one or a baseline.

    Args:
        task ([`Task`]): What is trained.
        optimizer (`Callable`): Makes the optimizer of a list, such as `lambda c: LearnedOptimizer(c, rule)`: the
            coefficients as one tensor of zeros, or with an identity basis one for each parameter, with its values. An
            optimizer with `train` and `eval`, such as a schedule-free one, is evaluated where `eval` puts it.
        steps (`int`): Optimizer steps.
        seed (`int`, *optional*, defaults to 0): Of the batches and of dropout.
        schedule (`str`, *optional*, defaults to `"constant"`): `"constant"` or `"linear"` (to zero at the last step).
        evaluate_at (`Collection[int]`, *optional*): Steps after which the held-out loss is taken; 0: before training.
        metric (`Callable`, *optional*): Also taken there, such as an accuracy.
        average (`float`, *optional*, defaults to 0.0): eta of the running average at which the loss is taken; 0: none.
        device, autocast (*optional*): As for [`InnerRun`].

    Raises:
        `ValueError`: no steps, an unknown schedule, or nothing to evaluate on.

    Returns:
        `train_loss` (a list of `steps` floats), `eval` (a list of `[step, loss]`, or `[step, loss, metric]`), and
        `seconds` without evaluation.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, Task, train_on
    >>> def build():
    ...     torch.manual_seed(0)
    ...     return torch.nn.Linear(30, 20)
    >>> basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), dim=4)
    >>> data = [torch.ones(2, 30)] * 10
    >>> task = Task("regression", build, lambda seed: data, lambda model, x: model(x).square().mean(), basis, data[:1])
    >>> result = train_on(task, lambda c: torch.optim.SGD(c, lr=1.0), steps=10, evaluate_at=(0, 10))
    >>> result["eval"][1][1] < result["eval"][0][1]
    True
    ```
    """
    _check_steps(task, steps, evaluate_at)
    run = InnerRun(task, seed, device=device, autocast=autocast)
    c, parts = _coefficients(run)
    inner = optimizer(list(parts))
    _go_to(inner, "train")
    base = [float(group["lr"]) for group in inner.param_groups]
    losses, evals, spent, mean = [], [], 0.0, c.clone()

    def take(step: int) -> None:
        if step in evaluate_at:
            evals.append([step, *_evaluated(run, mean - c if average else _away(inner, c), metric)])

    take(0)
    for step in range(steps):
        start = time.perf_counter()
        for group, lr in zip(inner.param_groups, base, strict=True):
            group["lr"] = lr * schedule_factor(schedule, step, steps)
        loss, g = run.gradient()
        for part, gradient in zip(parts, g.split(run.basis.tensor_sizes), strict=True):
            part.grad = gradient.view_as(part)
        before = c.clone()
        inner.step()
        run.move(c - before)
        if average:
            mean.lerp_(c, float(average_weight(step + 1, average)))
        losses.append(loss)
        spent += time.perf_counter() - start
        take(step + 1)
    return {"train_loss": torch.stack(losses).tolist(), "eval": evals, "seconds": spent}


def _check_steps(task: Task, steps: int, evaluate_at: Collection[int]) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if evaluate_at and not len(task.eval_batches):
        raise ValueError(f"task {task.name!r} has no eval_batches to evaluate on; give some, or evaluate_at=()")


def _coefficients(run: InnerRun) -> tuple[torch.Tensor, list[nn.Parameter]]:
    """Zeros of shape `(d,)`, or the weights where they are the coordinates; and views of it, for an optimizer."""
    weights = run.weights()
    if weights is None:
        c = torch.zeros(run.basis.dim, device=run.device, dtype=run.basis.compute_dtype)
    else:
        c = torch.cat([weight.reshape(-1) for weight in weights])
    pieces = zip(c.split(run.basis.tensor_sizes), run.basis.tensor_shapes, strict=True)
    return c, [nn.Parameter(piece.view(shape)) for piece, shape in pieces]


def _go_to(inner: torch.optim.Optimizer, point: str) -> bool:
    """Calls `train` or `eval` of an optimizer that has a point for each."""
    if not hasattr(inner, "train") or not hasattr(inner, "eval"):
        return False
    getattr(inner, point)()
    return True


@torch.no_grad()
def _away(inner: torch.optim.Optimizer, c: torch.Tensor) -> torch.Tensor | None:
    """How far from where it trains, `c`, an optimizer wants to be evaluated; it stays where it trains."""
    before = c.clone()
    if not _go_to(inner, "eval"):
        return None
    away = c - before
    _go_to(inner, "train")
    c.copy_(before)  # to the bit: a look changes nothing
    return away


def _evaluated(run: InnerRun, away: torch.Tensor | None, metric: Callable[[nn.Module], float] | None) -> list[float]:
    """The held-out loss, and the metric, `away` from where the run is."""
    if away is not None:
        run.move(away)
    values = [float(run.evaluate()), *([] if metric is None else [metric(run.model)])]
    if away is not None:
        run.move(-away)
    return values


def schedule_factor(schedule: str, step: int, steps: int) -> float:
    """Returns what the learning rate is multiplied by at `step` (from 0) of `steps`, as transformers' schedules do."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return (steps - step) / steps
    raise ValueError(f'the schedule is {schedule!r}, expected "constant" or "linear"')
