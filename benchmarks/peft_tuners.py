"""One small run of every tuner of the installed PEFT with `optim="sl2o"`, beside AdamW at the best of three rates.

A tiny Llama learns to count by threes, and is then tuned to count by fives. A row says what a tuner needs beyond its
configuration, and what comes of it without: an error, or a loss.

python benchmarks/peft_tuners.py --json benchmarks/results/peft_tuners.json
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_sl2o  # noqa: F401
from hf_sl2o.experiments.environment import environment
from hf_sl2o.foundation.files import save_json

STEPS, BATCH, LENGTH, WORDS = 40, 16, 16, 64
RATES = (1e-3, 1e-2, 1e-1)  # of AdamW: those of LoRA's, of most others', and of prompts' examples
LEAST = 0.02  # share of the loss at the start by which it has to fall
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
COLUMN, ROW = ["q_proj", "k_proj", "v_proj", "up_proj"], ["o_proj", "down_proj"]  # as tensor parallelism cuts them
SQUARE = ["q_proj", "k_proj", "v_proj", "o_proj"]
Model = torch.nn.Module
Make = Callable[[Model, Path], Model]


@dataclass
class Tuner:
    """How a tuner is put on the model, and what it needs beyond a configuration.

    Args:
        options (`dict`): Of its configuration.
        config (`str`, *optional*): The configuration's kind, a name of `peft.PeftType`; default: LoRA's.
        needs (`str`, *optional*): What a user has to add, in words. `columns`, `make` and `callback` add it here.
        columns (`dict`, *optional*): More of each example.
        make (`callable`, *optional*): Makes the model of a base and a folder, instead of `get_peft_model`.
        callback (`callable`, *optional*): Makes a callback of the model.
    """

    options: dict[str, Any]
    config: str = "LORA"
    needs: str | None = None
    columns: dict[str, int] = field(default_factory=dict)
    make: Make | None = None
    callback: Callable[[Model], TrainerCallback] | None = None

    def bare(self) -> Tuner:
        """The same without what it needs."""
        return Tuner(self.options, self.config)


class Allocate(TrainerCallback):
    """AdaLoRA's pruning, which its authors call after each step."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]


def _xlora(base: Model, folder: Path) -> Model:
    """X-LoRA mixes adapters that are there."""
    for name in ("0", "1"):
        config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / name)
    adapters = {name: str(folder / name) for name in ("0", "1")}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_size=32, adapters=adapters)
    base.config.use_cache = False  # type: ignore[union-attr, assignment]
    return peft.get_peft_model(base, config)


def _eva(base: Model, folder: Path) -> Model:
    config = peft.LoraConfig(
        r=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    model = peft.get_peft_model(base, config)
    rows = torch.utils.data.DataLoader(examples(5), batch_size=BATCH)
    peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
    return model


def _prepared(base: Model, config: Any, prepare: Callable[..., None]) -> Model:
    """An adapter that is made of the model's gradients or activations on the user's data."""
    rows = torch.stack([row["input_ids"] for row in examples(5)[:64]])
    prepare(base, config, rows)
    return peft.get_peft_model(base, config)


def _corda(base: Model, folder: Path) -> Model:
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        r=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="corda", lora_alpha=8,
        corda_config=CordaConfig(corda_method="kpm"),
    )  # fmt: skip

    def prepare(model: Model, config: Any, rows: torch.Tensor) -> None:
        def run() -> None:
            with torch.no_grad():
                for row in rows:  # its hooks take one text at a time
                    model(input_ids=row[None])

        preprocess_corda(model, config, run_model=run)

    return _prepared(base, config, prepare)


def _lora_ga(base: Model, folder: Path) -> Model:
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(
        r=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )  # fmt: skip

    def prepare(model: Model, config: Any, rows: torch.Tensor) -> None:
        preprocess_loraga(model, config, lambda: model(input_ids=rows, labels=rows).loss.backward())

    return _prepared(base, config, prepare)


def lora(**options: Any) -> dict[str, Any]:
    return {"r": 8, "target_modules": TARGETS, **options}


