"""Weight decay: decoupled, of matrices alone, and refused in a basis."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_sl2o import LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments, build_optimizer
from hf_sl2o.rules import load_rule
from hf_sl2o.training.callbacks import unwrap_optimizer

from .conftest import random_dense
from .step_size_cases import NAMES, ROWS, Net, X, arguments, optimizer_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("basis")
    random_dense(Net().named_parameters(), dim=12).save_pretrained(path)
    return path


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
    """By hand: theta (1 - lr scale decay), then the same step as without."""
    model, plain = Net(), Net()
    torch.manual_seed(2)
    rule = LSTMRule(RuleConfig(output_scale=0.01, tensor_scale=True))
    decayed(plain, 0.0, steps=1, rule=rule)
    decayed(model, weight_decay, steps=1, rule=rule)
    start = dict(Net().named_parameters())
    shrink = 1 - 0.5 * 0.01 * weight_decay
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
    """The rule that ships sets the length of each tensor's steps; a weight shrinks by that times weight_decay."""
    rule = load_rule("default-lora", with_basis=False)
    guess = rule.guess.detach()

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
        state = unwrap_optimizer(trainer.optimizer).state
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        rows = {n: state[p]["tensors"][0] for n, p in named.items()}
        lengths = {n: float(torch.exp(row[0] + row[1] + row[3:6] @ guess)) for n, row in rows.items()}
        return start, {n: p.detach() for n, p in named.items()}, lengths

    start, without, lengths = lora(0.0)
    _, moved, _ = lora(0.1)
    assert len(start) == len(set(lengths.values())) == 2
    for name, old in start.items():
        torch.testing.assert_close(moved[name], without[name] - lengths[name] * 0.1 * old, rtol=0, atol=1e-7)
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
