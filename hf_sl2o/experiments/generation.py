"""Sentences from the weights of a finished comparison's runs, and their scores: `--stage generate` of a recipe."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from ..foundation.files import load_json, load_tensors, save_json
from ..metrics import NoMeteorWarning, default_tokenizer, e2e_scores
from ..metrics.java import missing
from ..metrics.scores import SCORES, TOKENIZERS
from ..training.resume import last_complete_checkpoint, steps_done
from .arguments import training_settings
from .comparison import Comparison
from .environment import portable
from .kept.files import keep, kept, only_writer, read_object
from .kept.keys import stamp

#: As in the LoRA paper's protocol for E2E.
DECODING = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "max_new_tokens": 64}
#: Flags that say what this stage does, and not how the comparison was made.
OWN_FLAGS = ("stage", "generate_split", "generate_rows", "generate_batch_size", "arms")

# How far the validation loss of loaded weights may be from that of the run: one process may have other batches.
_NEAR = 0.01


class NoRepeatInAnswer(LogitsProcessor):
    """No run of n tokens twice in what is generated; one of the prompt may be repeated once.

    `no_repeat_ngram_size` of `generate` counts the prompt, too: then no name of four tokens could be copied from it.
    """

    def __init__(self, prompt: int, size: int) -> None:
        self.prompt, self.within = prompt, NoRepeatNGramLogitsProcessor(size)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.within(input_ids[:, self.prompt :], scores)  # type: ignore[no-any-return]


def decode(
    model: nn.Module, tokenizer: Any, meanings: Sequence[str], *, batch_size: int = 16, title: str = ""
) -> list[str]:
    """Returns a sentence for each meaning representation, by beam search as [`DECODING`] says.

    Args:
        model (`nn.Module`): A causal language model that was trained on `mr || sentence`. Its own settings for
            generating, such as a penalty, are dropped.
        tokenizer: Its tokenizer, with an end token.
        meanings (`Sequence[str]`): Meaning representations.
        batch_size (`int`, *optional*, defaults to 16): Meanings at a time; each takes ten beams.
        title (`str`, *optional*): Of the progress bar.

    Raises:
        `ValueError`: a meaning representation that leaves the model no room for a sentence.
    """
    any_model: Any = model.eval()
    any_model.generation_config = GenerationConfig()
    device, end = next(model.parameters()).device, tokenizer.eos_token_id
    prompts = tokenizer([f"{meaning} ||" for meaning in meanings], add_special_tokens=False)["input_ids"]
    most = getattr(any_model.config, "max_position_embeddings", None) or 1 << 30
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    if order and len(prompts[order[-1]]) >= most:
        raise ValueError(
            f"the meaning representation {meanings[order[-1]]!r} has {len(prompts[order[-1]])} tokens, and the model "
            f"takes {most} with the sentence; take a model or a tokenizer with more room"
        )
    settings = {name: value for name, value in DECODING.items() if name != "no_repeat_ngram_size"}
    rooms = [min(DECODING["max_new_tokens"], most - len(prompt)) for prompt in prompts]
    batches = [  # of one room each: beside a long prompt the sentence of a short one would be cut
        together[start : start + batch_size]
        for together in (list(group) for _, group in itertools.groupby(order, key=rooms.__getitem__))
        for start in range(0, len(together), batch_size)
    ]
    with tqdm(total=len(prompts), desc=title, leave=False, mininterval=2) as bar:
        for chosen in batches:
            width = len(prompts[chosen[-1]])
            ids = torch.tensor([[end] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
            rule = NoRepeatInAnswer(width, int(DECODING["no_repeat_ngram_size"]))
            settings["max_new_tokens"] = rooms[chosen[0]]
            with torch.no_grad():
                made = any_model.generate(
                    input_ids=ids, attention_mask=mask.to(device), logits_processor=LogitsProcessorList([rule]),
                    do_sample=False, eos_token_id=end, pad_token_id=end, **settings,
                )  # fmt: skip
            for index, tokens in zip(chosen, made[:, width:].tolist(), strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                found[index] = " ".join(text.split("\n\n")[0].split())
            bar.update(len(chosen))
    return found


def by_meaning(rows: Sequence[Mapping[str, str]], limit: int | None = None) -> dict[str, list[str]]:
    """Returns all references of each meaning representation, in the order of the rows; the first `limit` of them."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["mr"], []).append(row["ref"])
    return dict(list(groups.items())[:limit])


# What a comparison has


class Finished(NamedTuple):
    """A run that a comparison lists."""

    arm: str
    seed: int
    key: str
    loss: float  # on validation, at its end
    checkpoint: Path | None  # None: it diverged


