"""`SL2OTrainer`: a Trainer that takes bases and rules as objects, and can make its own basis first."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, TrainOutput, set_seed
from transformers.training_args import OptimizerNames

from ..foundation.files import load_tensors, open_tensors, save_json, save_tensors
from ..foundation.hub import CONFIG, WEIGHTS, HubFiles
from ..foundation.ranks import basis_facts, check_same_on_all_ranks, rule_facts
from ..optim import LearnedOptimizer, SubspaceOptimizer
from ..rules import Rule, load_rule
from ..subspace import Basis, Trajectory, fit_basis
from ..subspace.sharded import ShardedBasis
from ..subspace.shards import is_sharded
from .arguments import SL2OTrainingArguments, check_optim_args
from .build import refuse_useless
from .callbacks import SubspaceLogCallback, TrajectoryCallback, unwrap_optimizer
from .facts import patience, training_facts
from .finetuned import BASIS, RULE, FineTune
from .resume import has_optimizer_state, last_complete_checkpoint, steps_done
from .sharing import SHARED, WEIGHTS_ALONE, commit_of
from .starting import KeptStart
from .step_size import OPTIMIZERS, OwnStepSize

logger = logging.getLogger(__name__)

COEFFICIENTS = "coefficients.safetensors"


class SL2OTrainer(Trainer):
    """Hugging Face's Trainer with a learned optimizer, or any torch optimizer, in a subspace.

    Beyond `TrainingArguments(optim="sl2o")` with a plain Trainer it takes `basis` and `rule` as objects, logs what
    happens in the subspace ([`SubspaceLogCallback`]), reports the norm of the *projected* gradient as `grad_norm`, and
    writes `coefficients.safetensors` (d numbers) beside each saved model. What it pushes to the Hub has basis, rule
    and coefficients besides, in the folder `sl2o`, which [`load_finetuned`] reads. With `sl2o_warmup_steps=k` one call
    of `train` trains k steps with AdamW while recording, fits a basis, and goes on in it.

    Args:
        model, args, ...: As `Trainer`; `args` defaults to [`SL2OTrainingArguments`].
        basis ([`Basis`], *optional*): Instead of `args.sl2o_basis`.
        rule ([`Rule`], *optional*): Instead of `args.sl2o_rule`.

    Raises:
        `ValueError`: a basis or rule twice, or with an `optim` that has no use for it.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, SL2OTrainer, SL2OTrainingArguments
    >>> class Net(torch.nn.Linear):
    ...     def forward(self, x, labels):
    ...         return {"loss": (super().forward(x) - labels).square().mean()}
    >>> model, data = Net(8, 4), [{"x": torch.ones(8), "labels": torch.zeros(4)}] * 8
    >>> basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=5)
    >>> args = SL2OTrainingArguments("out", max_steps=3, report_to="none", use_cpu=True)
    >>> trainer = SL2OTrainer(model, args, basis=basis, train_dataset=data)
    >>> output = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...
    >>> output.global_step
    3
    ```
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        basis: Basis | None = None,
        rule: Rule | None = None,
        **kwargs: Any,
    ) -> None:
        args = SL2OTrainingArguments("tmp_trainer") if args is None else args
        given: dict[str, Any] = {"basis": basis, "rule": rule}
        optim = str(getattr(args.optim, "value", args.optim))
        for what, value in given.items():
            useful = sorted(OPTIMIZERS) if what == "basis" else ["sl2o"]
            if value is not None and optim not in useful:
                raise ValueError(f'{what} was given with optim="{optim}"; expected one of {useful}')
            if value is None and getattr(args, f"sl2o_{what}", None) and optim not in OPTIMIZERS:
                logger.warning('optim="%s" does not use sl2o_%s', optim, what)
            if value is not None and getattr(args, f"sl2o_{what}", None) is not None:
                raise ValueError(f"{what} was given both as an object and as args.sl2o_{what}; leave one out")
        warming = isinstance(args, SL2OTrainingArguments) and args.sl2o_warmup_steps > 0
        if basis is not None and warming:
            raise ValueError("sl2o_warmup_steps fits a basis, and one was given; leave one out")
        if kwargs.get("model_init") is not None and warming:
            raise ValueError("sl2o_warmup_steps needs a model; model_init would make a new one after the warm-up")
        self.basis = basis
        self.rule = rule
        self._start: KeptStart | None = None  # the weights that a run which is pushed began with
        self._basis_id: str | None = None  # the Hub id that the basis was given by
        self._basis_commit: str | None = None  # the one that it was loaded from
        self._shared: Any = None  # the optimizer whose basis and rule were written for the Hub
        super().__init__(model, args, **kwargs)
        SubspaceLogCallback.attach(self)

    # The optimizer

    def get_optimizer_cls_and_kwargs(  # type: ignore[override]
        self, args: TrainingArguments, model: Any = None
    ) -> tuple[Any, Any]:
        if args.optim in OPTIMIZERS:
            check_optim_args(args.optim_args)
        factory, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim not in OPTIMIZERS:  # the warm-up, or a full-space run
            if isinstance(args.learning_rate, OwnStepSize):  # of one of ours, which was replaced since
                options["lr"] = TrainingArguments.learning_rate
            return factory, options
        given = options.get("basis") if self.basis is None else None
        self._basis_id = given if isinstance(given, str) and not Path(given).is_dir() else None
        if self.rule is not None:
            options["rule"] = self.rule
        if self.basis is not None:
            options.update(basis=self.basis, max_grad_norm=args.max_grad_norm)
        return factory, options

    @property
    def subspace_optimizer(self) -> SubspaceOptimizer | None:
        """The optimizer behind Accelerate's wrapper if it moves the coefficients of a basis."""
        optimizer = unwrap_optimizer(self.optimizer)
        return optimizer if isinstance(optimizer, SubspaceOptimizer) else None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        optimizer = self.subspace_optimizer
        if optimizer is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return optimizer.grad_norm  # the step that follows writes into it, before it is logged

    # Files

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        optimizer = self.subspace_optimizer
        if optimizer is not None and self.args.should_save:
            _save_coefficients(Path(output_dir or self.args.output_dir or "."), optimizer)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        optimizer, best = self.subspace_optimizer, self.state.best_model_checkpoint
        if optimizer is None or best is None:
            return
        # Sharded: all processes have to measure, or none, whichever of them sees the file.
        sharded = self.model is not None and is_sharded(self.model.parameters())
        if sharded or not self._load_coefficients(optimizer, Path(best)):
            optimizer.measure()  # from the weights that were loaded

    def _load_coefficients(self, optimizer: SubspaceOptimizer, checkpoint: Path) -> bool:
        """Takes the coefficients that were saved with the weights which the model has now; False: there are none."""
        path = checkpoint / COEFFICIENTS
        if not path.is_file():
            return False
        with open_tensors(path) as file:
            basis = (file.metadata() or {}).get("basis")
        if basis != optimizer.basis.fingerprint:
            raise ValueError(
                f"{path} holds coefficients of another basis ({basis}, this one is {optimizer.basis.fingerprint}); "
                "resume with the basis of that run, or start a new run from the checkpoint's weights"
            )
        coefficients = load_tensors(path).get("coefficients")
        if coefficients is None or tuple(coefficients.shape) != (optimizer.basis.dim,):
            raise ValueError(
                f"{path} holds no 'coefficients' of shape ({optimizer.basis.dim},); restore it, or delete it"
            )
        optimizer.load_coefficients(coefficients, move_weights=False)
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            if isinstance(unwrap_optimizer(self.optimizer), SubspaceOptimizer | LearnedOptimizer):
                raise
            raise ValueError(
                f"the optimizer state in {checkpoint} is not one of optim={str(self.args.optim)!r} ({error}); resume "
                "with the optim of that run, or start a new run from the checkpoint's weights (from_pretrained)"
            ) from error
        optimizer = self.subspace_optimizer
        if checkpoint is None or optimizer is None or has_optimizer_state(checkpoint):
            return
        known = self._load_coefficients(optimizer, Path(checkpoint))
        logger.warning(
            "%s has no optimizer state (save_only_model): the rule or optimizer begins anew, %s",
            checkpoint,
            "at the coefficients that were saved" if known else "and coefficients count from the checkpoint's weights",
        )

    # The Hub

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`, with basis, rule and coefficients in the folder `sl2o`.

        After training the weights are set to theta_0 + lift(c): to the bit those that [`load_finetuned`] gives.
        """
        self._share(final=not self.is_in_train)
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, last = self.args, getattr(self, "push_in_progress", None)
        free = args.hub_always_push or last is None or last.is_done()  # as Trainer asks before it copies weights
        if self.is_world_process_zero() and args.hub_strategy != HubStrategy.END and free:
            self._share(final=False)
        super()._push_from_checkpoint(checkpoint_folder)

    def _share(self, *, final: bool) -> None:
        """Writes basis, rule and coefficients to the folder that is pushed."""
        optimizer, folder = unwrap_optimizer(self.optimizer), Path(self.args.output_dir or ".")
        made = self._fine_tune(optimizer, final=final) if isinstance(optimizer, SubspaceOptimizer) else None
        ours = isinstance(optimizer, SubspaceOptimizer | LearnedOptimizer)
        if not self.args.should_save or not (ours or (folder / SHARED / CONFIG).is_file()):
            return
        if made is None:  # a fine-tune of an earlier push, which the Hub keeps, is not of these weights
            (folder / SHARED / WEIGHTS).unlink(missing_ok=True)
            save_json(folder / SHARED / CONFIG, {WEIGHTS_ALONE: True})
        if not ours:
            return
        if self._shared is not optimizer:
            if made is not None:
                made.save_beside(folder / SHARED)
            else:
                self._save_parts(optimizer, folder / SHARED)
            self._shared = optimizer
        if made is not None:
            HubFiles.save_pretrained(made, folder / SHARED)  # not the basis at each save, which may be gigabytes
        if isinstance(optimizer, SubspaceOptimizer):
            _save_coefficients(folder, optimizer)

    def _fine_tune(self, optimizer: SubspaceOptimizer, *, final: bool) -> FineTune | None:
        """The fine-tune that the run is at; None, with a warning, where coefficients do not say all of it."""
        elsewhere: dict[str, Any] = {}
        try:
            if self._basis_id is not None:
                elsewhere = {"basis_id": self._basis_id, "basis_revision": self._basis_commit}
            if self._start is None:
                raise ValueError(
                    "the weights that the run began with were not kept; set push_to_hub=True before it trains (after "
                    "sl2o_warmup_steps they are in no base model), or call save_finetuned with the base model"
                )
            start, model = self._start.start(optimizer.basis.layout), self.model
            assert model is not None
            if final:
                return FineTune.settle(optimizer, start, model, **elsewhere)
            return FineTune.made(optimizer, model, start, **elsewhere)[0]
        except (ValueError, NotImplementedError, FileNotFoundError) as error:
            logger.warning("weights are pushed, and no fine-tune for load_finetuned: %s", error)
            return None

    def _save_parts(self, optimizer: SubspaceOptimizer | LearnedOptimizer, folder: Path) -> None:
        """Basis and rule of a run that is no fine-tune in coefficients."""
        inner: Any = optimizer
        if isinstance(optimizer, SubspaceOptimizer):
            inner = optimizer.inner
            whole = self.basis if isinstance(optimizer.basis, ShardedBasis) else optimizer.basis
            if whole is not None and self._basis_id is None:
                whole.save_pretrained(folder / BASIS)
        if isinstance(inner, LearnedOptimizer):
            inner.rule.save_pretrained(folder / RULE)

    def _keep_start(self) -> None:
        """Copies the weights of a run that is pushed, before they move; d numbers are nothing without them."""
        warmed = getattr(self.args, "sl2o_warmup_steps", 0)
        if self._start is None and self.args.push_to_hub and not warmed and self.model is not None:
            if not is_sharded(self.model.parameters()):
                self._start = KeptStart(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        known = self.optimizer
        made = super().create_optimizer(*args, **kwargs)
        if self.subspace_optimizer is not None:
            self._keep_start()
            if self._basis_id is not None and self.args.push_to_hub and self.optimizer is not known:
                # now: the cache may hold a later one when the run is pushed
                self._basis_commit = commit_of(self._basis_id, local_files_only=True)
        return made

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if (
            self.basis is not None
            or getattr(self.args, "sl2o_basis", None)
            or "basis=" in (self.args.optim_args or "")
        ):
            self._keep_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # Training

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to the end.

        Raises:
            `ValueError`: there is none (unless a warm-up has to be done or continued first).
        """
        facts = {**training_facts(self.args), "resumed": bool(resume_from_checkpoint)}
        facts |= {} if self.basis is None else {"basis": basis_facts(self.basis)}
        facts |= {} if self.rule is None else {"rule": rule_facts(self.rule)}
        check_same_on_all_ranks(facts, "training", patience(self.args))
        if self.optimizer is None or self.model_init is not None:
            self._start = None  # else the run goes on from the start that it has
        warming = int(getattr(self.args, "sl2o_warmup_steps", 0))
        resume = resume_from_checkpoint
        if resume is True:
            resume = last_complete_checkpoint(self.args.output_dir or ".")
            if resume is None and not warming:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint; leave it "
                    "out to start from the beginning"
                )
        if warming and self.basis is None:
            self.basis = self._warm_up(resuming=bool(resume_from_checkpoint), trained=bool(resume))
        return super().train(resume_from_checkpoint=resume or None, **kwargs)

    def _warm_up(self, *, resuming: bool, trained: bool) -> Basis:
        """Trains with AdamW while recording, and fits the basis; `trained`: the run in the subspace has begun."""
        args = self.args
        assert isinstance(args, SL2OTrainingArguments)
        if self.is_fsdp_enabled:
            raise NotImplementedError(
                "sl2o_warmup_steps trains twice in one run, which Accelerate's FSDP does not do; record a run with "
                "TrajectoryCallback, fit_basis to it, and pass sl2o_basis to the next run"
            )
        folder = _warmup_folder(args, resuming=resuming)
        _, options = self.get_optimizer_cls_and_kwargs(args, self.model)  # what is wrong with them is said before
        refuse_useless(**{**options, "with_basis": True})
        if options["optim"] == "sl2o":
            load_rule(options.get("rule"), with_basis=True)
        if not trained:
            recorder = TrajectoryCallback(
                folder / "trajectory",
                every_steps=max(1, args.sl2o_warmup_steps // (args.sl2o_snapshots - 1)),
                overwrite=True,
            )
            logger.info("warm-up: %d steps with AdamW, recorded in %s", args.sl2o_warmup_steps, folder)
            self.args = _warmup_arguments(args, folder)
            callbacks = self.callback_handler.callbacks
            # nothing is evaluated in the warm-up, which a callback that stops early refuses
            staying = [one for one in callbacks if not isinstance(one, EarlyStoppingCallback)]
            self.callback_handler.callbacks = [*staying, recorder]
            checkpoint = last_complete_checkpoint(folder) if resuming else None
            try:
                if checkpoint is not None and steps_done(checkpoint) >= args.sl2o_warmup_steps:
                    self._load_from_checkpoint(checkpoint)  # resuming a finished run would add a step to it
                else:
                    super().train(resume_from_checkpoint=checkpoint)
            finally:
                self.args = args
                self.callback_handler.callbacks = callbacks
                self.optimizer = self.lr_scheduler = None
                self.model_wrapped = self.model  # type: ignore[assignment]
            if args.should_save:
                fitted = fit_basis(Trajectory(folder / "trajectory"), args.sl2o_dim, progress=not args.disable_tqdm)
                fitted.save_pretrained(Path(args.output_dir or ".") / "basis")
            self.accelerator.wait_for_everyone()
            set_seed(args.seed)
        basis = Basis.from_pretrained(Path(args.output_dir or ".") / "basis")
        return basis.with_units(args.sl2o_units) if args.sl2o_units else basis


def _save_coefficients(folder: Path, optimizer: SubspaceOptimizer) -> None:
    tensors = {"coefficients": optimizer.coefficients}
    save_tensors(folder / COEFFICIENTS, tensors, basis=optimizer.basis.fingerprint)


def _warmup_folder(args: SL2OTrainingArguments, *, resuming: bool) -> Path:
    """Where the warm-up is recorded; a Trainer pushes nothing whose name begins with an underscore."""
    output = Path(args.output_dir or ".")
    names = ("_warmup", "warmup") if args.push_to_hub else ("warmup", "_warmup")
    there = [output / name for name in names if resuming and (output / name).is_dir()]
    return there[0] if there else output / names[0]


def _warmup_arguments(args: SL2OTrainingArguments, folder: Path) -> SL2OTrainingArguments:
    warm = copy.copy(args)
    warm.output_dir, warm.optim, warm.optim_args = str(folder), OptimizerNames.ADAMW_TORCH, None
    warm.max_steps, warm.learning_rate = args.sl2o_warmup_steps, args.sl2o_warmup_learning_rate
    warm.lr_scheduler_type, warm.lr_scheduler_kwargs = "constant", {}
    warm.save_strategy, warm.save_steps = SaveStrategy.STEPS, max(1, args.sl2o_warmup_steps // 5)
    warm.save_total_limit, warm.load_best_model_at_end, warm.push_to_hub = 1, False, False
    warm.eval_strategy = IntervalStrategy.NO
    warm.sl2o_warmup_steps = 0
    return warm
