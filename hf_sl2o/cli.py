"""The command `hf-sl2o`: `hf-sl2o plan --model llama-7b` says what a step of training will cost.

Exit codes: 0 it was done, 1 it failed, 2 bad input (one sentence on stderr says which), 130 it was interrupted.

A further command is a module with two functions, and one line in `COMMANDS`: `add_arguments(parser)`, and
`run(arguments)`, which returns what `--json` prints, as JSON values, and the text for a person. What is wrong with the
input it raises as `ValueError`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .experiments.planning import ALL_STORAGES, DEVICES, UTILISATION, Device, Model, Parameter, Row, plan
from .foundation.checked import check_integer, check_number, shown
from .subspace.layout import plain_name
from .subspace.storage import storage_bytes

_WIDTH = 100
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
#: Shapes that need no file: what the configuration classes of transformers hold, and differences from that.
_SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-7b": ("llama", {}),
}
_LORA_RANK = 8  # peft's default


# Models without weights


def _known(what: str, value: str, names: Iterable[str]) -> str:
    """Returns `value`; raises `ValueError` with the closest name where it is none of `names`."""
    names = list(names)
    if value in names:
        return value
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{what} is {shown(value)}, expected one of {', '.join(names)}{hint}")


def _config(arguments: argparse.Namespace) -> Any:
    """The configuration that was asked for, by name, path or Hub id."""
    from transformers import AutoConfig

    if arguments.model is not None:
        kind, sizes = _SHAPES[_known("--model", arguments.model, _SHAPES)]
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--config {where}: expected a model's configuration, and found: {reason}") from error


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
            except (RuntimeError, ValueError, TypeError, ZeroDivisionError, ImportError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"no model can be made of this {type(config).__name__}: {reason}") from error
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


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
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
    device = DEVICES[_known("--device", arguments.device, DEVICES)]
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


def _plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Plans the model that was asked for."""
    dtype = _DTYPES[_known("--dtype", arguments.dtype, _DTYPES)]
    device, storages = _device(arguments), [_known("--storage", s, ALL_STORAGES) for s in arguments.storage]
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
    sizes = ", ".join(f"{storage} {_size(size)}" for storage, size in bases.items())
    share = 100 * bases["tucker"] / bases["fp32"]
    shape = f"{arguments.dim} directions{of} take: {sizes}. Tucker's share of fp32: {share:.2g} %."
    tables = [_table(rows, count, spread, device) for count in gpus for spread in ("", "DDP", "FSDP2")]
    text = ["\n".join(map(_wrapped, [head, *verdicts, shape])), *filter(None, tables)]
    return facts, "\n\n".join([*text, "\n".join(_wrapped(note, "- ") for note in notes)])


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
    fitting, memory = [row for row in rivals if row.fits], _size(device.memory)
    best = min(fitting, key=lambda row: (row.step_s, row.total), default=None)
    if best is None:
        said = f"On {count} {device.name} nothing fits {memory}{of}."
    else:
        said = (
            f"On {count} {device.name} the fastest that fits{of} is {_name(best)}: {_time(best.step_s)} a step, "
            f"{_size(best.total)} of {memory}, bound by {best.bound}."
        )
    # a step without the average takes no longer
    light = [row for row in rivals if not row.fits and row.total - row.average <= device.memory]
    light = [row for row in light if best is None or row.step_s < best.step_s]
    if light:
        other = min(light, key=lambda row: (row.step_s, row.total))
        least = _size(other.total - other.average)
        said += f" Without its average (sl2o_average=0) {_name(other)} fits{' too' * bool(fitting)}: {least}, "
        said += f"at most {_time(other.step_s)} a step."
    if all_weights and lora:
        other = min(lora, key=lambda row: (not row.fits, row.step_s, row.total))
        does = f"takes {_time(other.step_s)} and {_size(other.total)}" if other.fits else "does not fit"
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
            sizes = [_size(size) for size in (row.weights, row.gradients, row.state, row.basis, row.total)]
            name = row.method if row.storage is None else f"{row.method} {row.storage}"
            last = ("yes" if row.fits else "no", _size(row.wire), _time(row.step_s), row.bound)
            lines.append(_line(name, (*sizes, *last), widths))
    kept, streamed = (
        next((row for row in here if row.storage and row.streamed is flag), None) for flag in (False, True)
    )
    if kept and streamed:
        more = f"SL2O with kept gradients: {_size(kept.total - streamed.total)} more"
        lines.append(more + (f", {_size(kept.wire)} on the wire." if spread == "DDP" else "."))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _size(count: float) -> str:
    """Bytes in three digits; 1 GB is 1e9."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * scale:
            return f"{_digits(count / scale)} {unit}"
    return f"{count:.0f} B" if count else "-"


def _time(seconds: float) -> str:
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


def _digits(value: float) -> str:
    return f"{value:.{max(0, 2 - (len(f'{value:.0f}') - 1 if value >= 1 else 0))}f}"


def _wrapped(text: str, bullet: str = "") -> str:
    # a number stays with its unit
    glued = re.sub(r"(\d) ([A-Za-z]{1,3}\b|%)", "\\1\u00a0\\2", text)
    filled = textwrap.fill(glued, _WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))
    return filled.replace("\u00a0", " ")


# The commands


class Command(NamedTuple):
    """One word after `hf-sl2o`."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]]


COMMANDS = {
    "plan": Command("bytes, wire and time of a training step, before anything is made", _plan_arguments, _plan)
}


def _help() -> str:
    lines = [f"  {name:<8}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: hf-sl2o COMMAND ...", "", *lines, "", "hf-sl2o COMMAND --help says more."])


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        words (`Sequence[str]`, *optional*, defaults to those of the process): The command and its arguments.

    Raises:
        `SystemExit`: argparse has said what is wrong with the arguments (2), or printed the help (0).
    """
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    try:
        command = COMMANDS[_known("the command", words[0], COMMANDS)]
        parser = argparse.ArgumentParser(f"hf-sl2o {words[0]}", description=command.summary, allow_abbrev=False)
        command.add_arguments(parser)
        parser.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")
        arguments = parser.parse_args(words[1:])
        facts, text = command.run(arguments)
        print(json.dumps(facts, indent=2) if arguments.json else text, flush=True)
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"hf-sl2o: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"hf-sl2o {words[0]} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
