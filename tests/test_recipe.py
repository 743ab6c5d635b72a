"""recipes/gpt2_e2e.py at toy size: all stages and arms, kills and restarts, every subspace, bad data."""

import copy
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback

from hf_sl2o import Basis, Rule, SL2OTrainer, SL2OTrainingArguments
from hf_sl2o.experiments import arguments, meta_stage, training_arguments
from hf_sl2o.experiments import comparison as pipeline
from hf_sl2o.experiments.curves import mean_steps_to, steps_to
from hf_sl2o.experiments.data.e2e import E2EDataset, collate, load_rows, load_tokenizer, train_tokenizer
from hf_sl2o.experiments.data.e2e_embedded import write_csv
from hf_sl2o.experiments.kept import keys
from hf_sl2o.experiments.kept import run as kept_run
from hf_sl2o.experiments.table import table
from hf_sl2o.foundation.files import load_json
from recipes import gpt2_e2e

SMALL = """--train_rows 300 --eval_rows 40 --trajectory_steps 30 --snapshots 15 --dim 6
--trajectory_learning_rates 0.01 --meta_epochs 2 --inner_steps 20 --max_steps 6 --eval_steps 2
--logging_steps 2 --save_steps 2 --quick_grid --per_device_train_batch_size 8 --use_cpu""".split()
ROOT = Path(__file__).parent.parent
ALL_ARMS = set(gpt2_e2e.ARMS)


def recipe(folder, *flags):
    return gpt2_e2e.main([*SMALL, "--output_dir", str(folder), *flags])


def timeless(value):
    """Without what differs between equal runs."""
    if isinstance(value, dict):
        return {
            k: timeless(v) for k, v in value.items() if "seconds" not in k and k not in ("peak_bytes", "environment")
        }
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return folder, recipe(folder, "--seeds", "2")


def test_comparison_has_what_the_documentation_says(finished):
    folder, result = finished
    assert json.loads((folder / "comparison.json").read_text())["runs"].keys() == result["runs"].keys() == ALL_ARMS
    for name, run in result["runs"].items():
        assert {"learning_rate", "seeds", "train_loss", "eval", "final_eval_loss", "seconds", "peak_bytes"} <= set(run)
        assert len(run["seeds"]) == 2 == len(run["eval_per_seed"]) and run["eval"][0][0] == 0, name
        assert [step for step, _ in run["eval"]][-1] == (30 if name == "adamw" else 6)
        final = {(units, lr): curve[-1][1] for units, lr, curve in run["grid"]}
        finalists = {(units, lr): mean for units, lr, mean in run["finalists"]}
        assert max(final[choice] for choice in finalists) <= sorted(final.values())[:2][-1]  # the two best of the grid
        assert min(finalists.values()) == finalists[run["units"], run["learning_rate"]] == run["final_eval_loss"]
        assert list((folder / name).glob("checkpoint-*")), name
    assert set(result["steps_to"]) == {"adamw_orthonormal_at_300", "adamw_whitened_final"}
    for entry in result["steps_to"].values():
        assert set(entry["steps"]) == ALL_ARMS and entry["target"] > 0
    assert result["amortised"]["trajectory"] == 30
    assert result["amortised"]["meta_training"] == (2 + 3) * 20  # two episodes, three validations
    assert result["environment"]["versions"]["torch"] and (folder / "comparison.png").stat().st_size > 10_000
    first = {run["eval"][0][1] for run in result["runs"].values()}
    assert max(first) - min(first) < 1e-6  # all arms start from the same weights


def test_checkpoints_load_with_plain_transformers(finished):
    folder, result = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "sl2o" / "checkpoint-6")
    tokenizer = AutoTokenizer.from_pretrained(folder / "sl2o" / "checkpoint-6")
    rows = load_rows("embedded", "validation", 40)
    model.eval()
    with torch.no_grad():
        batch = collate(E2EDataset(rows, tokenizer).examples)
        loss = float(model(**batch).loss)
    assert loss == pytest.approx(result["runs"]["sl2o"]["eval_per_seed"][0][-1][1], rel=1e-4)
    saved = load_file(folder / "sl2o" / "checkpoint-6" / "coefficients.safetensors")
    assert saved["coefficients"].shape == (6,)


def test_a_second_start_runs_nothing_again(finished, monkeypatch, capsys):
    folder, result = finished

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    for target in (SL2OTrainer, meta_stage.MetaTrainer):
        monkeypatch.setattr(target, "train", refuse)
    monkeypatch.setattr(pipeline, "fit_basis", refuse)
    again = recipe(folder, "--seeds", "2")
    assert timeless(again) == timeless(result)
    assert "[meta] done before, same settings" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="trained again"):
        recipe(folder, "--seeds", "2", "--inner_steps", "10")