def finished_runs(folder: Path, runs: Mapping[str, Any], arms: Sequence[str]) -> Iterator[Finished]:
    """Yields the runs of `arms`; raises `ValueError` where one, or its weights, is not there any more."""
    for arm in arms:
        run = runs[arm]
        for number, (seed, curve) in enumerate(zip(run["seeds"], run["eval_per_seed"], strict=True)):
            path = folder / arm / "runs" / f"{run['units']}-{run['learning_rate']:g}-seed-{number}"
            step, loss = curve[-1]
            again = "run the comparison again, without --stage generate"
            known = kept(path / "run.json")
            if json.dumps(known.get("eval")) != json.dumps(curve):
                raise ValueError(f"{path} is not the run that comparison.json lists; {again}")
            if not math.isfinite(loss):
                yield Finished(arm, seed, known["key"], loss, None)
                continue
            last = last_complete_checkpoint(path)
            if last is None or steps_done(last) != step:
                raise ValueError(
                    f"{path} has no checkpoint of its last step, {step:g}, so its weights are gone; delete it and "
                    f"{again} and with --save_strategy steps, or leave {arm} out by --arms"
                )
            yield Finished(arm, seed, known["key"], loss, Path(last))


def check_same(subject: Comparison, made: Mapping[str, Any]) -> None:
    """Raises `ValueError` where the comparison in the folder was made with other flags or data."""
    now = {
        "recipe": portable(dataclasses.asdict(subject.recipe)),
        "training": {name: value for name, value in training_settings(subject.args).items() if name != "processes"},
    }
    for part, flags in json.loads(json.dumps(now)).items():
        for name, value in flags.items():
            if name not in OWN_FLAGS and name in made[part] and made[part][name] != value:
                raise ValueError(
                    f"--{name} is {value}, and the comparison in {subject.folder} was made with {made[part][name]}; "
                    "give the flags that it was made with, and --stage generate"
                )
    if made["data"] != json.loads(json.dumps(subject.data)):
        raise ValueError(
            f"the rows are others than those of the comparison in {subject.folder}; give the --data it had"
        )


def with_weights(subject: Comparison, run: Finished) -> nn.Module:
    """Returns the model of a run at its end; raises `ValueError` where its validation loss is another one."""
    assert run.checkpoint is not None
    model: Any = subject.build_model()
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_tensors(run.checkpoint / "adapter_model.safetensors"))
    else:
        model = type(model).from_pretrained(run.checkpoint)
        model.loss_type = getattr(subject.start, "loss_type", None)
    model = model.to(subject.args.device).eval()
    rows, size, total = subject.eval_set, subject.args.per_device_eval_batch_size, 0.0
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            total += len(batch) * float(subject.loss(model, subject.collate(batch)))
    if not abs(total / len(rows) - run.loss) <= _NEAR * max(1.0, abs(run.loss)):
        raise ValueError(
            f"the weights in {run.checkpoint} have the validation loss {total / len(rows):.4f}, and the run ended at "
            f"{run.loss:.4f}: they are not those of this run; delete its folder and run the comparison again"
        )
    return model  # type: ignore[no-any-return]


# The stage


