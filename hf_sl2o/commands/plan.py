"""Says what a training step will cost, before anything is made: bytes on each device, on the wire, and time.

    hf-sl2o plan --model llama-7b --gpus 1 8 --storage bf16 int4 tucker

It needs no GPU, no weights and no download.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..experiments.planning import ALL_STORAGES, DEVICES, UTILISATION, Device, Model, Parameter, Row, plan
from ..foundation.checked import check_integer, check_number
from ..subspace.layout import plain_name
from ..subspace.storage import storage_bytes
from .words import human_bytes, human_time, known, wrapped

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
#: Shapes that need no file: what the configuration classes of transformers hold, and differences from that.
_SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-7b": ("llama", {}),
}
_LORA_RANK = 8  # peft's default
# What transformers raises at a configuration that it cannot use.
_FAULTS = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


# Models without weights


def _config(arguments: argparse.Namespace) -> Any:
    """The configuration that was asked for, by name, path or Hub id."""
    from transformers import AutoConfig

    if arguments.model is not None:
        kind, sizes = _SHAPES[known("--model", arguments.model, _SHAPES)]
        return AutoConfig.for_model(kind, **sizes)
    where = arguments.config
    path = Path(where).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--config {where}: the folder has no config.json; give a model's folder, or its config.json")
    is_path = where.startswith((".", "/", "~")) or where.endswith(".json") or where.count("/") > 1
    if is_path and not path.exists():
        raise ValueError(f"--config {where}: there is no such file; give a config.json, its folder, or a Hub id")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else where, trust_remote_code=False)
    except (*_FAULTS, OSError, StrictDataclassError) as error:
        raise ValueError(f"--config {where}: expected a model's configuration, and found: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What transformers says in its first line, or two where that one names a field alone."""
    if isinstance(error, KeyError):
        return f"{error} is unknown"
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _on_meta(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a configuration, without memory for its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    for kind in (AutoModelForCausalLM, AutoModelForImageClassification):
        if type(config) in kind._model_mapping:
            try:
                with warnings.catch_warnings(), torch.device("meta"):
                    warnings.simplefilter("ignore")
                    made: torch.nn.Module = kind.from_config(config, dtype=dtype)
                    return made
            except _FAULTS as error:
                raise ValueError(f"no model can be made of this {type(config).__name__}: {_reason(error)}") from error
    raise ValueError(
        f"the configuration is a {type(config).__name__}, expected that of a causal language model or image classifier"
    )


def _shapes_of(model: torch.nn.Module) -> Model:
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    parameters = tuple(
        Parameter(plain_name(name), tuple(p.shape), p.element_size(), p.requires_grad, uses[id(p)] > 1)
        for name, p in model.named_parameters()
    )
    return Model(parameters, sum(buffer.nbytes for buffer in model.buffers()))


def _with_lora(model: torch.nn.Module, rank: int) -> Model | None:
    """With the factors of LoRA trained alone, on peft's default modules; None: peft knows none for this model."""
    from peft import LoraConfig, get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _shapes_of(get_peft_model(model, LoraConfig(r=rank)))  # type: ignore[arg-type]
    except ValueError:
        return None


# hf-sl2o plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help=f"a built-in shape: {', '.join(_SHAPES)}")
    which.add_argument("--config", metavar="PATH", help="a config.json, a folder that has one, or a Hub id")
    parser.add_argument("--lora", type=int, metavar="RANK", help="SL2O moves a LoRA adapter instead of all weights")
    parser.add_argument("--dim", type=int, default=40, metavar="D", help="directions of the basis (40)")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="of a rank's batch (4096)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="how many (1 8 64)")
    parser.add_argument(
        "--dtype", default="bf16", metavar="DTYPE", help="of weights and products: bf16 (default), fp32"
    )
    parser.add_argument(
        "--storage", nargs="+", default=list(ALL_STORAGES), metavar="S", help=f"{', '.join(ALL_STORAGES)} (all)"
    )
    parser.add_argument("--device", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (h100)")
    for name, unit in (("flops", "TFLOP/s"), ("bandwidth", "GB/s"), ("memory", "GB"), ("link", "GB/s one way")):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=f"of the device, in {unit}, instead of its own")


def _device(arguments: argparse.Namespace) -> Device:
    device = DEVICES[known("--device", arguments.device, DEVICES)]
    changes: dict[str, Any] = {}
    for name, scale in (("flops", 1e12), ("bandwidth", 1e9), ("memory", 1e9), ("link", 1e9)):
        if (value := getattr(arguments, name)) is not None:
            check_number(f"--{name}", value, above=0.0)
            changes[name] = value * scale
    if "flops" in changes:
        changes["flops"] = {**device.flops, arguments.dtype: changes["flops"]}
    if "link" in changes:  # within a node and between nodes
        changes["network"] = changes["link"]
    return replace(device, **changes)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Plans the model that was asked for."""
    dtype = _DTYPES[known("--dtype", arguments.dtype, _DTYPES)]
    device, storages = _device(arguments), [known("--storage", s, ALL_STORAGES) for s in arguments.storage]
    check_integer("--batch-tokens", arguments.batch_tokens, 1)
    for count in arguments.gpus:
        check_integer("--gpus", count, 1)
    if arguments.lora is not None:
        check_integer("--lora", arguments.lora, 1)
    model = _on_meta(_config(arguments), dtype)
    full = _shapes_of(model)
    adapter = _with_lora(model, arguments.lora or _LORA_RANK)
    if adapter is None and arguments.lora is not None:
        raise ValueError("--lora: peft has no default target modules for this kind of model; leave --lora out")
    moved = full if arguments.lora is None or adapter is None else adapter
    check_integer("--dim", arguments.dim, 1, moved.n)
    gpus = list(dict.fromkeys(arguments.gpus))
    rows = plan(
        full, adapter, moved=moved, dim=arguments.dim, tokens=arguments.batch_tokens, gpus=gpus, device=device,
        dtype=arguments.dtype, storages=list(dict.fromkeys(storages)),
    )  # fmt: skip
    bases = {storage: storage_bytes(moved.layout, arguments.dim, storage) for storage in ALL_STORAGES}
    notes = _notes(full, adapter, arguments.lora or _LORA_RANK)
    verdicts = [_verdict(rows, count, device, moved is full) for count in gpus]
    name = arguments.model or arguments.config
    facts = {
        "model": name, "n": full.n, "moved_by_sl2o": moved.n, "dim": arguments.dim, "dtype": arguments.dtype,
        "batch_tokens": arguments.batch_tokens, "utilisation": UTILISATION, "device": asdict(device),
        "basis_bytes": bases, "summary": verdicts, "rows": [asdict(row) for row in rows], "notes": notes,
    }  # fmt: skip
    head = f"{name}: {full.n:,} numbers in {arguments.dtype}, {arguments.batch_tokens:,} tokens a rank and step."
    of = "" if moved is full else f" of an adapter of {moved.n:,} numbers"
    sizes = ", ".join(f"{storage} {human_bytes(size)}" for storage, size in bases.items())
    share = 100 * bases["tucker"] / bases["fp32"]
    shape = f"{arguments.dim} directions{of} take: {sizes}. Tucker's share of fp32: {share:.2g} %."
    tables = [_table(rows, count, spread, device) for count in gpus for spread in ("", "DDP", "FSDP2")]
    text = ["\n".join(map(wrapped, [head, *verdicts, shape])), *filter(None, tables)]
    return facts, "\n\n".join([*text, "\n".join(wrapped(note, "- ") for note in notes)])


def _notes(full: Model, adapter: Model | None, rank: int) -> list[str]:
    lora = f"LoRA has rank {rank} on peft's default modules." if adapter else "peft has no default modules for LoRA."
    notes = [
        "Not counted: activations, temporary tensors of a step, tensors of d numbers, what the allocator wastes. "
        f"{lora}",
        "AdamW keeps fp32 moments, and of bf16 weights an fp32 copy. SL2O keeps nothing of fp32 weights, and of bf16 "
        "ones what was rounded off; the average that rule `default` has adds one copy of fp32 weights, two of bf16. "
        "DDP's buckets are a copy of all gradients; streamed ones need none.",
        "Under FSDP2 a rank holds its share, the parameters outside all layers, and two layers. The basis is cut as "
        "the weights are; FSDP2 takes no Tucker basis, and no rule without a basis.",
        f"Step = max(compute, wire) + optimizer. Compute: 6 operations a number and token (4 where it is frozen), at "
        f"{UTILISATION:.0%} of the peak. Optimizer: AdamW moves 28 bytes a number, SL2O reads U twice. Wire: a ring, "
        "over the network beyond 8. A random basis is made by one thread of the host, twice a step.",
    ]
    if sum(p.numel for p in full.parameters if len(p.shape) > 3) > full.n / 10:
        notes.append("Convolutions use a weight at many places of an image: their compute is more than said here.")
    return notes


def _verdict(rows: Sequence[Row], count: int, device: Device, all_weights: bool) -> str:
    """What fits a number of devices and is fastest, in a sentence or two."""
    here = [row for row in rows if row.gpus == count]
    lora = [row for row in here if row.method.startswith("LoRA")]
    rivals = [row for row in here if row not in lora] if all_weights else here
    of = " and trains all weights" if all_weights else ""
    fitting, memory = [row for row in rivals if row.fits], human_bytes(device.memory)
    best = min(fitting, key=lambda row: (row.step_s, row.total), default=None)
    if best is None:
        said = f"On {count} {device.name} nothing fits {memory}{of}."
    else:
        said = (
            f"On {count} {device.name} the fastest that fits{of} is {_name(best)}: {human_time(best.step_s)} a step, "
            f"{human_bytes(best.total)} of {memory}, bound by {best.bound}."
        )
    # a step without the average takes no longer
    light = [row for row in rivals if not row.fits and row.total - row.average <= device.memory]
    light = [row for row in light if best is None or row.step_s < best.step_s]
    if light:
        other = min(light, key=lambda row: (row.step_s, row.total))
        least = human_bytes(other.total - other.average)
        said += f" Without its average (sl2o_average=0) {_name(other)} fits{' too' * bool(fitting)}: {least}, "
        said += f"at most {human_time(other.step_s)} a step."
    if all_weights and lora:
        other = min(lora, key=lambda row: (not row.fits, row.step_s, row.total))
        does = f"takes {human_time(other.step_s)} and {human_bytes(other.total)}" if other.fits else "does not fit"
        said += f" {_name(other)} {does}."
    return said


def _name(row: Row) -> str:
    words = [row.method, row.storage or "", f"under {row.spread}" if row.spread else ""]
    return " ".join(filter(None, [*words, "with streamed gradients" if row.streamed else ""]))


def _table(rows: Sequence[Row], count: int, spread: str, device: Device) -> str:
    """The rows of one number of devices, SL2O's with streamed gradients; what kept ones add is the same for all."""
    here = [row for row in rows if (row.gpus, row.spread) == (count, spread)]
    if not here:
        return ""
    columns = ("weights", "gradients", "optimizer", "basis", "total", "fits", "wire", "step", "bound by")
    widths = (9, 10, 10, 9, 9, 5, 9, 9, 11)
    lines = [_line(f"{count} {device.name}{' ' * bool(spread)}{spread}", columns, widths)]
    for row in here:
        if row.streamed or row.storage is None:
            sizes = [human_bytes(count) for count in (row.weights, row.gradients, row.state, row.basis, row.total)]
            name = row.method if row.storage is None else f"{row.method} {row.storage}"
            last = ("yes" if row.fits else "no", human_bytes(row.wire), human_time(row.step_s), row.bound)
            lines.append(_line(name, (*sizes, *last), widths))
    kept, streamed = (
        next((row for row in here if row.storage and row.streamed is flag), None) for flag in (False, True)
    )
    if kept and streamed:
        more = f"SL2O with kept gradients: {human_bytes(kept.total - streamed.total)} more"
        lines.append(more + (f", {human_bytes(kept.wire)} on the wire." if spread == "DDP" else "."))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