@pytest.mark.parametrize("gone", ["basis", "rule", "snapshot and basis", "trajectory and basis", "run.json", "stage"])
def test_what_somebody_deleted_is_made_anew(finished, tmp_path, capsys, gone):
    folder, result = finished
    out = shutil.copytree(folder, tmp_path / "out")
    (trajectory,) = (out / "adamw" / "runs").glob("*/trajectory")
    if "basis" in gone:
        shutil.rmtree(out / "basis")
    if gone == "rule":
        (next((out / "rule").iterdir()) / "model.safetensors").unlink()
    if "snapshot" in gone:
        next(trajectory.glob("snapshot-*8.safetensors")).unlink()
    if "trajectory" in gone:
        shutil.rmtree(trajectory)
    if gone == "run.json":
        (trajectory.parent / "run.json").write_text("[]")
    if gone == "stage":
        (out / "stages" / "extract.json").write_text("{")
    assert timeless(recipe(out, "--seeds", "2")) == timeless(result)
    assert "made anew" in capsys.readouterr().out


def test_another_basis_in_the_place_of_the_fitted_one_is_refused(finished, tmp_path):
    folder, _ = finished
    out = shutil.copytree(folder, tmp_path / "out")
    basis = Basis.from_pretrained(out / "basis")
    sizes = {path.name: path.stat().st_size for path in (out / "basis").iterdir()}
    for part in basis._matrices:
        part.neg_()
    basis.save_pretrained(out / "basis")
    assert {path.name: path.stat().st_size for path in (out / "basis").iterdir()} == sizes
    with pytest.raises(ValueError, match="basis holds another basis than the one that was fitted there"):
        recipe(out, "--seeds", "2")


def test_killed_anywhere_it_goes_on_to_the_same_result(finished, tmp_path, monkeypatch):
    """Kills in the trajectory, in meta-training, in an arm, and between a checkpoint and the end of a run."""
    _, result = finished
    steps = {"left": 0}

    class Killed(BaseException):
        pass

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps["left"] -= 1
            if steps["left"] == 0:
                raise Killed

    original = kept_run.Bar
    monkeypatch.setattr(kept_run, "Bar", lambda: Killer())
    meta_step = meta_stage.MetaTrainer._meta_step
    meta_steps = {"left": 3}

    def dying_meta_step(self, **kwargs):
        meta_steps["left"] -= 1
        if meta_steps["left"] == 0:
            raise Killed
        return meta_step(self, **kwargs)

    monkeypatch.setattr(meta_stage.MetaTrainer, "_meta_step", dying_meta_step)
    kills = 0
    for left in (13, 10_000, 5, 20):
        steps["left"] = left
        try:
            recipe(tmp_path, "--seeds", "2")
        except Killed:
            kills += 1
    assert kills == 4
    monkeypatch.setattr(kept_run, "Bar", original)
    assert timeless(recipe(tmp_path, "--seeds", "2")) == timeless(result)


def test_the_seconds_of_a_run_that_is_gone_on_with_count_on(tmp_path):
    path, process = tmp_path / "run.json", SimpleNamespace(is_world_process_zero=True)
    kept_run.Clock(path, "key", 1000.0).on_save(None, process, None)
    known = load_json(path)
    assert known["key"] == "key" and 1000 < known["spent"] < 1100
    assert kept_run.Clock(path, "key", known["spent"]).spent > known["spent"] > kept_run.Clock(path, "key", 0.0).spent


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.1}, {"label_smoothing_factor": 0.1}, {"data_seed": 3}, {"lr_scheduler_kwargs": {"a": 1}}],
)
def test_what_changes_a_run_is_in_the_key_it_is_kept_by(change):
    plain, other = (SL2OTrainingArguments("out", use_cpu=True, **options) for options in ({}, change))
    assert keys.stamp(arguments.training_settings(plain)) != keys.stamp(arguments.training_settings(other))
    assert keys.stamp(arguments.training_settings(plain)) == keys.stamp(
        arguments.training_settings(copy.deepcopy(plain))
    )


