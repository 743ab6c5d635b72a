"""A fine-tune as d numbers: coefficients, and what they belong to.

The shared weights are theta_0 + lift(c), formed in the one order of `subspace.exact`. config.json says by sha256 which
theta_0, and which weights come of it; both are checked before a model is changed.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..foundation.checked import check_float, check_integer, shown
from ..foundation.hub import HubFiles, take
from ..optim import LearnedOptimizer, SubspaceOptimizer
from ..rules import Rule
from ..subspace import Basis
from ..subspace.exact import moved_exactly
from ..subspace.sharded import ShardedBasis
from .starting import Start, digest_of_weights, start_of

logger = logging.getLogger(__name__)

#: Of config.json; a later one is refused.
FORMAT = 1
#: Folders beside config.json.
BASIS, RULE = "basis", "rule"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
# What steps leave of rounding: of a movement, and of weights in the unit of the last place of fp32.
_OF_MOVEMENT, _OF_WEIGHTS = 1e-3, 256 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Origin:
    """What the coefficients of a fine-tune belong to; all of it is in config.json.

    Args:
        start (`str`): The sha256 of theta_0, the weights that the basis covers.
        others (`str`): The sha256 of all that a model saves beside them.
        weights (`str`): The sha256 of theta_0 + lift(c).
        dtype (`str`): Of theta_0.
        basis (`str`): The fingerprint of the basis.
        basis_dtype (`str`): Of its directions as they are stored, which the last digits depend on.
        basis_id (`str`, *optional*): Where on the Hub it is; None: in the folder `basis`.
        basis_revision (`str`, *optional*): Its commit there.
        base_model (`str`, *optional*): Name of the base model, for whom reads it.
        base_revision (`str`, *optional*): Its commit.
        rule (`str`, *optional*): The fingerprint of the rule that trained it.

    Raises:
        `ValueError`: an entry of another type, or an id that is no `user/name`.
    """

    start: str
    others: str
    weights: str
    dtype: str
    basis: str
    basis_dtype: str
    basis_id: str | None = None
    basis_revision: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    rule: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, str) or (value is None and field.default is None)):
                raise ValueError(f"{field.name!r} is {shown(value)}, expected text")
            if field.name in ("start", "others", "weights") and not _SHA256.fullmatch(str(value)):
                raise ValueError(f"{field.name!r} is {shown(value)}, expected 64 hexadecimal digits")
        if self.basis_id is not None and not (_HUB_ID.fullmatch(self.basis_id) and ".." not in self.basis_id):
            raise ValueError(f"'basis_id' is {shown(self.basis_id)}, expected the id of a Hub repository, user/name")

    @property
    def named_base(self) -> str:
        name = "a base model whose name is not known" if self.base_model is None else repr(self.base_model)
        return f"{name} ({self.dtype}{f', revision {self.base_revision}' if self.base_revision else ''})"


class FineTune(HubFiles):
    """d coefficients that, with a basis and a base model, are a fine-tuned model.

    [`save_finetuned`] makes one after a run, [`load_finetuned`] applies one that was saved. `save_pretrained` writes
    the basis beside it, in the folder `basis`, unless `origin.basis_id` says that it is elsewhere, and the rule, if
    there is one, in `rule`.

    Args:
        coefficients (`torch.Tensor` of shape `(d,)`): c, fp32 or fp64.
        origin ([`Origin`]): What they belong to.
        basis ([`Basis`], *optional*): To be saved beside them.
        rule ([`Rule`], *optional*): To be saved beside them.

    Raises:
        `ValueError`: coefficients of another dtype, with NaN or Inf, or of another number than the basis'.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import FineTune, Layout, RandomBasis, SubspaceOptimizer
    >>> def base():
    ...     torch.manual_seed(0)
    ...     return torch.nn.Linear(30, 20)
    >>> model = base()
    >>> basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=4)
    >>> optimizer = SubspaceOptimizer(model, basis, lambda c: torch.optim.SGD(c, lr=0.1))
    >>> model(torch.ones(2, 30)).sum().backward()
    >>> optimizer.step()
    >>> _ = FineTune.settle(optimizer, base()).save_pretrained("shared")
    >>> again = FineTune.from_pretrained("shared").apply(base(), basis)
    >>> torch.equal(again.weight, model.weight)
    True
    ```
    """

    key = "finetuned"

    def __init__(
        self, coefficients: torch.Tensor, origin: Origin, *, basis: Basis | None = None, rule: Rule | None = None
    ) -> None:
        check_float(coefficients, "'coefficients'")
        if coefficients.ndim != 1 or coefficients.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"'coefficients' have shape {tuple(coefficients.shape)} and {coefficients.dtype}, expected (d,) and "
                "fp32 or fp64; restore them from their source"
            )
        if basis is not None and coefficients.shape != (basis.dim,):
            raise ValueError(f"got {len(coefficients)} coefficients for a basis of {basis.dim}; give their own basis")
        self.coefficients, self.origin, self.basis, self.rule = coefficients, origin, basis, rule

    # From a run

    @classmethod
    @torch.no_grad()
    def made(
        cls, optimizer: SubspaceOptimizer, model: nn.Module, start: Start, **elsewhere: str | None
    ) -> tuple[FineTune, list[torch.Tensor]]:
        """Returns the fine-tune that a run is at, and theta_0 + lift(c); changes nothing.

        Args:
            optimizer ([`SubspaceOptimizer`]): Of the run.
            model (`nn.Module`): What it trains.
            start ([`Start`]): Which weights the run began with.
            elsewhere (*optional*): `basis_id` and `basis_revision` of [`Origin`].

        Raises:
            `ValueError`: the model is not theta_0 + lift(c), to rounding: says what else has changed.
            `NotImplementedError`: sharded parameters, or a basis that is not saved.
        """
        if isinstance(optimizer.basis, ShardedBasis):
            raise NotImplementedError(
                "the weights are sharded (FSDP2), and a fine-tune as coefficients is formed of whole ones; share the "
                "weights"
            )
        basis, c = optimizer.basis, optimizer.coefficients.detach().cpu()
        weights = moved_exactly(basis, start.tensors, c)
        _check_rest(start_of(model, basis.layout), start)
        _check_reached(optimizer.param_groups[0]["params"], weights, start.tensors)
        rule = optimizer.inner.rule if isinstance(optimizer.inner, LearnedOptimizer) else None
        origin = Origin(
            start=digest_of_weights(start.tensors),
            others=start.rest,
            weights=digest_of_weights(weights),
            dtype=start.dtypes,
            basis=basis.fingerprint,
            basis_dtype=dtype_name(basis),
            base_model=start.name,
            base_revision=start.revision,
            rule=None if rule is None else rule.fingerprint,
            **elsewhere,
        )
        return cls(c, origin, basis=basis, rule=rule), weights

    @classmethod
    def settle(
        cls, optimizer: SubspaceOptimizer, base: nn.Module | Start, model: nn.Module | None = None, **elsewhere: Any
    ) -> FineTune:
        """As [`FineTune.made`], and sets the trained weights to theta_0 + lift(c): to the bit those that are shared.

        Steps leave them a few units of the last place apart. Call it when training is over: a run that goes on has
        no other point than these weights.

        Args:
            optimizer ([`SubspaceOptimizer`]): Of the run.
            base (`nn.Module` or [`Start`]): The base model as it was before training; it stays as it is.
            model (`nn.Module`, *optional*): What is trained, where the optimizer was not given it.
            elsewhere (*optional*): As in [`FineTune.made`].
        """
        model = optimizer._model() if model is None else model
        if model is None:
            raise ValueError(
                "the optimizer was given parameters, and what else the model has is to be compared with the base "
                "model; give it the model: SubspaceOptimizer(model, basis, ...)"
            )
        optimizer.publish()
        trained = optimizer.param_groups[0]["params"]
        start = base if isinstance(base, Start) else start_of(base, optimizer.basis.layout)
        if {id(tensor) for tensor in start.tensors} & {id(parameter) for parameter in trained}:
            raise ValueError("base_model is the model that was trained; load the base model anew, and give that")
        found, weights = cls.made(optimizer, model, start, **elsewhere)
        with torch.no_grad():
            for parameter, settled in zip(trained, weights, strict=True):
                parameter.copy_(settled)
        optimizer.load_coefficients(found.coefficients, move_weights=False)
        return found

    # To a model

    @torch.no_grad()
    def apply(self, model: nn.Module, basis: Basis) -> nn.Module:
        """Sets a base model's weights to theta_0 + lift(c), in place, after all was checked; returns it.

        Args:
            model (`nn.Module`): The base model, on any device.
            basis ([`Basis`]): The basis of the fine-tune, in any units; the sums are formed where it is.

        Raises:
            `ValueError`: another basis, another base model, or another result than where it was saved.
        """
        basis, origin = self.fitting(basis), self.origin
        start = start_of(model, basis.layout)
        if (found := digest_of_weights(start.tensors)) == origin.weights != origin.start:
            raise ValueError("the model has the weights of this fine-tune already; load the base model anew")
        if found != origin.start or start.rest != origin.others:
            what = "the weights that it moves" if found != origin.start else "what it leaves as it is"
            raise ValueError(
                f"the fine-tune starts from {origin.named_base}, and {what} (sha256 {found[:16]}..., {start.dtypes}) "
                "differ in this model; load that base model in that dtype, and anything random in it, such as an "
                "adapter's first factors, from the file that the run began with"
            )
        weights = moved_exactly(basis, start.tensors, self.coefficients)
        if digest_of_weights(weights) != origin.weights:
            raise ValueError(
                f"base model and coefficients are those of the fine-tune, and its {basis.kind} basis gives other "
                "weights here than where it was saved: its directions were changed, or (of a random basis) this torch "
                "draws other numbers; restore the basis, or ask for a dense one (to_dense())"
            )
        for parameter, settled in zip(start.tensors, weights, strict=True):
            parameter.copy_(settled)
        return model

    def fitting(self, basis: Basis) -> Basis:
        """Returns `basis` in the units of the coefficients; raises `ValueError` where it is another one."""
        made = in_units_of(self.origin.basis, self.origin.basis_dtype, basis)
        if made.dim != len(self.coefficients):
            raise ValueError(
                f"the fine-tune has {len(self.coefficients)} coefficients and its basis {made.dim} directions; "
                "restore its model.safetensors"
            )
        return made

    # Files

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {self.key: FORMAT, "origin": asdict(self.origin)}, {"coefficients": self.coefficients}

    @classmethod
    def from_files(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> FineTune:
        format_here = config.get(cls.key)
        check_integer(f"{cls.key!r} in config.json in {where}", format_here, 1)
        if format_here != FORMAT:
            raise ValueError(
                f"the fine-tune in {where} has format {format_here}, this hf_sl2o reads {FORMAT}; upgrade it"
            )
        said = take(config, {cls.key, "origin"}, where)["origin"]
        if not isinstance(said, dict):
            raise ValueError(f'config.json in {where} has "origin": {shown(said)}, expected an object; restore it')
        take(said, {field.name for field in fields(Origin)}, where)
        if set(tensors) != {"coefficients"}:
            raise ValueError(
                f"model.safetensors in {where} holds {sorted(tensors)[:3]}, expected 'coefficients' alone; restore it"
            )
        try:
            return cls(tensors["coefficients"], Origin(**said))
        except ValueError as error:
            raise ValueError(f"the fine-tune in {where} is malformed: {error}") from error

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:  # type: ignore[override]
        """As [`HubFiles.save_pretrained`], with the basis and the rule in their folders first.

        Raises:
            `ValueError`: the basis belongs beside the coefficients, and is not known.
        """
        folder = Path(save_directory)
        self._texts(folder, model_card_kwargs=options.get("model_card_kwargs"))
        self.save_beside(folder)
        return super().save_pretrained(save_directory, **options)

    def save_beside(self, folder: Path) -> None:
        """Writes the basis and the rule to their folders in `folder`."""
        if self.origin.basis_id is None:
            if self.basis is None:
                raise ValueError(
                    "the basis of this fine-tune lies beside it, where it was loaded from; set `basis` before it is "
                    "saved"
                )
            self.basis.save_pretrained(folder / BASIS)
        if self.rule is not None:
            self.rule.save_pretrained(folder / RULE)

    def card(self) -> dict[str, str]:
        origin = self.origin
        basis = "in the folder `basis`" if origin.basis_id is None else f"at `{origin.basis_id}`"
        basis += f", commit {origin.basis_revision}" if origin.basis_revision else ""
        card = {
            "title": f"A fine-tune in {len(self.coefficients)} numbers",
            "summary": f"Coefficients of a basis, which is {basis}. With that and {origin.named_base} they are "
            "ordinary weights.",
            "usage": "from hf_sl2o import load_finetuned\n\n"
            'model = load_finetuned(base_model, "user/name")  # changes base_model',
            "limits": "They fit these starting weights and this basis, and no others; both, and the weights that come "
            "of them, are checked by sha256 when they are loaded.",
        }
        # a commit is known of what came from the Hub, where the name leads to it
        return card if origin.base_revision is None else {**card, "base_model": str(origin.base_model)}


def in_units_of(fingerprint: str, dtype: str, basis: Basis) -> Basis:
    """Returns `basis` in the units that a fingerprint says; raises `ValueError` where it is another one."""
    found = dtype_name(basis)
    for same in (basis, basis.with_units("std"), basis.with_units("orthonormal")):
        if same.fingerprint == fingerprint and found == dtype:
            return same
    raise ValueError(
        f"the fine-tune is one in the basis {fingerprint} (stored in {dtype}), and this one is {basis.fingerprint} "
        f"({found}); give the basis of that run"
    )


def dtype_name(basis: Basis) -> str:
    """Of its directions as they are stored, such as `"float32"`."""
    return str(basis.dtype).removeprefix("torch.")


def _check_rest(trained: Start, start: Start) -> None:
    """Raises `ValueError` where training has changed what is outside the basis."""
    pairs = zip(sorted(trained.others.items()), sorted(start.others.items()), strict=False)
    changed = next((name for (name, now), (_, before) in pairs if now != before), None)
    if changed is not None or len(trained.others) != len(start.others):
        raise ValueError(
            f"{changed or 'the number of tensors'} outside the basis is not as in the base model: it was trained too "
            "(outside=), is a running statistic, or the base model is another one. Coefficients do not say it; share "
            "the weights"
        )


def _check_reached(trained: list[torch.Tensor], weights: list[torch.Tensor], start: list[torch.Tensor]) -> None:
    """Raises `ValueError` unless the trained weights are theta_0 + lift(c), but for what steps leave of rounding."""
    away, way, size, most, eps = 0.0, 0.0, 0.0, 0.0, 0.0
    for now, exact, before in zip(trained, weights, start, strict=True):
        if now.dtype != exact.dtype:
            raise ValueError(
                f"the run has weights in {now.dtype}, the base model in {exact.dtype}; load the base model in the "
                "dtype that was trained"
            )
        reached, first = exact.detach().double().cpu(), before.detach().double().cpu()
        difference = now.detach().double().cpu() - reached
        away, way = away + float(difference.square().sum()), way + float((reached - first).square().sum())
        size, most = size + float(first.square().sum()), max(most, float(difference.abs().max()))
        eps = max(eps, torch.finfo(now.dtype).eps if now.dtype in (torch.bfloat16, torch.float16) else 0.0)
    if not away**0.5 <= _OF_MOVEMENT * way**0.5 + (eps + _OF_WEIGHTS) * size**0.5:
        raise ValueError(
            f"the weights are {away**0.5:.2g} away from base model + lift(coefficients), of a movement of "
            f"{way**0.5:.2g}: they were also changed outside the subspace, or the run began at other weights; give "
            "the base model that it began with, or share the weights"
        )
    logger.info("theta_0 + lift(c) is at most %.2g from the weights that training left", most)
