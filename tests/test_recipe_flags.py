"""Every flag of every recipe and benchmark: what cannot be right is said before any work begins, in one sentence."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest

import benchmarks.gpu_vision as gpu_vision
from hf_sl2o import LSTMRule, Trajectory
from hf_sl2o.experiments import plans
from hf_sl2o.experiments.command_line import flags as checks
from hf_sl2o.experiments.command_line import script
from hf_sl2o.experiments.tasks import named as meta_tasks
from hf_sl2o.foundation.files import save_json
from recipes import gpt2_e2e

ROOT = Path(__file__).parent.parent
RECIPES = ("gpt2_e2e", "resnet_cifar", "vit_cifar", "vit_imagenet")
STUDIES = ("average", "carry", "directions", "estimators", "inputs", "one_run", "repeat", "subspaces", "symbolic",
           "transfer", "unroll", "wire")  # fmt: skip
SCRIPTS = ("evaluate_rules", "pretrain_base", "figures", "reproduce", *(f"studies.{name}" for name in STUDIES))
TIMERS = ("basis", "gpu", "gpu_vision", "import_time", "meta_processes", "meta_training", "optimizer_step",
          "readme_example", "rule_kernel", "vision_overhead")  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_begun(monkeypatch, tmp_path):
    """Whatever reads data or trains fails the test; paths are below a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where a benchmark runs
    (tmp_path / "afile").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(meta_tasks, "train_full", lambda *args, **kwargs: pytest.fail("it trains"))
    monkeypatch.setattr(Trajectory, "write", lambda *args, **kwargs: pytest.fail("it records"))


def main_of(name):
    folder = "benchmarks" if name in TIMERS else "recipes"
    return importlib.import_module(f"{folder}.{name}").main


def refused(name, words, message):
    with pytest.raises((ValueError, FileNotFoundError, NotImplementedError), match=message) as raised:
        main_of(name)(words)
    assert "\n" not in str(raised.value) and script.is_ours(raised.value), raised.value