@pytest.mark.parametrize("subspace", ["pca-lora", "lora", "random"])
def test_other_subspaces(subspace, tmp_path):
    arms = ["sl2o", "subspace_adamw", "subspace_momentum", "adamw"]
    flags = ["--subspace", subspace, "--seeds", "1", "--meta_epochs", "1", "--save_rule", str(tmp_path / "rule")]
    result = recipe(tmp_path / "out", *flags, "--arms", *arms)
    expected = set(arms) - ({"subspace_adamw"} if subspace == "lora" else set())
    assert set(result["runs"]) == expected
    assert result["amortised"]["trajectory"] == (30 if subspace == "pca-lora" else 0)
    rule = Rule.from_pretrained(tmp_path / "rule")
    assert (rule.config.log_sign == 10.0) == (subspace == "lora")
    assert json.loads((tmp_path / "rule" / "provenance.json").read_text())["environment"]["versions"]
    if subspace != "random":
        assert (tmp_path / "out" / "sl2o" / "checkpoint-6" / "adapter_model.safetensors").is_file()


def test_the_key_of_what_is_kept_is_that_of_earlier_commits(tmp_path):
    flags = gpt2_e2e.RecipeArguments(train_rows=60, eval_rows=20)
    args = training_arguments(str(tmp_path), max_steps=10, use_cpu=True)
    made = gpt2_e2e.Recipe(flags, args)
    names = """per_device_train_batch_size gradient_accumulation_steps max_steps eval_steps logging_steps seed bf16
        fp16 lr_scheduler_type warmup_steps max_grad_norm adam_beta1 adam_beta2 adam_epsilon weight_decay
        label_smoothing_factor data_seed lr_scheduler_kwargs""".split()
    settings = {**{name: getattr(args, name) for name in names}, "processes": 1, "max_steps": None}
    identity = [["tiny", False, None], [split["fingerprint"] for split in made.data.values()]]
    parts = [["pca-full", 40, 4, 1200, 60], identity, settings, keys.digest(*made.start.parameters())]
    text = json.dumps(parts, sort_keys=True, default=str)
    assert made.key == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert made.arm_key("adamw", made.arms["adamw"]) == ["adamw"]
    other = gpt2_e2e.Recipe(flags, training_arguments(str(tmp_path), max_steps=10, use_cpu=True, seed=1))
    assert made.key != other.key


def test_real_architecture_from_its_config(tmp_path):
    rows = load_rows("embedded", "train", 50)
    train_tokenizer(rows, 400).save_pretrained(tmp_path / "tokenizer")
    args = gpt2_e2e.RecipeArguments(model="gpt2", from_scratch=True, tokenizer=str(tmp_path / "tokenizer"))
    settings = training_arguments(str(tmp_path), max_steps=10, use_cpu=True)
    args.train_rows, args.eval_rows = 20, 10
    model = gpt2_e2e.Recipe(args, settings).start
    assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (12, 768, 400)


def test_bad_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for .*train.csv"):
        recipe(tmp_path / "out", "--data", str(tmp_path / "nothing"))
    write_csv(tmp_path / "csv", train=20, validation=5)
    (tmp_path / "csv" / "validation.csv").write_text("mr,ref\n")
    with pytest.raises(ValueError, match="validation.csv has no rows"):
        recipe(tmp_path / "out", "--data", str(tmp_path / "csv"))
    (tmp_path / "csv" / "train.csv").write_text("mr,sentence\na,b\n")
    with pytest.raises(ValueError, match=r"train.csv has the columns \['mr', 'sentence'\], and lacks 'ref'"):
        recipe(tmp_path / "out", "--data", str(tmp_path / "csv"))
    with pytest.raises(ValueError, match="--subspace is 'pca'"):
        recipe(tmp_path / "out", "--subspace", "pca")
    with pytest.raises(ValueError, match="--arms has 'adam'"):
        recipe(tmp_path / "out", "--arms", "adam")


def test_hub_data_is_the_parquet_conversion(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"meaning_representation": "name[A]", "human_reference": "A."}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("hub", "validation", 2) == [{"mr": "name[A]", "ref": "A."}] * 2
    assert asked == [(("tuetschek/e2e_nlg",), {"split": "validation", "revision": "refs/convert/parquet"})]


def test_loss_is_on_the_sentence_only():
    rows = [{"mr": "name[A]", "ref": "A is a pub."}, {"mr": "name[Bluebell], food[French]", "ref": "Bluebell."}]
    tokenizer = train_tokenizer(rows, 300)
    dataset = E2EDataset(rows, tokenizer)
    for row, example in zip(rows, dataset.examples, strict=True):
        kept = [i for i in example["labels"].tolist() if i != -100]
        assert tokenizer.decode(kept) == f" {row['ref']}<eos>"
    batch = collate(dataset.examples)
    short = min(len(example["labels"]) for example in dataset.examples)
    assert batch["labels"].shape[0] == 2 and (batch["labels"][:, short:] == -100).any()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = train_tokenizer(load_rows("embedded", "train", 50), 300)
    tokenizer.save_pretrained(tmp_path / "whole")
    assert load_tokenizer(str(tmp_path / "whole")).pad_token == "<eos>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="--model is '.*endless', whose tokenizer has no end token"):
        load_tokenizer(str(tmp_path / "endless"), "model")


