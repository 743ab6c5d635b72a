"""What `hf-sl2o inspect` says of each kind of file: facts for a program, and rows for a person."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..foundation.files import CHECKSUM, check_seal, checksum_of, load_json, load_metadata, open_tensors, read_tensor
from ..foundation.hub import CONFIG, WEIGHTS
from ..meta.checkpoints import MANIFEST
from ..rules import RuleConfig
from ..subspace import Layout, Trajectory
from .kinds import load_checked
from .words import human_bytes, human_time

Row = tuple[str, str]
Said = tuple[dict[str, Any], list[Row]]

_SHOWN = 8  # entries of a list


def _listed(values: list[str], most: int = _SHOWN) -> str:
    more = len(values) - most
    return ", ".join(values[:most]) + (f" and {more:,} more" if more > 0 else "")


def _checksum(path: Path, known: bool) -> Row:
    """The row of a file that was read and compared; `known` says that there was something to compare with."""
    return "checksum", "matches" if known else f"{path.name} has none: an earlier version wrote it, or another program"


def _format(folder: Path) -> int:
    """The version of what config.json describes; the first one had no name."""
    config = load_json(folder / CONFIG, dict)
    return int(config.get("format_version", 1))


def _has_checksum(folder: Path) -> bool:
    """Whether there was something to compare weights with."""
    return bool(load_json(folder / CONFIG, dict).get("sha256")) or checksum_of(folder / WEIGHTS) is not None


def _of_layout(layout: Layout) -> Row:
    names = [
        f"{name} {'x'.join(map(str, shape)) or '1'}" for name, shape in zip(layout.names, layout.shapes, strict=True)
    ]
    return "parameters", f"{layout.n:,} in {len(layout.names)} tensors: {_listed(names, 3)}"


def _made(provenance: Mapping[str, Any]) -> list[Row]:
    """How a basis was fitted."""
    if "snapshots" not in provenance:
        return []
    known = {key: provenance.get(key) for key in ("snapshots", "first_step", "last_step", "blocks", "center")}
    mean = "about their mean" if known["center"] else "not centred"
    text = f"{known['snapshots']} snapshots, steps {known['first_step']} to {known['last_step']}, {mean}"
    return [("made from", text + (", a block for each layer" if known["blocks"] == "layer" else ""))]


def about_basis(folder: Path) -> Said:
    basis = load_checked(folder).made
    ones = bool((basis.units == 1).all())
    std = bool((basis.units == basis.natural_units).all())
    units = "std" if std and not ones else "orthonormal" if ones else "other"
    meaning = {
        "std": "std: a coefficient counts standard deviations of the recorded run",
        "orthonormal": "orthonormal: a coefficient is a length",
        "other": f"lengths from {float(basis.units.min()):.3g} to {float(basis.units.max()):.3g}",
    }
    share, ratios = (basis.provenance.get(key) for key in ("explained_variance", "explained_variance_ratio"))
    dtype, known = str(basis.dtype).removeprefix("torch."), _has_checksum(folder)
    facts = {
        "format": _format(folder), "basis": basis.kind, "dim": basis.dim, "n": basis.layout.n,
        "tensors": len(basis.layout.names), "dtype": dtype, "bytes": basis.nbytes, "units": units,
        "explained_variance": share,
        "checksum": "matches" if known else None, "fingerprint": basis.fingerprint, "provenance": basis.provenance,
    }  # fmt: skip
    stored = f"{basis.dim}, {basis.kind}, {dtype}, {human_bytes(basis.nbytes)}"
    rows = [("directions", stored), _of_layout(basis.layout)]
    if share is not None:
        each = ", ".join(f"{100 * ratio:.3g}" for ratio in (ratios or [])[:_SHOWN])
        rows.append(("variance", f"{100 * share:.4g} % of the run's; the first directions: {each} %"))
    rows += [("units", meaning[units]), *_made(basis.provenance), _checksum(folder / WEIGHTS, known)]
    return facts, [*rows, ("format", str(facts["format"])), ("fingerprint", basis.fingerprint)]


def about_rule(folder: Path) -> Said:
    rule = load_checked(folder).made
    config, defaults = dataclasses.asdict(rule.config), dataclasses.asdict(RuleConfig())
    other = {key: value for key, value in config.items() if value != defaults[key]}
    known = _has_checksum(folder)
    count = sum(p.numel() for p in rule.parameters())
    facts = {
        "format": _format(folder), "rule": type(rule).__name__, "weights": count, "config": config,
        "fingerprint": rule.fingerprint, "checksum": "matches" if known else None,
    }  # fmt: skip
    choices = ", ".join(f"{key} {value}" for key, value in other.items()) or "those of the paper's CNN rule"
    rows = [("rule", f"{type(rule).__name__}, {count:,} weights"), ("choices", choices)]
    if (folder / "provenance.json").is_file():
        made = load_json(folder / "provenance.json", dict)
        facts["provenance"] = {key: made[key] for key in ("command", "tasks", "seconds", "finished") if key in made}
        tasks = [str(task) for task in made["tasks"]] if isinstance(made.get("tasks"), list) else []
        rows += [("trained on", _listed(tasks))] if tasks else []
        rows += [("took", human_time(made["seconds"]))] if isinstance(made.get("seconds"), float) else []
    rows += [_checksum(folder / WEIGHTS, known), ("format", str(facts["format"]))]
    return facts, [*rows, ("fingerprint", rule.fingerprint)]


def about_finetuned(folder: Path) -> Said:
    made = load_checked(folder).made
    origin, count = made.origin, len(made.coefficients)
    size = (folder / CONFIG).stat().st_size + (folder / WEIGHTS).stat().st_size
    where = (
        "the folder basis" if origin.basis_id is None else f"{origin.basis_id} at {origin.basis_revision or 'main'}"
    )
    facts = {
        "format": load_json(folder / CONFIG, dict)["finetuned"], "dim": count, "bytes": size, "checksum": "matches",
        "has_basis": made.basis is not None, "has_rule": made.rule is not None, "origin": dataclasses.asdict(origin),
    }  # fmt: skip
    rows = [
        (
            "coefficients",
            f"{count}, norm {float(made.coefficients.norm()):.4g}, {human_bytes(size)} without the basis",
        ),
        ("format", str(facts["format"])),
        ("base model", f"{origin.named_base}, sha256 {origin.start[:16]}..."),
        ("basis", f"{origin.basis} ({origin.basis_dtype}), in {where}"),
        ("weights", f"sha256 {origin.weights[:16]}..."),
    ]
    rows += [] if origin.rule is None else [("rule", origin.rule)]
    return facts, [*rows, ("checksum", "matches")]


def about_trajectory(folder: Path) -> Said:
    """Reads all snapshots, with a progress bar."""
    recorded = Trajectory(folder)
    steps, missing, without, size = recorded.steps, [], 0, 0
    dtypes: set[str] = set()
    for step in tqdm(steps, desc="reading snapshots", unit="file", delay=2):
        if not (path := recorded.path(step)).is_file():
            missing.append(step)
            continue
        size += path.stat().st_size
        without += checksum_of(path) is None
        with open_tensors(path) as file:
            dtypes |= {str(file.get_slice(name).get_dtype()) for name in file.keys()}
    layout = recorded.layout
    facts = {
        "snapshots": len(steps), "steps": steps, "missing": missing, "n": layout.n if layout else 0,
        "tensors": len(layout.names) if layout else 0, "dtypes": sorted(dtypes), "bytes": size,
        "checksum": "matches" if steps and not missing and not without else None,
    }  # fmt: skip
    gaps = sorted({after - before for before, after in pairwise(steps)})
    text = f"{len(steps)}, steps {steps[0]} to {steps[-1]}" if steps else "0"
    if gaps:
        text += f", every {gaps[0]}" if len(gaps) == 1 else f", {gaps[0]} to {gaps[-1]} apart"
    rows: list[Row] = [("snapshots", text)] + ([_of_layout(layout)] if layout else [])
    rows.append(("size", f"{human_bytes(size)}, {', '.join(sorted(dtypes)) or 'nothing'}"))
    state = "matches" if not without else f"{without} snapshots have none: an earlier version wrote them"
    rows.append(("checksum", f"{state}; {len(missing)} files are gone: steps {missing[:3]}" if missing else state))
    if len(steps) - len(missing) > 1:
        rows.append(("next", f"hf-sl2o extract {folder} BASIS --dim D, D at most {len(steps) - len(missing) - 1}"))
    return facts, rows


def about_trainer(folder: Path) -> Said:
    """A checkpoint of a Trainer."""
    state = load_json(folder / "trainer_state.json", dict)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    step, most = state.get("global_step"), state.get("max_steps")
    facts: dict[str, Any] = {
        "step": step, "max_steps": most, "epoch": state.get("epoch"), "files": files,
        "resumable": {"optimizer.pt", "optimizer.bin"} & files.keys() != set(),
        "best_metric": state.get("best_metric"), "best_checkpoint": state.get("best_model_checkpoint"),
    }  # fmt: skip
    rows = [("step", f"{step} of {most}"), ("files", _listed([f"{k} {human_bytes(v)}" for k, v in files.items()], 12))]
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if name in files:
            tensors, _ = about_tensors(folder / name)
            facts["weights"] = {key: tensors[key] for key in ("numbers", "dtypes", "bytes")}
            rows.append(("weights", f"{tensors['numbers']:,} in {name}, {', '.join(tensors['dtypes'])}"))
    if "coefficients.safetensors" in files:
        with open_tensors(folder / "coefficients.safetensors") as file:
            c = read_tensor(folder / "coefficients.safetensors", file, "coefficients").double()
            basis = (file.metadata() or {}).get("basis")
        facts["coefficients"] = {"dim": c.numel(), "norm": float(c.norm()), "basis": basis}
        rows.append(("coefficients", f"{c.numel()}, norm {float(c.norm()):.4g}, of the basis {basis}"))
    said = "yes" if facts["resumable"] else "no optimizer state (save_only_model): a run begins anew from its weights"
    return facts, [*rows, ("resumable", said)]


def about_meta_training(folder: Path) -> Said:
    """Where a run of MetaTrainer stands."""
    saved = load_json(folder / MANIFEST, dict)
    check_seal(folder / MANIFEST, saved)
    progress = saved["progress"] if isinstance(saved.get("progress"), dict) else {}
    done, steps, best = progress.get("epoch"), progress.get("meta_step"), progress.get("best")
    text = f"{done} meta-epochs, {steps} meta-steps" + (f", best score {best:.4g}" if isinstance(best, float) else "")
    facts = {"meta_epochs": done, "meta_steps": steps, "best_score": best}
    return {"meta_training": facts}, [("meta-training", text)]


def about_comparison(path: Path, data: dict[str, Any]) -> Said:
    """Of Comparison, or of hf-sl2o compare."""
    recipe = data["recipe"] if isinstance(data["recipe"], dict) else {}
    tables = {"": data} if "runs" in data else data.get("tasks", data.get("cells"))
    facts: dict[str, Any] = {"recipe": recipe, "arms": {}, "explained_variance": data.get("explained_variance")}
    rows: list[Row] = [("settings", _listed([f"{k} {v}" for k, v in recipe.items() if v is not None], 12))]
    if isinstance(share := data.get("explained_variance"), float):
        rows.append(("variance", f"{100 * share:.4g} % of the trajectory's"))
    try:
        for task, entry in (tables or {}).items():
            losses = {arm: (of["learning_rate"], of["final_eval_loss"]) for arm, of in entry["runs"].items()}
            facts["arms"][task or "all"] = {arm: {"learning_rate": lr, "loss": x} for arm, (lr, x) in losses.items()}
            if task:
                rows.append(("task", f"{task}, {entry['d']:,} coordinates"))
            for arm, (lr, loss) in sorted(losses.items(), key=lambda pair: _or_inf(pair[1][1])):
                ended = f"{loss:.4g}" if math.isfinite(_or_inf(loss)) else "diverged"
                rows.append((f"  {arm}", f"{ended} at rate {lr:g}"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no whole comparison ({type(error).__name__}: {error}); restore it") from error
    made_with = data["environment"].get("versions") if isinstance(data.get("environment"), dict) else None
    if isinstance(made_with, dict) and made_with:
        rows.append(("made with", _listed([f"{name} {version}" for name, version in made_with.items()], 4)))
    return facts, rows


def about_tensors(path: Path) -> Said:
    """Any safetensors file."""
    with open_tensors(path) as file:
        metadata = load_metadata(path)
        entries = [(name, file.get_slice(name)) for name in file.keys()]
        sizes = {name: (part.get_shape(), str(part.get_dtype())) for name, part in entries}
    numbers = sum(math.prod(shape) for shape, _ in sizes.values())
    dtypes = Counter(dtype for _, dtype in sizes.values())
    known = checksum_of(path) is not None
    rest = {key: value for key, value in metadata.items() if key != CHECKSUM}
    facts = {
        "tensors": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in sizes.items()},
        "numbers": numbers, "dtypes": sorted(dtypes), "bytes": path.stat().st_size, "metadata": rest,
        "checksum": "matches" if known else None,
    }  # fmt: skip
    rows = [
        ("tensors", f"{len(sizes):,} of {numbers:,} numbers, {human_bytes(path.stat().st_size)}"),
        ("dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.items()) or "none"),
        ("metadata", _listed([f"{key} {value}" for key, value in rest.items()]) or "none"),
        _checksum(path, known),
    ]
    largest = sorted(sizes.items(), key=lambda pair: -math.prod(pair[1][0]))[:_SHOWN]
    rows += [(f"  {name}", f"{'x'.join(map(str, shape)) or '1'} {dtype}") for name, (shape, dtype) in largest]
    return facts, rows


def _or_inf(loss: float | None) -> float:
    """NaN, too, comes last."""
    return math.inf if loss is None or math.isnan(loss) else loss