class Parsed(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    """The argument parser of a script."""

    def found(name):
        seen = []

        def watched(parser, *args, **kwargs):
            seen.append(parser)
            raise Parsed

        with monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_known_args", watched)
            with pytest.raises(Parsed):
                main_of(name)([])
        return seen[0]

    return found


@pytest.mark.parametrize("name", [*RECIPES, *SCRIPTS, *TIMERS, "meta_train"])
def test_every_number_that_a_script_takes_has_its_expectation(name, parser_of):
    trainers = {field.name for field in fields(gpt2_e2e.SL2OTrainingArguments)} if name in RECIPES else set()
    for action in parser_of(name)._actions:
        numeric = action.type in (int, float) or getattr(action.type, "__name__", "") in ("int", "float")
        if numeric and action.dest not in trainers and action.choices is None:
            assert action.dest in checks.FLAGS or action.dest == "num_classes", action.dest
            assert not checks.FLAGS.get(action.dest, checks.POSITIVE).holds(math.nan)


COMMON = [
    ("--seeds", "0"), ("--seeds", "-1"), ("--dim", "0"), ("--snapshots", "1"), ("--meta_epochs", "0"),
    ("--inner_steps", "1"), ("--unroll_length", "1"), ("--lora_rank", "0"), ("--trajectory_steps", "0"),
    ("--max_steps", "0"), ("--max_steps", "-5"), ("--eval_steps", "0"), ("--logging_steps", "0"),
    ("--eval_steps", "0.5"), ("--save_steps", "0"), ("--train_rows", "0"), ("--train_rows", "-5"),
    ("--eval_rows", "0"), ("--per_device_train_batch_size", "0"), ("--per_device_eval_batch_size", "-1"),
    ("--gradient_accumulation_steps", "0"), ("--trajectory_learning_rates", "nan"),
    ("--trajectory_learning_rates", "inf"), ("--trajectory_learning_rates", "0"), ("--output_scale", "-1"),
    ("--max_grad_norm", "nan"), ("--sl2o_average", "-1"), ("--weight_decay", "inf"), ("--adam_beta1", "1"),
    ("--adam_epsilon", "0"), ("--seed", "-1"), ("--eval_strategy", "no"), ("--eval_delay", "5"),
]  # fmt: skip
TOGETHER = [
    (["--eval_steps", "500000"], "--eval_steps is 500000, expected at most --max_steps"),
    (["--logging_steps", "500000"], "--logging_steps is 500000, expected at most --max_steps"),
    (["--inner_steps", "5"], "--inner_steps is 5, expected at least --unroll_length, which is 10"),
    (["--arms", "nonsense"], "--arms has 'nonsense', expected any of"),
    (["--subspace", "nonsense"], "--subspace is 'nonsense', expected"),
    (["--rule", "nowhere"], "--rule is 'nowhere', which is no folder here and no rule that ships: default"),
    (["--rule", "afile"], "--rule is 'afile', which could not be loaded"),
    (["--save_rule", "afile"], "--save_rule is afile, a file; give a folder"),
    (["--save_rule", "there", "--rule", "here"], "--save_rule there keeps .*--rule here names one"),
    (["--output_dir", "afile"], "--output_dir is afile, a file; give a folder"),
    (["--output_dir", "afile/below"], "--output_dir is afile/below, a place where nothing can be written"),
    (["--nonsense", "3"], "'--nonsense', '3'"),
    (["--learning_rate", "1e-3"], "--learning_rate is 0.001, which a recipe has no use for: each arm runs its grid"),
    (["--optim", "adamw_torch"], "--optim is 'adamw_torch', which a recipe has no use for"),
    (["--weight_decay", "0.1"], "--weight_decay is 0.1, expected 0 beside arms in the subspace"),
    (["--lr_scheduler_type", "reduce_lr_on_plateau"], "--lr_scheduler_type is .* does not work"),
    (["--report_to", "nonsense"], "--report_to is .* does not work"),
]


@pytest.mark.parametrize("name", RECIPES)
def test_flags_of_recipes(name):
    own = {"resnet_cifar": ["--validation_rows"], "vit_cifar": ["--lora_alpha", "--base_steps"],
           "vit_imagenet": ["--image_size", "--shuffle_buffer"]}  # fmt: skip
    for flag, value in [*COMMON, *((flag, "0") for flag in own.get(name, []))]:
        refused(name, ["--use_cpu", flag, value], f"^{flag} is ")
    refused(name, ["--use_cpu", "--trajectory_learning_rates", "0.1", "-1"], "^--trajectory_learning_rates is -1")
    for words, message in TOGETHER:
        refused(name, ["--use_cpu", "--output_dir", "out", *words], message)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("gpt2_e2e", ["--model", "nowhere"], "--model is 'nowhere', which could not be loaded"),
        ("gpt2_e2e", ["--tokenizer", "nowhere"], "--tokenizer is 'nowhere', which could not be loaded"),
        ("gpt2_e2e", ["--data", "empty"], "--data empty: looked for empty/train.csv"),
        ("gpt2_e2e", ["--subspace", "random", "--dim", "100000000"], "--dim is 100000000, expected at most the "),
        ("resnet_cifar", ["--data", "empty"], "--data empty: looked for empty/train.parquet"),
        ("resnet_cifar", ["--rules", "nowhere"], "--rules is .*nowhere"),
        ("vit_cifar", ["--model", "nowhere"], "--model is 'nowhere', which could not be loaded"),
        ("vit_cifar", ["--data", "empty"], "--data empty: looked for empty/train.parquet"),
        ("vit_imagenet", ["--data", "empty"], "--data empty: looked for the folder empty/train"),
    ],
)
def test_what_a_recipe_loads(name, words, message):
    refused(name, ["--use_cpu", "--output_dir", "out", "--train_rows", "200", *words], message)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("meta_train", ["--rule", "nonsense"], "--rule is 'nonsense', expected one of default"),
        ("meta_train", ["--tasks", "teacher", "nonsense"], "--tasks: there is no task 'nonsense', expected one of"),
        ("meta_train", ["--tasks", "quadratic-lora4"], "'quadratic' cannot be adapted by LoRA"),
        ("meta_train", ["--meta_epochs", "0"], "--meta_epochs is 0"),
        ("meta_train", ["--inner_steps", "5"], "inner_steps 5 is below unroll_length"),
        ("meta_train", ["--meta_learning_rate", "nan"], "--meta_learning_rate is nan"),
        ("meta_train", ["--momenta", "0.5", "1.0"], "--momenta is 1.0"),
        ("meta_train", ["--random_scaling", "-1"], "--random_scaling is -1"),
        ("meta_train", ["--meta_loss", "mean"], "--meta_loss is 'mean', expected sum or log"),
        ("meta_train", ["--name", "../x"], "--name is '../x'"),
        ("meta_train", ["--data", "nowhere"], "--data is 'nowhere', expected embedded, or a folder"),
        ("meta_train", ["--data", "empty"], "empty/e2e_nlg: looked for empty/e2e_nlg/train.csv"),
        ("meta_train", ["--save_to", "."], "--save_to is ., a folder that is replaced, and it holds 'afile'"),
        ("meta_train", ["--nonsense", "3"], "'--nonsense', '3'"),
        (
            "evaluate_rules",
            ["--rule", "nowhere"],
            "--rule is 'nowhere', which could not be loaded",
        ),
        ("evaluate_rules", ["--tasks", "digits-mlp-lora4"], "--tasks: there is no task 'digits-mlp-lora4'"),
        ("evaluate_rules", ["--what", "default-lora", "--tasks", "quadratic"], "'quadratic' cannot be adapted"),
        ("evaluate_rules", ["--steps", "0"], "--steps is 0"),
        ("evaluate_rules", ["--seeds", "0"], "--seeds is 0"),
        ("evaluate_rules", ["--rank", "0"], "--rank is 0"),
        ("evaluate_rules", ["--json", "x.png"], "--json is x.png, expected the name of a file that ends in .json"),
        ("evaluate_rules", ["--json", "afile/x.json"], "--json is afile, a file"),
        ("evaluate_rules", ["--tasks_dir", "afile"], "--tasks_dir is afile, a file"),
        ("evaluate_rules", ["--data", "empty"], "empty/cifar10: looked for empty/cifar10/train.parquet"),
        ("pretrain_base", ["--data", "nowhere"], "--data is 'nowhere'"),
        ("studies.average", ["--tasks", "nonsense"], "--tasks: there is no task 'nonsense'"),
        ("studies.directions", ["--tasks", "digits-mlp-lora4"], "--tasks: there is no task 'digits-mlp-lora4'"),
        ("studies.symbolic", ["--tasks", "nonsense"], "--tasks: there is no task 'nonsense'"),
        ("studies.symbolic", ["--generations", "0"], "--generations is 0"),
        ("studies.estimators", ["--problems", "nonsense"], "--problems has 'nonsense', expected any of quadratic"),
        ("studies.estimators", ["--draws", "0"], "--draws is 0"),
        ("studies.estimators", ["--steps", "15"], "--steps is 15, expected a multiple of 10"),
        ("studies.inputs", ["--judge_on", "nonsense"], "--judge_on: there is no task 'nonsense'"),
        ("studies.inputs", ["--meta_epochs", "0"], "--meta_epochs is 0"),
        ("studies.inputs", ["--judge_steps", "0"], "--judge_steps is 0"),
        ("studies.transfer", ["--tasks", "digits-mlp-lora4"], "--tasks: there is no task 'digits-mlp-lora4'"),
        ("studies.transfer", ["--steps", "5"], "--steps is 5, expected at least the 10 steps"),
        ("studies.transfer", ["--cache", "afile"], "--cache is afile, a file"),
        ("studies.unroll", ["--task", "nonsense"], "--task: there is no task 'nonsense'"),
        ("studies.unroll", ["--unroll_lengths", "5", "1"], "--unroll_lengths is 1"),
        ("studies.unroll", ["--inner_steps", "5"], "--inner_steps has 5, expected at least the unroll length"),
        ("figures", ["nowhere.json"], "there is no file nowhere.json"),
        ("gpu", ["--smoke", "--data", "empty"], "looked for empty/train.csv"),
        ("gpu_vision", ["--data", "nowhere"], "looked for nowhere/train.parquet"),
        ("gpu_vision", ["--data", "embedded", "--processes", "0"], "--processes is 0"),
        ("gpu_vision", ["--data", "embedded", "--set", "nonsense", "a=1"], "expected a job of resnet18"),
        ("gpu_vision", ["--data", "embedded", "--set", "resnet8", "a"], "--set resnet8 has 'a', expected NAME=VALUE"),
        ("gpu_vision", ["--data", "embedded", "--set", "resnet8", "dim=0"], "--dim is 0"),
        ("gpu_vision", ["--data", "embedded", "--set", "resnet8", "nonsense=1"], "'--nonsense', '1'"),
        ("meta_processes", ["--rounds", "0"], "--rounds is 0"),
        ("optimizer_step", ["--json", "x"], "--json is x"),
    ],
)
def test_flags_of_scripts(name, words, message):
    refused(name, words, message)


