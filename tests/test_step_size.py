"""Learning rates that a user brings along: every way in trains, and no number that is none is taken."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_sl2o import (
    LearnedOptimizer,
    LSTMRule,
    RuleConfig,
    SL2OTrainer,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    build_optimizer,
)
from hf_sl2o.rules import load_rule
from hf_sl2o.training.build import SubspaceOptimizerFactory
from hf_sl2o.training.callbacks import unwrap_optimizer
from hf_sl2o.training.step_size import OPTIMIZERS, given_learning_rate, step_size

from .conftest import random_dense

OWN = {"sl2o": 1.0, "subspace_adamw": 0.3, "subspace_sgd": 1.0}
NAMES = sorted(OWN)
ADAMS = [1e-6, 2e-5, 3e-4, 1e-3]
NO_NUMBERS = [math.nan, math.inf, -math.inf, -1.0]


@dataclasses.dataclass
class Sft(TrainingArguments):
    learning_rate: float = 2e-5


@dataclasses.dataclass
class Reward(Seq2SeqTrainingArguments):
    learning_rate: float = dataclasses.field(default=1e-4, metadata={"help": "of rewards"})


@dataclasses.dataclass
class Further(Sft):
    beta: float = 0.1


@dataclasses.dataclass
class Mine(SL2OTrainingArguments):
    learning_rate: float | None = 1e-4


@dataclasses.dataclass
class Larger(TrainingArguments):
    learning_rate: float = 0.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, labels=None):
        y = self.b(torch.tanh(self.a(x)))
        return {"loss": (y - labels).square().mean(), "logits": y}


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
ROWS = [{"x": x, "labels": torch.sin(2 * x[:4])} for x in X]


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


def arguments(kind, optim, folder, words="", **options):
    settings = {"max_steps": 4, "per_device_train_batch_size": 16, "use_cpu": True, "report_to": "none"}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "seed": 1}
    words = ",".join(part for part in ([] if optim == "sl2o" else [f"basis={folder}"]) + [words] if part)
    return kind(str(folder / "out"), optim=optim, optim_args=words or None, **{**settings, **options})


def optimizer_of(args, kind=Trainer, model=None, **objects):
    trainer = kind(Net() if model is None else model, args, train_dataset=ROWS, **objects)
    trainer.create_optimizer()
    return unwrap_optimizer(trainer.optimizer)


def rate_of(args, kind=Trainer, **objects):
    rates = {group["lr"] for group in optimizer_of(args, kind, **objects).param_groups}
    assert len(rates) == 1
    return rates.pop()


def loss_of(model):
    with torch.no_grad():
        return float(model(X, torch.sin(2 * X[:, :4]))["loss"])


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
    # what it would be if it were taken literally
    model = Net()
    optimizer = LearnedOptimizer(model.parameters(), load_rule(None, with_basis=False), lr=2e-5)
    for _ in range(20):
        optimizer.zero_grad()
        model(X, torch.sin(2 * X[:, :4]))["loss"].backward()
        optimizer.step()
    assert loss_of(model) > 0.999 * loss_of(Net())


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


# Numbers that are none


def accepted(make):
    """What `make` takes of NaN, the infinities and -1; it may refuse with a ValueError alone."""
    taken = []
    for value in NO_NUMBERS:
        try:
            make(value)
        except ValueError:
            continue
        taken.append(value)
    return taken


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("kind", [TrainingArguments, Further, SL2OTrainingArguments])
def test_arguments_that_are_no_numbers_are_refused(kind, optim, folder):
    fields = ["learning_rate", "weight_decay", "max_grad_norm"]
    fields += ["adam_epsilon", "adam_beta1", "adam_beta2"] if optim == "subspace_adamw" else []
    fields += ["sl2o_average", "sl2o_momentum"] if kind is SL2OTrainingArguments else []
    for field in fields:
        make = lambda value, field=field: optimizer_of(arguments(kind, optim, folder, **{field: value}))  # noqa: E731
        assert not accepted(make), field
    for key in ("lr", "average", *(["momentum"] if optim == "subspace_sgd" else [])):
        make = lambda value, key=key: optimizer_of(arguments(kind, optim, folder, f"{key}={value}"))  # noqa: E731
        assert not accepted(make), key


@pytest.mark.parametrize("optim", NAMES)
def test_our_argument_class_refuses_them_itself(optim, folder):
    for field in ("learning_rate", "weight_decay", "max_grad_norm", "sl2o_average", "sl2o_momentum"):
        make = lambda value, field=field: arguments(SL2OTrainingArguments, optim, folder, **{field: value})  # noqa: E731
        assert not accepted(make), field
    warm = {"sl2o_warmup_steps": 100}
    for field in ("sl2o_warmup_learning_rate", "sl2o_dim", "sl2o_snapshots", "sl2o_warmup_steps"):
        make = lambda value, field=field: arguments(  # noqa: E731
            SL2OTrainingArguments, optim, folder.parent, "x", **{**warm, field: value}
        )
        assert not accepted(make), field


def test_numbers_of_a_yaml_file_that_came_as_text(folder):
    """PyYAML reads 9e-1 as text; it is the number, or is refused with a sentence."""
    for field, text in (("sl2o_momentum", "9e-1"), ("max_grad_norm", "1e0"), ("sl2o_average", "4e0")):
        given = {field: text, "learning_rate": 0.5}
        try:
            args = arguments(SL2OTrainingArguments, "subspace_sgd", folder, **given)
            optimizer = optimizer_of(args)
        except ValueError:
            continue
        value = optimizer.param_groups[0]["momentum"] if field == "sl2o_momentum" else None
        assert value is None or float(value) == 0.9


@pytest.mark.parametrize("optim", NAMES)
def test_the_factory_refuses_them(optim, folder):
    options = {"lr": 0.5, "basis": str(folder)}
    names = ["lr", "average", "weight_decay", "max_grad_norm"]
    names += {"subspace_adamw": ["eps"], "subspace_sgd": ["momentum"]}.get(optim, [])
    for name in names:
        make = lambda value, name=name: build_optimizer(Net(), optim, **{**options, name: value})  # noqa: E731
        assert not accepted(make), name
    if optim == "subspace_adamw":
        for betas in (lambda value: (value, 0.9), lambda value: (0.9, value)):
            assert not accepted(
                lambda value, betas=betas: build_optimizer(Net(), optim, **options, betas=betas(value))
            )
    if optim == "sl2o":
        for name in ("lr", "average", "weight_decay"):
            assert not accepted(lambda value, name=name: build_optimizer(Net(), optim, **{name: value})), name


@pytest.mark.parametrize("wrap", [float, torch.tensor], ids=["number", "tensor"])
def test_the_class_refuses_them_in_its_arguments_and_in_groups(wrap):
    rule = LSTMRule()
    for name in ("lr", "eps", "weight_decay"):
        make = lambda value, name=name: LearnedOptimizer(Net().parameters(), rule, **{name: wrap(value)})  # noqa: E731
        assert not accepted(make), name
        make = lambda value, name=name: LearnedOptimizer(  # noqa: E731
            [{"params": list(Net().parameters()), name: wrap(value)}], rule
        )
        assert not accepted(make), name

        def add(value, name=name):
            model = Net()
            optimizer = LearnedOptimizer(model.a.parameters(), rule)
            optimizer.add_param_group({"params": list(model.b.parameters()), name: wrap(value)})

        assert not accepted(add), name
    for betas in (lambda value: (value, 0.9), lambda value: (0.9, value)):
        make = lambda value, betas=betas: LearnedOptimizer(Net().parameters(), rule, betas=betas(wrap(value)))  # noqa: E731
        assert not accepted(make)
    assert not accepted(lambda value: LearnedOptimizer(Net().parameters(), rule, average=value))
    assert not accepted(lambda value: RuleConfig(average=value)) and not accepted(lambda value: RuleConfig(eps=value))
    for lr in (0.0, 2e-5, torch.tensor(2e-5)):  # literally, as torch's own
        assert LearnedOptimizer(Net().parameters(), rule, lr=lr).param_groups[0]["lr"] == lr


def test_an_eps_of_zero_is_refused_in_a_group_too():
    with pytest.raises(ValueError, match="eps"):
        LearnedOptimizer(Net().parameters(), LSTMRule(), eps=0.0)
    with pytest.raises(ValueError, match="eps"):
        LearnedOptimizer([{"params": list(Net().parameters()), "eps": 0.0}], LSTMRule())


SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop


@pytest.mark.parametrize(
    "kind, name",
    [
        (SGD, "lr"), (SGD, "momentum"), (SGD, "weight_decay"), (SGD, "dampening"), (ADAMW, "lr"), (ADAMW, "eps"),
        (ADAMW, "weight_decay"), (RMSPROP, "lr"), (RMSPROP, "eps"), (RMSPROP, "momentum"),
        (torch.optim.Adagrad, "lr"), (torch.optim.Adagrad, "eps"), (torch.optim.Adafactor, "lr"),
        (torch.optim.NAdam, "lr"), (torch.optim.RAdam, "lr"), (torch.optim.Adamax, "lr"), (torch.optim.Rprop, "lr"),
    ],
)  # fmt: skip
def test_inner_optimizers_of_torch_with_them_are_refused(kind, name):
    model = Net()
    basis = random_dense(model.named_parameters())

    def make(value, **options):
        return SubspaceOptimizer(model.named_parameters(), basis, lambda c: kind(c, **{name: value}), **options)

    make(0.5)
    assert [value for value in accepted(make) if name != "dampening" or value >= 0] == []

    def outside(value):
        whole = nn.ModuleList([model, nn.Linear(2, 2)])
        named = [(n.removeprefix("0."), p) for n, p in whole.named_parameters()]
        SubspaceOptimizer(named, basis, LSTMRule(), outside=lambda params: kind(params, **{name: value}))

    outside(0.5)
    assert [value for value in accepted(outside) if name != "dampening" or value >= 0] == []


def test_the_optimizer_over_coefficients_refuses_them_in_its_own_arguments():
    model = Net()
    basis = random_dense(model.named_parameters())
    for name in ("max_grad_norm", "average"):
        make = lambda value, name=name: SubspaceOptimizer(model, basis, LSTMRule(), **{name: value})  # noqa: E731
        assert not accepted(make)
    for name in ("lr", "eps", "weight_decay", "average"):
        make = lambda value, name=name: SubspaceOptimizer(  # noqa: E731
            model, basis, lambda c: LearnedOptimizer(c, LSTMRule(), **{name: value})
        )
        assert not accepted(make)


# Weight decay


def decayed(model, weight_decay, steps=3, lr=0.5, rule=None):
    rule = load_rule("default-lora", with_basis=False) if rule is None else rule
    optimizer = build_optimizer(model, "sl2o", rule=rule, lr=lr, weight_decay=weight_decay, average=0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X, torch.sin(2 * X[:, :4]))["loss"].backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("weight_decay", [0.01, 0.5])
def test_weight_decay_is_decoupled(weight_decay):
    """By hand: theta (1 - lr factor scale decay), then the same step as without."""
    model, plain = Net(), Net()
    decayed(plain, 0.0, steps=1)
    optimizer = decayed(model, weight_decay, steps=1)
    start = dict(Net().named_parameters())
    shrink = 1 - 0.5 * optimizer.step_factor * 0.01 * weight_decay
    for (name, p), without in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected = without.detach() - (1 - shrink) * start[name].detach() * (p.ndim > 1)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-7)
        assert torch.equal(p, without) == (p.ndim <= 1)  # a bias does not decay


def test_only_what_has_a_gradient_decays_and_only_at_a_rate():
    model = Net()
    model.b.requires_grad_(False)
    decayed(model, 0.5)
    assert torch.equal(model.b.weight, Net().b.weight)
    model = Net()
    decayed(model, 0.5, lr=0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))


@pytest.mark.parametrize("kind", [TrainingArguments, SL2OTrainingArguments])
def test_weight_decay_of_a_trainer_reaches_lora(kind, folder):
    def lora(weight_decay):
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["a"]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.5)
        args = arguments(
            kind, "sl2o", folder, "average=0", weight_decay=weight_decay, max_steps=1, lr_scheduler_type="constant",
            learning_rate=1.0,
        )  # fmt: skip
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer = Trainer(model, args, train_dataset=ROWS)
        trainer.train()
        factor = unwrap_optimizer(trainer.optimizer).step_factor
        return start, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, factor

    start, without, factor = lora(0.0)
    _, moved, _ = lora(0.1)
    assert len(start) == 2
    for name, old in start.items():
        torch.testing.assert_close(moved[name], without[name] - factor * 0.01 * 0.1 * old, rtol=0, atol=1e-7)
        assert not torch.equal(moved[name], without[name])


@pytest.mark.parametrize("optim", NAMES)
def test_with_a_basis_weight_decay_is_refused_for_the_true_reason(optim, folder):
    reason = "weight_decay is 0.01, and with a basis only the coefficients move"
    with pytest.raises(ValueError, match=reason):
        build_optimizer(Net(), optim, basis=str(folder), weight_decay=0.01)
    words = "" if optim != "sl2o" else f"basis={folder}"
    for kind in (TrainingArguments, SL2OTrainingArguments):
        with pytest.raises(ValueError, match=reason):
            optimizer_of(arguments(kind, optim, folder, words, weight_decay=0.01))
    basis = random_dense(Net().named_parameters())
    args = SL2OTrainingArguments(
        str(folder / "out"), optim=optim, weight_decay=0.01, use_cpu=True, report_to="none", learning_rate=0.5
    )
    with pytest.raises(ValueError, match=reason):
        optimizer_of(args, SL2OTrainer, basis=basis)
    build_optimizer(Net(), optim, basis=str(folder), weight_decay=0.0)
