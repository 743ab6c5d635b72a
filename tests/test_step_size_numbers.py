"""No number that is none is taken, whichever way it comes in."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hf_sl2o import (
    LearnedOptimizer,
    LSTMRule,
    RuleConfig,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    build_optimizer,
)

from .conftest import random_dense
from .step_size_cases import NAMES, NO_NUMBERS, Further, Net, arguments, optimizer_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("basis")
    random_dense(Net().named_parameters(), dim=12).save_pretrained(path)
    return path


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