PROMPT = {"num_virtual_tokens": 8}
SKILLS = {"target_modules": TARGETS, "r": 4, "n_tasks": 2, "n_skills": 2}
TASKS = "`task_ids` in each example, and `remove_unused_columns=False`"
#: Every kind of `peft.PeftType`, and the variants of LoRA that its configuration has.
TUNERS = {
    "LoRA": Tuner(lora()),
    "LoRA, rank-stabilised": Tuner(lora(use_rslora=True)),
    "LoRA, gaussian": Tuner(lora(init_lora_weights="gaussian")),
    "LoRA, orthogonal": Tuner(lora(init_lora_weights="orthogonal")),
    "LoRA with biases": Tuner(lora(lora_bias=True)),
    "DoRA": Tuner(lora(use_dora=True)),
    "PiSSA": Tuner(lora(init_lora_weights="pissa")),
    "OLoRA": Tuner(lora(init_lora_weights="olora")),
    "MiCA": Tuner(lora(init_lora_weights="mica")),
    "LoftQ": Tuner(lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()), needs="the package bitsandbytes"),
    "EVA": Tuner(
        lora(init_lora_weights="eva"), make=_eva, needs="`initialize_lora_eva_weights` with batches of the data"
    ),
    "CorDA": Tuner(lora(init_lora_weights="corda"), make=_corda, needs="`preprocess_corda` with batches of the data"),
    "LoRA-GA": Tuner(
        lora(init_lora_weights="lora_ga"), make=_lora_ga, needs="`preprocess_loraga` with batches of the data"
    ),
    "KaSA": Tuner(lora(kasa_config=KasaConfig())),
    "QALoRA": Tuner(lora(use_qalora=True, qalora_group_size=16)),
    "BD-LoRA": Tuner(
        lora(use_bdlora=BdLoraConfig(target_modules_bd_a=COLUMN, target_modules_bd_b=ROW, nblocks=2))
    ),
    "MonteCLoRA": Tuner(lora(monteclora_config=MontecloraConfig())),
    "VeLoRA": Tuner(lora(velora_config=VeloraConfig())),
    "aLoRA": Tuner(lora(alora_invocation_tokens=[0])),
    "AdaLoRA": Tuner(
        {"init_r": 8, "target_r": 4, "total_step": STEPS, "tinit": 5, "tfinal": 20, "target_modules": TARGETS},
        "ADALORA", callback=Allocate, needs="a callback that calls `update_and_allocate`, else nothing is pruned",
    ),
    "Adamss": Tuner({"r": 16, "num_subspaces": 2, "subspace_rank": 2, "target_modules": TARGETS}, "ADAMSS"),
    "Adaption prompt": Tuner({"adapter_len": 8, "adapter_layers": 2}, "ADAPTION_PROMPT"),
    "BEFT": Tuner({"target_modules": ["v_proj"]}, "BEFT"),
    "BOFT": Tuner({"target_modules": TARGETS, "boft_block_size": 4}, "BOFT"),
    "C3A": Tuner({"target_modules": TARGETS, "block_size": 32}, "C3A"),
    "Cartridge": Tuner(PROMPT, "CARTRIDGE"),
    "CPT": Tuner(
        {"cpt_token_ids": [0, 3, 6, 9], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}, "CPT"
    ),
    "DEFT": Tuner({"target_modules": TARGETS}, "DEFT"),
    "DeLoRA": Tuner({"target_modules": TARGETS}, "DELORA"),
    "FourierFT": Tuner({"target_modules": TARGETS, "n_frequency": 200}, "FOURIERFT"),
    "FRoD": Tuner({"target_modules": TARGETS, "progressbar": False}, "FROD"),
    "GLoRA": Tuner({"target_modules": TARGETS}, "GLORA"),
    "GraLoRA": Tuner({"target_modules": TARGETS, "r": 8, "alpha": 16}, "GRALORA"),
    "HiRA": Tuner({"target_modules": TARGETS, "r": 8}, "HIRA"),
    "HRA": Tuner({"target_modules": TARGETS}, "HRA"),
    "IA3": Tuner({"target_modules": TARGETS, "feedforward_modules": ["down_proj"]}, "IA3"),
    "Lily": Tuner({"target_modules": TARGETS, "r": 8}, "LILY"),
    "LayerNorm tuning": Tuner({"target_modules": ["input_layernorm", "post_attention_layernorm"]}, "LN_TUNING"),
    "LoHa": Tuner({"target_modules": TARGETS}, "LOHA"),
    "LoKr": Tuner({"target_modules": TARGETS}, "LOKR"),
    "MiSS": Tuner({"target_modules": TARGETS, "r": 8}, "MISS"),
    "Multitask prompt tuning": Tuner(
        {**PROMPT, "num_tasks": 2}, "MULTITASK_PROMPT_TUNING", columns={"task_ids": 0}, needs=TASKS
    ),
    "OFT": Tuner({"target_modules": TARGETS, "oft_block_size": 16}, "OFT"),
    "OSF": Tuner({"target_modules": TARGETS, "effective_rank": 8}, "OSF"),
    "P-tuning": Tuner({**PROMPT, "encoder_hidden_size": 64}, "P_TUNING"),
    "PEANuT": Tuner({"target_modules": TARGETS, "r": 8}, "PEANUT"),
    "Poly": Tuner(SKILLS, "POLY", columns={"task_ids": 0}, needs=TASKS),
    "Prefix tuning": Tuner(PROMPT, "PREFIX_TUNING"),
    "Prompt tuning": Tuner(PROMPT, "PROMPT_TUNING"),
    "PSOFT": Tuner({"target_modules": TARGETS, "r": 16}, "PSOFT"),
    "PVeRA": Tuner({"target_modules": SQUARE, "r": 64}, "PVERA"),
    "RandLora": Tuner({"target_modules": TARGETS, "r": 8}, "RANDLORA"),
    "RoAd": Tuner({"target_modules": TARGETS}, "ROAD"),
    "Shadow": Tuner({"shadow_dropout": 0.0}, "SHADOW"),
    "SHiRA": Tuner({"target_modules": TARGETS, "r": 8, "random_seed": 0}, "SHIRA"),
    "SuperTuning": Tuner({"target_modules": TARGETS, "sparsity": 0.9}, "SUPERTUNING"),
    "TinyLoRA": Tuner({"target_modules": TARGETS}, "TINYLORA"),
    "Trainable tokens": Tuner({"token_indices": list(range(WORDS))}, "TRAINABLE_TOKENS"),
    "Uni-LoRA": Tuner({"target_modules": TARGETS}, "UNILORA"),
    "VB-LoRA": Tuner({"target_modules": TARGETS, "vector_length": 16, "num_vectors": 32}, "VBLORA"),
    "VeRA": Tuner({"target_modules": SQUARE, "r": 64}, "VERA"),
    "WaveFT": Tuner({"target_modules": TARGETS, "n_frequency": 200}, "WAVEFT"),
    "X-LoRA": Tuner({"hidden_size": 64}, "XLORA", make=_xlora, needs="saved LoRA adapters, which it mixes"),
}  # fmt: skip
QUICK = ("LoRA", "LayerNorm tuning", "Poly")


