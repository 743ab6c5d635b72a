"""Every arm on one subject, from an ordinary run to the table: sample, extract, meta, train, compare."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..foundation.files import checksum_of, save_json
from ..foundation.hub import WEIGHTS
from ..rules import Rule, SymbolicRule
from ..subspace import Basis, IdentityBasis, Layout, RandomBasis, Trajectory, fit_basis
from .arguments import redundant_arms, training_settings
from .arms import Arm, grid, rule_folder
from .environment import environment, portable
from .figures import plot
from .kept.files import copy_checkpoints, say
from .kept.keys import stamp
from .kept.run import Recorder, lost_snapshots
from .kept.stage import stage
from .levels import amortised, paid_once, to_accuracies, to_losses
from .meta_stage import copy_rule, meta_train
from .subject import Subject
from .table import table
from .tuning import choices, final_loss, over_seeds, search, summary


class Comparison(Subject):
    """Runs every arm on one subject, tuned on validation, and writes JSON, figure and table.

    sample: the full space is trained while snapshots are written, the best run on validation is kept;  extract: PCA
    gives d directions;  meta: a rule is trained in them, unless one is given;  train: every arm, its learning rate
    tuned on validation, over several seeds;  compare: comparison.json, comparison.png and a table. Each stage is
    skipped when its result with the same settings is there, and goes on where a kill left it.

    Args:
        model (`nn.Module`): At its starting weights; each run begins at a copy. What requires gradients is trained.
        args ([`SL2OTrainingArguments`]): Of the runs in the subspace, from [`training_arguments`]; `output_dir` keeps
            everything. Runs of all weights have their length from the settings, and gradients clipped at 1.0.
        settings ([`ComparisonArguments`], *optional*): Length of the recorded run, d, seeds, the rule.
        train_dataset, eval_dataset: Rows that can be counted and indexed. The second one chooses learning rates, the
            recorded run and the rule, so final numbers need a third.
        loss (`Callable`, *optional*): Mean loss of `(model, batch)`, 0-d; by default the model's own, `.loss`.
        data_collator, processing_class, compute_metrics, callbacks (*optional*): As for a Trainer. Callbacks are
            shared by all runs: one that counts begins anew in `on_train_begin`.
        arms (`Mapping[str, Arm]`, *optional*): By default [`~hf_sl2o.experiments.arms.ARMS`].
        identity (`Sequence`, *optional*): JSON values that tell data and functions from others, for what is kept; by
            default hashes of the first 1,000 rows and their number, and of the source code of loss, collator and
            metrics with what they enclose. What these read from elsewhere is not seen.

    Raises:
        `ValueError`: settings that do not fit each other, the arms or the data; a loss of NaN at the start.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.experiments import Arm, Comparison, ComparisonArguments, grid, training_arguments
    >>> x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> rows = list(zip(x, x.sum(dim=1, keepdim=True)))
    >>> arms = {"adamw": Arm("adamw_torch", grid(full=(0.03,)), basis="none"), "sl2o": Arm("sl2o", grid(std=(1.0,)))}
    >>> comparison = Comparison(
    ...     torch.nn.Linear(6, 1),
    ...     training_arguments("out", max_steps=10, eval_steps=5, logging_steps=5, use_cpu=True),
    ...     ComparisonArguments(dim=3, trajectory_steps=20, snapshots=10, seeds=1, rule="default"),
    ...     train_dataset=rows[:48], eval_dataset=rows[48:], arms=arms,
    ...     loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    ... )
    >>> result = comparison.run()  # doctest: +ELLIPSIS
    [sample]
    ...
    >>> sorted(result["runs"])
    ['adamw', 'sl2o']

    ```
    """

    # Stages

    def sample(self) -> tuple[Path, float]:
        """Tunes the recorded arm in the full space; its run with the lowest validation loss is the trajectory."""
        name, arm = self.recorded_arm, self.arms[self.recorded_arm]
        run = self.runner(name, arm)
        over_seeds(run, self.tune(name, arm, run), self.recipe.seeds)  # all runs of this arm: `train` adds none
        folder = min(self.recorded, key=lambda run: self.recorded[run][0])
        loss = self.recorded[folder][0]
        if not math.isfinite(loss):
            raise ValueError(f"every run of {name} diverged, so there is none to record; give lower learning rates")
        print(f"  {name}, full space, {folder.name}: validation loss {loss:.4f}", flush=True)
        if PartialState().is_main_process:
            Trajectory(folder / "trajectory").forget_after(int(self.recorded_share * self.recipe.trajectory_steps))
        PartialState().wait_for_everyone()
        return folder / "trajectory", self.recorded[folder][1]

    def recorded_steps(self) -> range:
        """At which steps there is a snapshot."""
        last = int(self.recorded_share * self.recipe.trajectory_steps)
        return range(0, last + 1, max(1, last // self.recipe.snapshots))

    def compared(self) -> list[Any]:
        """For keys: among which recorded runs the best is looked for; the snapshots of the others are removed."""
        return [self.recipe.seeds, self.recipe.trajectory_learning_rates, self.recipe.quick_grid]

    def keep_best_trajectory(self, folder: Path, run: dict[str, Any]) -> None:
        """Removes the snapshots of recorded runs that have been beaten: at real size they are most of the disk."""
        self.recorded[folder] = final_loss(run), run["seconds"]
        best = min(self.recorded, key=lambda run: self.recorded[run][0])
        for other in self.recorded.keys() - {best}:
            if PartialState().is_main_process:
                shutil.rmtree(other / "trajectory", ignore_errors=True)

    def extract(self, path: Path) -> dict[str, Any]:
        trajectory = Trajectory(path)
        dtype = torch.bfloat16 if trajectory.layout and trajectory.layout.n > 20_000_000 else torch.float32
        device = self.args.device if self.args.device.type == "cuda" else "cpu"  # others have no float64
        basis = fit_basis(trajectory, self.recipe.dim, dtype=dtype, device=device)
        basis.save_pretrained(self.folder / "basis")
        share = basis.provenance["explained_variance"]
        print(f"  {basis.dim} directions hold {100 * share:.3f} % of the trajectory's variance", flush=True)
        return {
            "explained_variance": share,
            "bytes": basis.nbytes,
            "basis": checksum_of(self.folder / "basis" / WEIGHTS),
        }

    def load_basis(self) -> Basis:
        layout = Layout.from_named_parameters(self.start.named_parameters())
        if self.recipe.subspace == "lora":
            return IdentityBasis(layout)
        if self.recipe.subspace == "random":
            return RandomBasis(layout, self.recipe.dim, seed=self.args.seed).to_dense()
        return Basis.from_pretrained(self.folder / "basis")

    def one(
        self,
        name: str,
        arm: Arm,
        choice: tuple[str, float],
        seed: int,
        basis: Basis | None = None,
        rule: Rule | None = None,
    ) -> Any:
        """One run of an arm; the first seed's checkpoints are in OUTPUT/<arm>, the others' below."""
        units, lr = choice
        folder = self.folder / name / "runs" / f"{units}-{lr:g}-seed-{seed}"
        if basis is None:  # the full space
            args = self.full_space(name, folder, lr, seed)
            identity = self.key, self.settings_key(args), *self.arm_key(name, arm), choice, seed, arm.decay_at
            if name != self.recorded_arm or not self.recipe.subspace.startswith("pca"):
                return self.train_once(folder, args, stamp(identity), arm)
            recorder = Recorder(folder / "trajectory", every_steps=self.recorded_steps()[1], overwrite=True)
            key = stamp(identity, self.compared())
            result = self.train_once(folder, args, key, arm, callbacks=[recorder])
            self.keep_best_trajectory(folder, result)
            return result
        args = self.arguments(
            folder, arm.optim, learning_rate=lr, sl2o_momentum=arm.momentum, seed=self.args.seed + seed
        )
        objects: dict[str, Any] = {"basis": basis.with_units(units)}
        if (own := self.rule_of(name, arm, rule)) is not None:
            objects["rule"] = own
        used = {what: value.fingerprint for what, value in objects.items()}
        if average := self.average_of(own):
            used["average"] = average
        key = stamp(self.key, self.settings_key(args), *self.arm_key(name, arm), choice, seed, used, arm.decay_at)
        return self.train_once(folder, args, key, arm, **objects)

    def rule_of(self, name: str, arm: Arm, rule: Rule | None) -> Rule | None:
        """The rule of an arm; `rule` is that of the meta stage."""
        if arm.optim != "sl2o":
            return None
        return SymbolicRule() if name == "symbolic" else self.rules_as_they_are.get(name, rule)

    def uses_own_rule(self, name: str) -> bool:
        return self.arms[name].optim == "sl2o" and name != "symbolic" and name not in self.rule_folders

    def average_of(self, rule: Rule | None) -> float:
        """eta of the running average that a run in the subspace is evaluated at, 0: none."""
        own = 0.0 if rule is None else rule.config.average
        return own if self.args.sl2o_average is None else self.args.sl2o_average

    def runner(self, name: str, arm: Arm, *objects: Any) -> Callable[..., Any]:
        """Runs the arm with a choice of units and rate, and a seed (0 where none is given)."""
        return lambda choice, seed=0: self.one(name, arm, choice, seed, *objects)

    def tune(self, name: str, arm: Arm, run: Callable[..., Any]) -> dict[tuple[str, float], Any]:
        """Runs the arm's grid with the first seed; the rates that the user gives for the recorded arm as they are."""
        recipe = self.recipe
        if name == self.recorded_arm and recipe.trajectory_learning_rates:
            return search(run, grid(full=tuple(recipe.trajectory_learning_rates)), grow=False)
        one_unit = arm.basis != "none" and recipe.subspace in ("lora", "random")
        return search(run, choices(arm.grid, quick=recipe.quick_grid, one_unit=one_unit), grow=not recipe.quick_grid)

    def train(self, basis: Basis, rule: Rule | None) -> dict[str, Any]:
        """Tunes every arm on validation, and runs its two best choices with every seed."""
        recipe, runs = self.recipe, {}
        redundant = redundant_arms(recipe.subspace)
        for name, arm in self.arms.items():
            if name in redundant or (recipe.arms and name not in recipe.arms):
                continue
            objects: tuple[Any, ...] = {"learned": (basis, rule), "random": (), "none": ()}[arm.basis]
            if arm.basis == "random":
                rows = min(recipe.dim, basis.layout.n)
                objects = RandomBasis(basis.layout, rows, seed=self.args.seed + 1).to_dense(), rule
            run = self.runner(name, arm, *objects)
            tuned = self.tune(name, arm, run)
            means, seeds = over_seeds(run, tuned, recipe.seeds)
            runs[name] = {
                "optim": arm.optim,
                "seeds": [self.args.seed + seed for seed in range(recipe.seeds)],
                "average": seeds[0].get("average", 0.0),
                **summary(tuned, means, seeds),
            }
            if (own := self.rule_of(name, arm, rule)) is not None:
                runs[name]["rule"] = own.fingerprint
            units, lr = best = next(iter(means))
            self.publish(name, best)
            print(f"  {name}: {units} lr {lr:g}, validation loss {runs[name]['final_eval_loss']:.4f}", flush=True)
        return runs

    def publish(self, name: str, best: tuple[str, float]) -> None:
        """Shows the chosen run's checkpoints as OUTPUT/<arm>/checkpoint-*."""
        if PartialState().is_main_process:
            copy_checkpoints(self.folder / name / "runs" / f"{best[0]}-{best[1]:g}-seed-0", self.folder / name)

    def used_rules(self, runs: Mapping[str, Any]) -> dict[str, Path]:
        """Folders of the rules that were not meta-trained here, by arm."""
        given = {} if self.recipe.rule is None else {"sl2o": rule_folder(self.recipe.rule)}
        return {arm: folder for arm, folder in {**given, **self.rule_folders}.items() if arm in runs}

    def write(self, runs: dict[str, Any], stages: dict[str, Any]) -> dict[str, Any]:
        recipe = self.recipe
        comparison = {
            "recipe": portable(dataclasses.asdict(recipe)),
            "data": self.data,
            "training": {**training_settings(self.args), "tf32": self.args.tf32},
            "n": Layout.from_named_parameters(self.start.named_parameters()).n,
            "runs": runs,
            "steps_to": to_losses(runs, self.targets(runs)),
            "steps_to_accuracy": to_accuracies(runs, self.accuracy_targets(runs)),
            "amortised": amortised(stages, recipe.trajectory_steps, len(self.recorded), self.used_rules(runs)),
            "meta_validation": stages.get("meta", {}).get("validation"),
            "explained_variance": stages.get("extract", {}).get("explained_variance"),
            "environment": environment(),
            **self.further(runs),
        }
        save_json(self.folder / "comparison.json", comparison)
        return comparison

    def further(self, runs: Mapping[str, Any]) -> dict[str, Any]:
        """What a recipe adds to comparison.json."""
        return {}

    def make_basis(self, stages: dict[str, Any]) -> Basis:
        """Samples and extracts, where the subspace is one of a recorded run; notes in `stages` what it cost."""
        recipe = self.recipe
        if recipe.subspace.startswith("pca"):
            # Training runs are collective: all processes take part, `stage` only keeps a result.
            print("[sample]", flush=True)
            trajectory, seconds = self.sample()
            stages["sample"] = {"seconds": seconds}
            key = stamp(self.key, trajectory.relative_to(self.folder), self.compared())

            def work() -> dict[str, Any]:
                where = self.recorded_again(trajectory)
                return self.extract(where) if PartialState().is_main_process else {}

            made = self.folder / "basis"
            known = stages["extract"] = stage(self.folder, "extract", key, work, collective=True, made=made)
            basis = self.load_basis()
            if known["basis"] != checksum_of(made / WEIGHTS):
                raise ValueError(f"{made} holds another basis than the one that was fitted there; delete the folder")
            return basis
        return self.load_basis()

    def recorded_again(self, trajectory: Path) -> Path:
        """Records a run again whose snapshots somebody deleted; it is the same run."""
        lost = lost_snapshots(trajectory, self.recorded_steps())
        PartialState().wait_for_everyone()
        if not lost:
            return trajectory
        say(f"  {trajectory} lacks {len(lost)} snapshots, the first of step {lost[0]}: the run is made anew")
        if PartialState().is_main_process:
            shutil.rmtree(trajectory.parent)
        PartialState().wait_for_everyone()
        self.recorded.clear()
        again, _ = self.sample()
        if again != trajectory:
            raise ValueError(f"made anew, {trajectory.parent} is no longer the best run; delete it and start again")
        return again

    def make_rule(self, basis: Basis, stages: dict[str, Any]) -> Rule | None:
        """Meta-trains, unless the user gave a rule or no arm needs one; notes in `stages` what it cost."""
        recipe = self.recipe
        if not (recipe.save_rule or any(self.uses_own_rule(name) for name in recipe.arms or self.arms)):
            return None
        if recipe.rule is not None:
            return Rule.from_pretrained(rule_folder(recipe.rule))
        config = self.rule_config()
        if recipe.output_scale is not None:
            config = dataclasses.replace(config, output_scale=recipe.output_scale)
        names = ("meta_epochs", "inner_steps", "unroll_length")
        processes = PartialState().num_processes  # an episode each
        key = stamp(
            self.key, basis.fingerprint, [*(getattr(recipe, name) for name in names), config.of_update()], processes
        )
        folder = self.folder / "rule" / key

        def work() -> dict[str, Any]:
            return meta_train(folder, self.task(basis), config, recipe, self.args, self.data)

        stages["meta"] = stage(self.folder, "meta", key, work, collective=True, made=folder)
        if recipe.save_rule:
            copy_rule(folder, Path(recipe.save_rule))
        return Rule.from_pretrained(folder)

    def run(self) -> dict[str, Any] | None:
        """Runs every stage and prints the table; what is done already is not done again.

        Returns:
            What stands in comparison.json; None on all processes but the first.

        Raises:
            `ValueError`: every run of the recorded arm diverged; a kept file is not what was written.
        """
        stages: dict[str, Any] = {}
        basis = self.make_basis(stages)
        rule = self.make_rule(basis, stages)
        print("[train]", flush=True)
        runs = self.train(basis, rule)
        if not PartialState().is_main_process:
            return None
        comparison = self.write(runs, stages)
        print(f"{table(comparison)}\n\n{paid_once(comparison, basis.dim)}")
        try:
            plot(comparison, self.folder / "comparison.png")
        except ImportError as error:
            print(f"no figure: {error}")
        print(f"Written: {self.folder / 'comparison.json'}, comparison.png, and checkpoints of each arm.")
        return comparison
