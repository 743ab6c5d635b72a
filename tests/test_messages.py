"""What a user is told: about names, saved states of other optimizers, and what changes a result without an error."""

import logging
import shutil

import pytest
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sl2o import (
    BatchNormCallback,
    LSTMRule,
    RuleConfig,
    SL2OTrainer,
    SL2OTrainingArguments,
    build_optimizer,
)
from hf_sl2o.rules import SHIPPED_RULES, load_rule

from .conftest import Tokens, random_dense, tiny_gpt2


def arguments(folder, kind=TrainingArguments, **options):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "optim": "sl2o"}
    return kind(str(folder), **{**settings, **options})


# Names


@pytest.mark.parametrize("name", ["default", "default-lora", "paper-cnn", "paper-transformer"])
def test_a_shipped_rule_is_known_by_its_name_and_a_folder_goes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_rule(name, with_basis=False)
    assert shipped.fingerprint == load_rule(SHIPPED_RULES / name, with_basis=False).fingerprint
    LSTMRule(RuleConfig(hidden_size=3)).save_pretrained(name)
    assert load_rule(name, with_basis=False).config.hidden_size == 3


def test_an_unknown_rule_is_answered_with_those_that_ship(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="The rules that ship: default, default-lora, paper-cnn"):
        load_rule("paper-transformers", with_basis=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.5}, "optim_args is {'lr': 0.5}, expected key=value pairs"),
        ("basis=", "optim_args has nothing after basis="),
        ("rule=,lr=1", "optim_args has nothing after rule="),
        ("lr=fast", "optim_args has lr='fast', expected a number"),
    ],
)
def test_optim_args_that_say_nothing(given, message, tmp_path):
    trainer = Trainer(tiny_gpt2(), arguments(tmp_path, optim_args=given), train_dataset=Tokens())
    with pytest.raises(ValueError, match=message):
        trainer.train()


# Another optimizer's state


@pytest.mark.parametrize("kind", [Trainer, SL2OTrainer])
@pytest.mark.parametrize("to", ["sl2o", "adamw_torch"])
def test_a_run_that_is_resumed_with_another_optim_says_what_to_do(kind, to, tmp_path):
    own = SL2OTrainingArguments if kind is SL2OTrainer else TrainingArguments
    saved = "adamw_torch" if to == "sl2o" else "sl2o"
    saving = {"save_strategy": "steps", "save_steps": 2}
    for optim, steps in ((saved, 2), (saved, 3)):  # the same optim goes on
        args = arguments(tmp_path, own, optim=optim, max_steps=steps, **saving)
        kind(tiny_gpt2(), args, train_dataset=Tokens()).train(resume_from_checkpoint=steps > 2)
    shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    trainer = kind(tiny_gpt2(), arguments(tmp_path, own, optim=to, max_steps=4, **saving), train_dataset=Tokens())
    messages = {
        "sl2o": "not one of LearnedOptimizer: the run was trained with another optim.* start a new run from the",
        "adamw_torch": "different number of parameter groups" if kind is Trainer else "start a new run from the",
    }
    with pytest.raises(ValueError, match=messages[to]):
        trainer.train(resume_from_checkpoint=True)


def test_a_resumed_run_says_that_it_keeps_its_rate(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = arguments(tmp_path, learning_rate=0.5, **saving)
    Trainer(tiny_gpt2(), first, train_dataset=Tokens()).train()
    for rate, told in ((0.5, 0), (0.8, 1)):
        caplog.clear()
        args = arguments(tmp_path, learning_rate=rate, max_steps=3)
        Trainer(tiny_gpt2(), args, train_dataset=Tokens()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        said = [r for r in caplog.records if "which it keeps" in r.getMessage()]
        assert len(said) == told, [r.getMessage() for r in caplog.records]


# What changes a result


def images(rows=32):
    torch.manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(i % 3)} for i in range(rows)]


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes))


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(num_labels=3, image_size=16, patch_size=8, **sizes))


def told(caplog, text):
    return sum(text in record.getMessage() for record in caplog.records)


def test_running_statistics_without_their_callback_are_named(tmp_path, caplog):
    data = images()
    callback = BatchNormCallback([{"pixel_values": torch.stack([row["pixel_values"] for row in data[:8]])}])
    for model, callbacks, expected in ((resnet(), [], 1), (resnet(), [callback], 0), (vit(), [], 0)):
        caplog.clear()
        args = arguments(tmp_path, remove_unused_columns=False)
        Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
        assert told(caplog, "add callbacks=[BatchNormCallback(batches)]") == expected


@pytest.mark.parametrize(("build", "factor"), [(resnet, 4.0), (vit, 1.0)])
def test_accumulation_with_models_that_drop_the_count_is_named_where_it_matters(build, factor, tmp_path, caplog):
    """The factor is measured on the gradient: the same 16 images in one batch and in four."""
    data, gradients = images(16), []
    for size, parts in ((16, 1), (4, 4)):

        class Keep(torch.optim.SGD):
            def step(self, closure=None):
                gradients.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))

        model = build().eval()
        model.train = lambda mode=True: None  # so that BatchNorm does not see the size of a batch
        args = arguments(
            tmp_path, optim="sgd", max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            remove_unused_columns=False, max_grad_norm=0.0, train_sampling_strategy="sequential",
        )  # fmt: skip
        optimizer = Keep(model.parameters(), lr=0.1)
        Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    torch.testing.assert_close(gradients[1], factor * gradients[0], rtol=1e-3, atol=1e-5)
    basis = random_dense(build().named_parameters())
    basis.save_pretrained(tmp_path / "basis")
    for optim, clip, accumulated, expected in (
        ("subspace_sgd", 0.0, 4, 1),
        ("subspace_adamw", 1.0, 4, 1),
        ("subspace_adamw", 0.0, 4, 0),
        ("subspace_sgd", 0.0, 1, 0),
    ):
        caplog.clear()
        args = arguments(
            tmp_path / "run", optim=optim, optim_args=f"basis={tmp_path / 'basis'}", max_grad_norm=clip,
            gradient_accumulation_steps=accumulated, max_steps=1, remove_unused_columns=False,
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            Trainer(build(), args, train_dataset=data).train()
        assert told(caplog, "drops the number of items of a batch") == (expected if factor > 1 else 0)


def test_a_model_with_nothing_to_train_is_said():
    model = tiny_gpt2().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        build_optimizer(model, total_steps=3)
    assert build_optimizer(tiny_gpt2(), total_steps=3).param_groups