def test_good_flags_pass(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(gpt2_e2e.Recipe, "run", lambda self: made.update(recipe=self.recipe, args=self.args))
    LSTMRule().save_pretrained(tmp_path / "rule")
    words = "--seeds 1 --dim 1 --snapshots 2 --max_steps 1 --eval_steps 1 --logging_steps 1 --meta_epochs 1 --use_cpu"
    words += " --inner_steps 2 --unroll_length 2 --train_rows 1 --eval_rows 1 --trajectory_learning_rates 1e-30 3"
    words += " --learning_rate 1.0 --sl2o_average 0 --max_grad_norm 0 --lr_scheduler_type cosine_with_min_lr"
    kwargs = ["--lr_scheduler_kwargs", json.dumps({"min_lr": 0.1}), "--rule", str(tmp_path / "rule")]
    gpt2_e2e.main([*words.split(), *kwargs, "--output_dir", str(tmp_path / "new" / "out")])
    assert made["recipe"].seeds == 1 and made["args"].eval_steps == 1
    gpt2_e2e.main([*words.split(), *kwargs, "--arms", "adamw", "--subspace", "lora", "--weight_decay", "0.1"])
    assert made["args"].weight_decay == 0.1
    parsed = plans.parse(["--rule", "default-lora", "--save_to", str(tmp_path / "rule"), "--momenta", "0"])
    assert parsed.rule == "default-lora"
    options = gpu_vision.options_of(["--data", "embedded", "--set", "resnet8", "dim=3", "rules=default a=b"])
    assert options.set == [["resnet8", "dim=3", "rules=default a=b"]]


def test_a_rule_that_does_not_say_how_it_was_made_is_said_at_the_start(tmp_path):
    LSTMRule().save_pretrained(tmp_path / "rule")
    save_json(tmp_path / "rule" / "provenance.json", {"stages": 3})
    refused("gpt2_e2e", ["--use_cpu", "--rule", str(tmp_path / "rule")], "--rule is .*provenance.json does not say")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes/gpt2_e2e.py", "--seeds", "0"], "gpt2_e2e.py: error: --seeds is 0, expected a whole number"),
        (["recipes/meta_train.py", "--tasks", "nonsense"], "meta_train.py: error: --tasks: there is no task"),
    ],
)
def test_on_the_command_line_it_is_one_line(words, said):
    out = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = out.stderr.strip().splitlines()
    assert out.returncode == 2 and lines[-1].startswith(said) and "Traceback" not in out.stderr, out.stderr[-2000:]


def test_other_errors_keep_their_traceback(capsys):
    def ours():
        raise AttributeError("a mistake of ours")

    with pytest.raises(AttributeError):
        script.run_script(ours)
    with pytest.raises(ValueError, match="invalid literal"):
        script.run_script(lambda: int("x"))
    with pytest.raises(SystemExit) as ended:
        script.run_script(lambda: checks.check_flags({"dim": 0}))
    assert ended.value.code == 2
    assert "error: --dim is 0, expected a whole number of at least 1" in capsys.readouterr().err