def generate(
    subject: Comparison, rows: Sequence[Mapping[str, str]], *, split: str, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """Decodes each meaning representation with each run, adds the scores to comparison.json, and prints a table.

    Sentences and scores are kept in OUTPUT/generated, a file for each arm and seed: what is there is not made again.

    Args:
        subject ([`Comparison`]): Made with the flags of the comparison in its folder.
        rows (`Sequence[Mapping[str, str]]`): With `mr` and `ref`.
        split (`str`): Their name.
        limit (`int`, *optional*): The first so many meaning representations; None: all.
        batch_size (`int`): Of [`decode`].

    Returns:
        What stands in comparison.json.

    Raises:
        `ValueError`: there is no comparison, or it was made with other flags; weights of a run are gone.
    """
    path = subject.folder / "comparison.json"
    if PartialState().num_processes > 1:
        raise ValueError("--stage generate runs in one process; start it without accelerate launch and torchrun")
    if not path.is_file():
        raise ValueError(f"there is no {path}; run the comparison first: the same command without --stage generate")
    made = read_object(path, "recipe", "training", "data", "runs", remedy="run the comparison again")
    check_same(subject, made)
    arms = list(subject.recipe.arms or made["runs"])
    if absent := [arm for arm in arms if arm not in made["runs"]]:
        raise ValueError(f"--arms has {absent[0]!r}, and the comparison has {', '.join(made['runs'])}")
    runs = list(finished_runs(subject.folder, made["runs"], arms))
    groups = by_meaning(rows, limit)
    name = split if limit is None else f"{split}-first-{len(groups)}"
    folder = subject.folder / "generated" / name
    print(f"[generate] {len(runs)} runs, {len(groups)} meaning representations of {split}", flush=True)
    if (lacks := missing()) is not None:
        print(f"  METEOR is left out: {lacks}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with only_writer(folder):
        for run in runs:
            entry: dict[str, Any] = {"seed": run.seed, "run": run.key}
            if run.checkpoint is None:
                found[run.arm].append({**entry, "diverged": True})
                continue
            texts = _sentences(subject, run, list(groups), folder, batch_size)
            found[run.arm].append({**entry, **_scored(texts, list(groups.values()), folder, run)})
    made = load_json(path, dict)
    known = made.get("generation", {}).get(name, {})
    what = {
        "decoding": DECODING,
        "meanings": len(groups),
        "references": sum(map(len, groups.values())),
        "fingerprint": stamp(groups),
    }
    others = known["runs"] if all(known.get(key) == value for key, value in what.items()) else {}
    made.setdefault("generation", {})[name] = {**what, "runs": {**others, **found}}
    save_json(path, made)
    print(f"{scores_table(made['generation'][name]['runs'])}\nWritten: {path}, and the sentences in {folder}.")
    return made


def _sentences(
    subject: Comparison, run: Finished, meanings: Sequence[str], folder: Path, batch_size: int
) -> list[str]:
    """What a run makes of the meanings, decoded once."""
    path = folder / f"{run.arm}-seed-{run.seed}.json"
    key = stamp(run.key, DECODING, list(meanings))
    if kept_key(known := kept(path)) != key:
        start, model = time.perf_counter(), with_weights(subject, run)
        tokenizer = subject.objects["processing_class"]
        device = subject.args.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.args.bf16):
            texts = decode(
                model, tokenizer, meanings, batch_size=batch_size, title=f"{folder.name} {run.arm} seed {run.seed}"
            )
        known = {"key": key, "seconds": time.perf_counter() - start, "sentences": texts}
        keep(path, known)
    return known["sentences"]  # type: ignore[no-any-return]


def _scored(texts: Sequence[str], references: Sequence[Sequence[str]], folder: Path, run: Finished) -> dict[str, Any]:
    """Their scores, counted once, and again where Java has come since."""
    path, key, tokenizer = folder / f"{run.arm}-seed-{run.seed}.scores.json", stamp(texts, references), TOKENIZERS[0]
    known = kept(path)
    if kept_key(known) != key or (known["scores"]["tokenizer"] != tokenizer and default_tokenizer() == tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoMeteorWarning)  # the stage has said it
            known = {"key": key, "scores": e2e_scores(texts, references)}
        keep(path, known)
    return known["scores"]  # type: ignore[no-any-return]


def kept_key(known: Mapping[str, Any]) -> Any:
    return known.get("key")


def still_true(folder: Path, runs: Mapping[str, Any]) -> dict[str, Any]:
    """What comparison.json says of generated sentences, for those runs that are still the same ones."""
    path = folder / "comparison.json"
    try:
        before = load_json(path, dict).get("generation", {}) if path.is_file() else {}
    except ValueError:  # it is about to be written anew
        return {}

    def same(arm: str, entries: Sequence[Mapping[str, Any]]) -> bool:
        if arm not in runs:
            return False
        run = runs[arm]
        names = (f"{run['units']}-{run['learning_rate']:g}-seed-{number}" for number in range(len(run["seeds"])))
        keys = [kept_key(kept(folder / arm / "runs" / name / "run.json")) for name in names]
        return keys == [entry["run"] for entry in entries]

    left = {
        name: {**of, "runs": {arm: entries for arm, entries in of["runs"].items() if same(arm, entries)}}
        for name, of in before.items()
    }
    left = {name: of for name, of in left.items() if of["runs"]}
    return {"generation": left} if left else {}


def scores_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the scores as a Markdown table: the mean over seeds, +- their standard deviation, highest BLEU first."""

    def cell(entries: Sequence[Mapping[str, Any]], name: str) -> str:
        values = [float(entry[name]) for entry in entries if entry.get(name) is not None]
        if len(values) < len(entries):
            return "diverged" if any("diverged" in entry for entry in entries) else "-"
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    def order(arm: str) -> float:
        return -statistics.mean(entry.get("bleu", -1.0) for entry in runs[arm])

    lines = [["arm", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "words of ROUGE-L and CIDEr"]]
    for arm in sorted(runs, key=order):
        words = ", ".join(sorted({entry["tokenizer"] for entry in runs[arm] if "tokenizer" in entry})) or "-"
        lines.append([arm, *(cell(runs[arm], name) for name in SCORES), words])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])