def examples(stride: int, rows: int = 512, **columns: int) -> list[dict[str, Any]]:
    """Counting: each word is the one before plus `stride`, modulo the number of words."""
    start = torch.arange(rows)[:, None] * 7
    ids = (start + stride * torch.arange(LENGTH)) % WORDS
    return [{"input_ids": row, "labels": row, **columns} for row in ids]


def fit(model: Model, tuner: Tuner, optim: str, stride: int, **options: Any) -> tuple[float, float]:
    """Trains a model in a Trainer; returns the loss before and after."""
    more = tuner.columns
    args = TrainingArguments(
        tempfile.gettempdir(), optim=optim, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", remove_unused_columns=not more,
        **{"max_steps": STEPS, **options},
    )  # fmt: skip
    rows = examples(stride, **more)
    callbacks = [] if tuner.callback is None else [tuner.callback(model)]
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[::8], callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def base_model(steps: int) -> LlamaForCausalLM:
    """A model that counts by threes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit(model, Tuner({}), "adamw_torch", 3, max_steps=steps, learning_rate=3e-3)
    return model


def tuned(base: Model, tuner: Tuner, folder: Path) -> Model:
    """The tuner on a copy of the base; the same at each call."""
    torch.manual_seed(0)
    base = copy.deepcopy(base)
    if tuner.make is not None:
        return tuner.make(base, folder)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[tuner.config]]
    return peft.get_peft_model(base, config(task_type="CAUSAL_LM", **tuner.options))  # type: ignore[arg-type]


def number(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def run_tuner(base: Model, tuner: Tuner, steps: int) -> dict[str, Any]:
    """The row of a tuner; an error of PEFT or the Trainer is a part of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row: dict[str, Any] = {"type": tuner.config, "needs": tuner.needs, "without": None, "error": None}
        try:
            model = tuned(base, tuner, folder)
            row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row["start"], row["sl2o"] = map(number, fit(model, tuner, "sl2o", 5, max_steps=steps))
            losses = {}
            for rate in RATES:
                model = tuned(base, tuner, folder)
                losses[rate] = fit(model, tuner, "adamw_torch", 5, max_steps=steps, learning_rate=rate)[1]
            best = min(RATES, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
            row["adamw"], row["adamw_rate"] = number(losses[best]), best
        except Exception as error:  # what a user would meet, whatever it is
            row["error"] = said(error)
        if tuner.needs is not None:
            try:
                bare = tuner.bare()
                row["without"] = number(fit(tuned(base, bare, folder), bare, "sl2o", 5, max_steps=steps)[1])
            except Exception as error:
                row["without"] = said(error)
    falls = {name: row.get(name) is not None and row[name] < (1 - LEAST) * row["start"] for name in ("sl2o", "adamw")}
    row["trains"] = falls
    return row


def said(error: Exception) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="three tuners, a few steps")
    parser.add_argument("--tuners", nargs="+", choices=list(TUNERS), metavar="NAME", help="only these")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of tuners, which say what they choose
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = options.tuners or (QUICK if options.quick else TUNERS)
    steps = 10 if options.quick else STEPS
    base, rows = base_model(60 if options.quick else 150), {}
    for name in names:
        row = rows[name] = run_tuner(base, TUNERS[name], steps)
        print(f"{name:24}", {key: value for key, value in row.items() if value is not None}, flush=True)
    missing = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {one.config for one in TUNERS.values()})
    result = {
        "benchmark": "peft_tuners", "steps": steps, "rates": RATES, "least": LEAST, "tuners": rows,
        "not_tried": missing, "environment": environment(),
    }  # fmt: skip
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