@pytest.mark.skipif(not os.environ.get("HF_SL2O_DATA"), reason="needs the released E2E CSVs: HF_SL2O_DATA=FOLDER")
def test_released_data():
    folder = str(Path(os.environ["HF_SL2O_DATA"]) / "e2e_nlg")
    rows = load_rows(folder, "validation")
    assert len(rows) > 4000 and len({row["mr"] for row in rows}) > 500
    dataset = E2EDataset(rows[:200], train_tokenizer(load_rows(folder, "train", 2000)))
    assert len(dataset) == 200


def test_steps_and_table():
    curve = [[0, 3.0], [10, 2.0], [20, 1.0]]
    assert steps_to(curve, 2.0) == 10 and steps_to(curve, 0.5) is None
    assert steps_to(curve, float("inf")) is steps_to(curve, float("nan")) is None  # of what diverged
    assert mean_steps_to([curve, [[0, 1.5], [10, 1.0]]], 1.5) == 10 and mean_steps_to([curve, [[0, 9.0]]], 1.5) is None
    run = {"learning_rate": 1.0, "final_eval_loss": 1.0, "seconds": 2.0, "state_bytes": 1000}
    comparison = {"runs": {"a": run, "b": run}, "steps_to": {"x": {"target": 1.0, "steps": {"a": None, "b": 10}}}}
    lines = table(comparison).splitlines()
    assert lines[2].startswith("| b") and "never" in lines[3] and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("accelerate", [False, True])
def test_runs_as_a_script(accelerate):
    config = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command = [sys.executable, *(config if accelerate else []), "recipes/gpt2_e2e.py", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "--subspace" in out.stdout and "--learning_rate" in out.stdout, out.stderr[-2000:]


def in_two_processes(name, words, folder):
    """Runs a recipe; returns its comparison.json and what it printed."""
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*head, f"recipes/{name}.py", *words, "--output_dir", str(folder), "--ddp_backend", "gloo"]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads((folder / "comparison.json").read_text()), out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_cifar", "resnet_cifar"])
def test_two_processes_have_the_losses_of_one_with_their_batches(tmp_path, name):
    # Of evaluation batches of 16 each process has one, and none has to be filled up.
    words = """--train_rows 128 --validation_rows 32 --eval_rows 32 --per_device_eval_batch_size 16 --seeds 1 --dim 3
    --trajectory_steps 12 --snapshots 8 --max_steps 4 --eval_steps 2 --logging_steps 2 --save_strategy no
    --quick_grid --use_cpu""".split()
    if name == "vit_cifar":
        words += (
            "--subspace lora --base_steps 3 --trajectory_learning_rates 0.003 --arms adamw sl2o_default-lora".split()
        )
    else:
        words += "--arms momentum sl2o_default p_bfgs".split()
    two, _ = in_two_processes(name, [*words, "--per_device_train_batch_size", "8"], tmp_path / "two")
    module = importlib.import_module(f"recipes.{name}")
    one = module.main([*words, "--per_device_train_batch_size", "16", "--output_dir", str(tmp_path / "one")])
    assert set(two["runs"]) == set(one["runs"])
    assert (two["training"]["processes"], one["training"]["processes"]) == (2, 1)
    for arm in one["runs"]:
        for curve in ("train_loss", "eval"):
            values = [[value for _, value in of["runs"][arm][curve]] for of in (two, one)]
            # BatchNorm's statistics are those of a process' own batch, in training and when they are set anew
            assert values[0] == pytest.approx(values[1], rel=1e-4 if name == "vit_cifar" else 0.1), (arm, curve)


@pytest.mark.slow
def test_two_processes(tmp_path):
    words = [*SMALL, "--arms", "sl2o", "subspace_adamw", "--seeds", "1"]
    comparison, out = in_two_processes("gpt2_e2e", words, tmp_path)
    runs = comparison["runs"]
    assert set(runs) == {"sl2o", "subspace_adamw"} and runs["sl2o"]["eval"][-1][1] < runs["sl2o"]["eval"][0][1]
    assert out.stdout.count("| sl2o") == 1  # the table is printed by one process
