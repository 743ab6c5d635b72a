"""Learning rates that a user brings along: every way in trains."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_sl2o import (
    LearnedOptimizer,
    SL2OTrainer,
    SL2OTrainingArguments,
    build_optimizer,
)
from hf_sl2o.rules import load_rule
from hf_sl2o.training.build import SubspaceOptimizerFactory
from hf_sl2o.training.callbacks import unwrap_optimizer
from hf_sl2o.training.step_size import OPTIMIZERS, given_learning_rate, step_size

from .conftest import random_dense
from .step_size_cases import (
    ADAMS,
    NAMES,
    NO_NUMBERS,
    OWN,
    ROWS,
    Further,
    Larger,
    Mine,
    Net,
    Reward,
    Sft,
    X,
    arguments,
    loss_of,
    optimizer_of,
    rate_of,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("basis")
    random_dense(Net().named_parameters(), dim=12).save_pretrained(path)
    return path


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="hf_sl2o")

    def of_rates():
        return [record.getMessage() for record in caplog.records if "earning rate" in record.getMessage().lower()] + [
            record.getMessage() for record in caplog.records if "learning_rate" in record.getMessage()
        ]

    return of_rates


# What a rate means


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_from_a_twentieth_on_a_rate_is_taken_and_below_it_is_not(optim, momentum, said):
    own = OWN[optim]
    assert OPTIMIZERS[optim] == own
    edge = own / 20 * (1 - momentum)
    for lr in (edge, math.nextafter(edge, 1) if momentum == 0 else edge * 1.0001, edge * 1.01, own, 10 * own, 0.0, 0):
        assert step_size(optim, lr, momentum=momentum) == lr
    assert step_size(optim, None) == own and not said()
    for count, lr in enumerate((edge * 0.999, edge / 2, 1e-6, 1e-12, 5e-324), 1):
        assert step_size(optim, lr, momentum=momentum) == own
        assert len(said()) == count and f"{lr:g}" in said()[-1] and f"{own:g}" in said()[-1]


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("bad", [*NO_NUMBERS, -1e-9])
def test_no_rate_at_all(optim, bad):
    with pytest.raises(ValueError, match="learning rate is"):
        step_size(optim, bad)


def test_the_default_of_a_class_is_no_rate():
    for kind, default in ((TrainingArguments, 5e-5), (Sft, 2e-5), (Reward, 1e-4), (Further, 2e-5), (Larger, 0.5)):
        assert given_learning_rate(kind("out", use_cpu=True)) is None
        assert given_learning_rate(kind("out", use_cpu=True, learning_rate=default)) is None
        assert given_learning_rate(kind("out", use_cpu=True, learning_rate=default * 1.5)) == default * 1.5


# Every way in


KINDS = [TrainingArguments, Seq2SeqTrainingArguments, Sft, Reward, Further, SL2OTrainingArguments, Mine, Larger]


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_every_class(kind, optim, folder, caplog, said):
    for lr in (None, *ADAMS, 0.049 * OWN[optim]):
        caplog.clear()
        given = {} if lr is None else {"learning_rate": lr}
        assert rate_of(arguments(kind, optim, folder, **given)) == OWN[optim]
        assert len(said()) == 1, (lr, said())  # once
    for lr in (0.05 * OWN[optim], 0.7, 3.0, 0.0):
        caplog.clear()
        assert rate_of(arguments(kind, optim, folder, learning_rate=lr)) == lr
        assert not said()


@pytest.mark.parametrize("kind", [Sft, SL2OTrainingArguments, Mine])
def test_all_of_them_train(kind, folder, said):
    losses = {}
    for name, given in (("own", {"learning_rate": 1.0}), ("adam's", {"learning_rate": 2e-5}), ("none", {})):
        model = Net()
        Trainer(model, arguments(kind, "sl2o", folder, max_steps=20, **given), train_dataset=ROWS).train()
        losses[name] = loss_of(model)
    assert losses["own"] == losses["adam's"] == losses["none"] < 0.9 * loss_of(Net())
    # what it would be if it were taken literally, by a rule that does not find its own scale
    model = Net()
    optimizer = LearnedOptimizer(model.parameters(), load_rule("paper-cnn", with_basis=False), lr=2e-5)
    for _ in range(20):
        optimizer.zero_grad()
        model(X, torch.sin(2 * X[:, :4]))["loss"].backward()
        optimizer.step()
    assert loss_of(model) > 0.99 * loss_of(Net())


@pytest.mark.parametrize("optim", NAMES)
def test_optim_args_and_the_factory(optim, folder, caplog, said):
    basis = {} if optim == "sl2o" else {"basis": str(folder)}
    for lr in ADAMS:
        for build in (
            lambda lr: optimizer_of(arguments(TrainingArguments, optim, folder, f"lr={lr}", learning_rate=0.5)),
            lambda lr: build_optimizer(Net(), optim, lr=lr, **basis),
            lambda lr: build_optimizer(Net().named_parameters(), optim, lr=lr, **basis),
            lambda lr: SubspaceOptimizerFactory()(Net(), optim=optim, lr=lr, **basis),
            lambda lr: optimizer_of(
                arguments(TrainingArguments, "adamw_torch", folder, ""),
                optimizer_cls_and_kwargs=(SubspaceOptimizerFactory, {"optim": optim, "lr": lr, **basis}),
            ),
        ):
            caplog.clear()
            args = build(lr)
            assert {group["lr"] for group in args.param_groups} == {OWN[optim]}
            assert len(said()) == 1
    caplog.clear()
    for lr in (0.5, 2.0):
        assert rate_of(arguments(TrainingArguments, optim, folder, f"lr={lr}", learning_rate=2e-5)) == lr
        assert build_optimizer(Net(), optim, lr=lr, **basis).param_groups[0]["lr"] == lr
    assert not said()


def test_optim_args_win_over_the_arguments_and_nothing_else_is_said(folder, said):
    assert rate_of(arguments(SL2OTrainingArguments, "sl2o", folder, "lr=0.5")) == 0.5
    assert not said()


def test_momentum_counts_wherever_it_is_given(folder):
    """SGD with momentum 0.9 moves ten times as far: 0.01 is a rate near its own."""
    plain = arguments(TrainingArguments, "subspace_sgd", folder, "momentum=0.9", learning_rate=0.01)
    field = arguments(SL2OTrainingArguments, "subspace_sgd", folder, sl2o_momentum=0.9, learning_rate=0.01)
    assert rate_of(plain) == rate_of(field) == 0.01
    below = arguments(TrainingArguments, "subspace_sgd", folder, "momentum=0.9", learning_rate=0.0049)
    assert rate_of(below) == 1.0
    assert rate_of(arguments(TrainingArguments, "subspace_sgd", folder, learning_rate=0.01)) == 1.0
    words = arguments(SL2OTrainingArguments, "subspace_sgd", folder, "momentum=0.9", learning_rate=0.01)
    assert rate_of(words) == 0.01


@pytest.mark.parametrize("kind", [TrainingArguments, Sft, SL2OTrainingArguments])
@pytest.mark.parametrize("text, expected", [("2e-5", 1.0), ("1.0e-6", 1.0), ("5e-1", 0.5), ("0.05", 0.05)])
def test_the_command_line_and_files(kind, text, expected, tmp_path):
    options = {"output_dir": str(tmp_path), "optim": "sl2o", "use_cpu": True, "report_to": "none"}
    parser, file = HfArgumentParser(kind), tmp_path / "args"
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert rate_of(*parser.parse_args_into_dataclasses([*flags, "--learning_rate", text])) == expected
    assert rate_of(*parser.parse_dict({**options, "learning_rate": float(text)})) == expected
    file.write_text(json.dumps({**options, "learning_rate": float(text)}))
    assert rate_of(*parser.parse_json_file(str(file))) == expected
    # in YAML 1.1 a number without a point is a string
    file.write_text(
        "".join(f"{key}: {str(value).lower()}\n" for key, value in {**options, "learning_rate": text}.items())
    )
    file.write_text(file.read_text().replace(str(tmp_path).lower(), str(tmp_path)))
    assert rate_of(*parser.parse_yaml_file(str(file))) == expected
    again = parser.parse_dict({**json.loads(kind(**options, learning_rate=float(text)).to_json_string())}, True)
    assert rate_of(*again) == expected


@pytest.mark.parametrize("kind", [TrainingArguments, Sft, SL2OTrainingArguments])
def test_a_rate_that_is_set_later(kind, folder, said):
    args = arguments(kind, "sl2o", folder, learning_rate=0.5)
    args.learning_rate = 3e-4
    assert rate_of(args) == 1.0 and len(said()) == 1
    args.learning_rate = 0.25
    assert rate_of(args) == 0.25 and len(said()) == 1
    args.learning_rate = math.nan
    with pytest.raises(ValueError, match="learning rate is nan"):
        rate_of(args)
    other = arguments(kind, "adamw_torch", folder)
    other.optim_args = None
    other.set_optimizer(name="sl2o", learning_rate=2e-5)
    assert rate_of(other) == 1.0
    other.set_optimizer(name="sl2o", learning_rate=0.5)
    assert rate_of(other) == 0.5
    other.set_training(learning_rate=1e-6)
    assert rate_of(other) == 1.0
    copy = dataclasses.replace(other, learning_rate=1e-5)
    assert rate_of(copy) == 1.0


def test_none_means_not_set(folder):
    for kind in (TrainingArguments, SL2OTrainingArguments):
        args = arguments(kind, "sl2o", folder, learning_rate=0.5)
        args.learning_rate = None
        assert rate_of(args) == 1.0


def test_switching_to_another_optimizer_does_not_take_our_rate_along(folder):
    args = SL2OTrainingArguments(str(folder / "out"), use_cpu=True, report_to="none")
    switched = dataclasses.replace(args, optim="adamw_torch")
    assert switched.learning_rate == 5e-5


@pytest.mark.parametrize("kind", [TrainingArguments, SL2OTrainingArguments])
def test_a_search_over_rates(kind, folder):
    """Any backend sets the arguments of each trial as `_hp_search_setup` does; 1e-6 to 1e-4 is the default space."""
    args = arguments(kind, "sl2o", folder, eval_strategy="steps", eval_steps=4)
    trainer = Trainer(args=args, model_init=lambda trial: Net(), train_dataset=ROWS, eval_dataset=ROWS)
    trainer.hp_search_backend, trainer.hp_space, found = HPSearchBackend.RAY, lambda trial: trial, []
    for rate in (1e-6, 5e-5, 1e-4, 0.5):
        trainer._hp_search_setup({"learning_rate": rate})
        trainer.train()  # makes model and optimizer anew
        found.append((unwrap_optimizer(trainer.optimizer).param_groups[0]["initial_lr"], loss_of(trainer.model)))
    assert [rate for rate, _ in found] == [1.0, 1.0, 1.0, 0.5]
    assert found[0][1] == found[1][1] == found[2][1] < loss_of(Net()) and found[3][1] != found[0][1]


def test_a_search_of_optuna(folder):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    args = arguments(TrainingArguments, "sl2o", folder, eval_strategy="steps", eval_steps=4)
    trainer = Trainer(args=args, model_init=lambda trial: Net(), train_dataset=ROWS, eval_dataset=ROWS)
    best = trainer.hyperparameter_search(
        direction="minimize", backend="optuna", n_trials=2, compute_objective=lambda metrics: metrics["eval_loss"],
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True)},
    )  # fmt: skip
    assert best.objective < loss_of(Net())


def test_configurations_of_trl(folder):
    trl = pytest.importorskip("trl")
    for kind in (trl.SFTConfig, trl.DPOConfig, trl.RewardConfig):
        args = kind(str(folder / "out"), optim="sl2o", use_cpu=True, report_to="none", bf16=False)
        assert args.learning_rate < 1e-3 and rate_of(args) == 1.0
        assert rate_of(dataclasses.replace(args, learning_rate=5e-6)) == 1.0
        assert rate_of(dataclasses.replace(args, learning_rate=0.5)) == 0.5


def test_trainers_of_other_kinds(folder):
    args = arguments(Reward, "sl2o", folder)
    assert rate_of(args, Seq2SeqTrainer) == 1.0
    for kind in (TrainingArguments, SL2OTrainingArguments):
        assert rate_of(arguments(kind, "sl2o", folder, learning_rate=1e-5), SL2OTrainer) == 1.0
    basis = random_dense(Net().named_parameters())
    args = arguments(TrainingArguments, "sl2o", folder, learning_rate=1e-5)
    assert rate_of(args, SL2OTrainer, basis=basis) == 1.0
    args = SL2OTrainingArguments(
        str(folder / "out"), optim="subspace_adamw", learning_rate=1e-5, use_cpu=True, report_to="none"
    )
    assert rate_of(args, SL2OTrainer, basis=basis) == 0.3


@pytest.mark.parametrize(
    "schedule, options, expected",
    [
        ("constant", {}, [1, 1, 1, 1]),
        ("linear", {}, [0.75, 0.5, 0.25, 0]),
        ("linear", {"warmup_steps": 2}, [0.5, 1, 0.5, 0]),
        ("cosine", {}, [(1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4)]),
        ("constant_with_warmup", {"warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 0.1}}, None),
        ("polynomial", {"lr_scheduler_kwargs": {"lr_end": 0.1, "power": 1.0}}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optim", ["sl2o", "subspace_adamw"])
def test_schedules_go_on_from_the_own_rate(optim, schedule, options, expected, folder):
    args = arguments(Sft, optim, folder, learning_rate=1e-5, lr_scheduler_type=schedule, **options)
    trainer = Trainer(Net(), args, train_dataset=ROWS)
    trainer.create_optimizer_and_scheduler(4)
    course = []
    for _ in range(4):
        trainer.optimizer.zero_grad()
        trainer.model(X[:16], torch.sin(2 * X[:16, :4]))["loss"].backward()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        course.append(trainer.lr_scheduler.get_last_lr()[0])
    if expected is None:
        assert course[-1] == pytest.approx(0.1) and course == sorted(course, reverse=True) and course[0] > 0.15
    else:
        assert course == pytest.approx([OWN[optim] * part for part in expected])
