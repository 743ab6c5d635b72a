"""recipes/vit_cifar.py at toy size: the three subspaces, the official settings, models from a folder, bad flags."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_sl2o import Basis, IdentityBasis, Rule
from hf_sl2o.experiments.levels import meta_training_steps
from hf_sl2o.rules import SHIPPED_RULES
from recipes import vit_cifar

SMALL = """--train_rows 128 --validation_rows 32 --eval_rows 32 --trajectory_steps 12 --snapshots 8 --dim 3
--meta_epochs 1 --inner_steps 10 --max_steps 4 --eval_steps 2 --logging_steps 2 --save_steps 2 --quick_grid
--per_device_train_batch_size 16 --use_cpu --seeds 1 --trajectory_learning_rates 0.003 --base_steps 3""".split()


def recipe(folder, *flags):
    return vit_cifar.main([*SMALL, "--output_dir", str(folder), *flags])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Checkpoints as the Hub has them, with 1,000 classes, smaller."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"image_size": 48, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "num_labels": 1000}  # fmt: skip
    torch.manual_seed(0)
    for name, model in (
        ("deit", DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes))),
        ("vit", ViTForImageClassification(ViTConfig(**sizes))),
    ):
        model.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("subspace", ["lora", "pca-lora", "pca-full"])
def test_all_stages(tmp_path, subspace):
    result = recipe(tmp_path, "--subspace", subspace)
    shipped = "sl2o_default-lora" if subspace == "lora" else "sl2o_default"
    expected = {*vit_cifar.ARMS, shipped} - ({"subspace_adamw"} if subspace == "lora" else set())
    assert set(result["runs"]) == expected
    for name, run in result["runs"].items():
        full = name.startswith("adamw") and subspace != "lora"
        assert run["eval"][-1][0] == (12 if full else 4), name
        assert len(run["test_accuracy_per_seed"]) == 1
    assert set(result["steps_to_accuracy"]) == {"adamw_best", "adamw_best_less_0.1_points"}
    config = Rule.from_pretrained(next((tmp_path / "rule").iterdir())).config
    assert (config.log_sign, config.output_scale) == ((10.0, 0.01) if subspace == "lora" else (None, 1.0))
    saved = {path.name for path in (tmp_path / "sl2o" / "checkpoint-4").iterdir()}
    assert ("adapter_model.safetensors" in saved) == ("lora" in subspace) and "coefficients.safetensors" in saved


def test_accumulated_batches_are_one_batch(tmp_path):
    """Also of the sums that a Trainer makes over what it accumulates and over processes."""
    flags = ["--subspace", "lora", "--arms", "adamw", "--save_strategy", "no"]
    whole = recipe(tmp_path, *flags)["runs"]["adamw"]
    parts = recipe(
        tmp_path, *flags, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"
    )["runs"]["adamw"]  # fmt: skip
    for name in ("train_loss", "eval"):
        assert [value for _, value in parts[name]] == pytest.approx([value for _, value in whole[name]], rel=1e-4)
    outputs = SimpleNamespace(logits=torch.randn(8, 3))
    labels, halves = torch.arange(8) % 3, (slice(0, 3), slice(3, 8))
    mean = torch.nn.functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(vit_cifar.classification_loss(outputs, labels), mean)
    found = [
        vit_cifar.classification_loss(SimpleNamespace(logits=outputs.logits[half]), labels[half], torch.tensor(8))
        for half in halves
    ]
    torch.testing.assert_close(sum(found), mean)


def test_a_recorded_run_that_diverges_is_one_that_no_other_is_behind(tmp_path):
    flags = ["--subspace", "pca-full", "--arms", "adamw", "--trajectory_learning_rates"]
    result = recipe(tmp_path, *flags, "0.003", "1e30")
    assert result["runs"]["adamw"]["learning_rate"] == 0.003
    assert [rate for _, rate, _ in result["runs"]["adamw"]["grid"]] == [0.003, 1e30]
    assert Basis.from_pretrained(tmp_path / "basis").dim == 3
    with pytest.raises(ValueError, match="every run of adamw diverged"):
        recipe(tmp_path / "none", *flags, "1e30")


def test_an_arm_in_the_subspace_that_diverges_ends_as_a_run_that_no_other_is_behind(tmp_path, monkeypatch):
    """The optimizer raises after three gradients that are not finite; the table is written all the same."""
    diverging = vit_cifar.Arm("subspace_sgd", vit_cifar.grid(std=(0.1, 1e30)))
    monkeypatch.setitem(vit_cifar.ARMS, "subspace_sgd", diverging)
    flags = "--subspace lora --arms adamw subspace_sgd --max_steps 8 --eval_steps 2 --logging_steps 2".split()
    runs = recipe(tmp_path, *flags)["runs"]
    assert runs["subspace_sgd"]["learning_rate"] == 0.1 and len(runs["subspace_sgd"]["grid"]) == 2
    finite, diverged = (curve for _, _, curve in runs["subspace_sgd"]["grid"])
    assert [step for step, _ in finite] == [step for step, _ in diverged] == [0, 2, 4, 6, 8]
    assert math.isnan(diverged[-1][1]) and math.isfinite(finite[-1][1])
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    recipe(tmp_path, *flags)  # not run again
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_more_rows_in_a_batch_than_there_are_is_an_error_and_no_endless_loop(tmp_path):
    words = "--subspace lora --arms sl2o --gradient_accumulation_steps 1000".split()
    with pytest.raises(RuntimeError, match="a batch of 16000 images"):
        recipe(tmp_path, *words)


def test_a_wider_grid_runs_only_what_is_new(tmp_path):
    flags = ["--subspace", "lora", "--arms", "adamw", "sl2o_default-lora"]
    narrow = recipe(tmp_path, *flags)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    wide = recipe(tmp_path, *flags, "--trajectory_learning_rates", "0.003", "0.01")
    assert {path: path.stat().st_mtime_ns for path in made} == made and len(made) == 2
    assert len(list(tmp_path.rglob("run.json"))) == 3
    assert wide["runs"]["adamw"]["grid"][0] == narrow["runs"]["adamw"]["grid"][0]
    assert [lr for _, lr, _ in wide["runs"]["adamw"]["grid"]] == [0.003, 0.01]
    assert not (tmp_path / "rule").exists() and wide["amortised"]["total"] == 0  # no arm needs a rule of this task
    assert wide["amortised"]["rules"] == {"sl2o_default-lora": meta_training_steps(SHIPPED_RULES / "default-lora")}
    longer = recipe(tmp_path, *flags, "--max_steps", "6")
    assert [run["eval"][-1][0] for run in longer["runs"].values()] == [6, 6]
    assert all(path.stat().st_mtime_ns != before for path, before in made.items())


@pytest.mark.parametrize(
    ("name", "factors", "head"), [("deit", {"q_proj", "v_proj", "query", "value"}, False),
                                  ("vit", {"q_proj", "k_proj", "v_proj", "query", "key", "value"}, True)],
)  # fmt: skip
def test_the_official_settings_on_a_checkpoint(tiny, tmp_path, monkeypatch, capsys, name, factors, head):
    parser_flags = [*SMALL, "--output_dir", str(tmp_path), "--model", str(tiny / name)]
    made = {}
    monkeypatch.setattr(vit_cifar.Recipe, "run", lambda self: made.update(recipe=self))
    vit_cifar.main(parser_flags)
    of = made["recipe"]
    said = capsys.readouterr().out
    assert "has 1000 classes, the data 10: it is drawn anew" in said and ("stays as drawn" in said) != head
    trained = [name for name, p in of.start.named_parameters() if p.requires_grad]
    lora = [name for name in trained if "lora_" in name]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora} <= factors
    assert len(lora) == 2 * 2 * (3 if head else 2)  # layers, A and B, matrices
    assert bool([name for name in trained if "classifier" in name]) == head
    config = of.start.peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 32)
    assert of.rule_config().output_scale == 1e-4 and (of.rule_config().log_sign is None) == head
    batch = of.train_set.__getitems__([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert batch["pixel_values"].abs().max() <= 1.0 + 1e-6  # the checkpoint's mean and deviation of 0.5
    with torch.no_grad():
        out = of.start(pixel_values=batch["pixel_values"])
    assert out.logits.shape == (2, 10)
    if not head:  # distilled: the mean of two heads
        torch.testing.assert_close(out.logits, (out.cls_logits + out.distillation_logits) / 2)
    assert isinstance(of.load_basis(), IdentityBasis)


def test_a_checkpoint_with_another_number_of_classes_does_not_fit_a_basis(tmp_path):
    recipe(tmp_path, "--subspace", "pca-full", "--arms", "subspace_adamw")
    basis = Basis.from_pretrained(tmp_path / "basis")
    model = AutoModelForImageClassification.from_config(
        DeiTConfig(image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                   intermediate_size=256, num_labels=7, architectures=["DeiTForImageClassificationWithTeacher"])
    )  # fmt: skip
    with pytest.raises(ValueError, match="classifier"):
        basis.layout.select(DeiTForImageClassificationWithTeacher(model.config).named_parameters())


def test_the_base_and_the_adapters_see_different_classes(tmp_path, monkeypatch):
    seen = []
    original = vit_cifar.batches

    def watched(images, labels, *rest):
        seen.append(set(labels.tolist()))
        return original(images, labels, *rest)

    monkeypatch.setattr(vit_cifar, "batches", watched)
    made = {}
    monkeypatch.setattr(vit_cifar.Recipe, "run", lambda self: made.update(recipe=self))
    recipe(tmp_path)
    of = made["recipe"]
    assert seen == [set(range(7))]
    for split in (of.train_set, of.validation_set, of.test_set):
        assert set(split.labels.tolist()) == {7, 8, 9}
    (base,) = tmp_path.glob("base-*.safetensors")
    before = base.stat().st_mtime_ns
    recipe(tmp_path)  # the base is made once
    assert len(seen) == 1 and base.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subspace", "random"], "expected lora, pca-lora, or pca-full"),
        (["--arms", "adam"], "--arms has 'adam'"),
        (["--rules", "x=nowhere"], "nowhere"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipe(tmp_path, *flags)
