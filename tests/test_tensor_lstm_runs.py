"""A rule that finds its own scale with averages, in a basis, in a Trainer, and on a real problem."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from hf_sl2o import IdentityBasis, Layout, LearnedOptimizer, SubspaceOptimizer
from hf_sl2o.rules import load_rule
from hf_sl2o.training.callbacks import unwrap_optimizer

from .step_size_cases import ROWS, Net
from .tensor_lstm_cases import a_rule, far, gradients, kept, same


def test_an_attached_model_is_at_the_average_and_trains_at_the_last_step():
    def losses(average):
        torch.manual_seed(0)
        model = Net()
        optimizer = LearnedOptimizer(model, a_rule(0.0), average=average)
        found, course = [], []
        for step in range(6):
            optimizer.zero_grad()
            batch = {key: torch.stack([row[key] for row in ROWS[8 * step : 8 * step + 8]]) for key in ROWS[0]}
            loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            course.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return found, course

    (plain, last), (averaged, published) = losses(0.0), losses(2.0)
    torch.testing.assert_close(torch.tensor(averaged), torch.tensor(plain), rtol=1e-5, atol=0)
    mean = torch.zeros_like(last[0])
    for t, weights in enumerate(last, start=1):
        mean = mean + 3.0 / (t + 2.0) * (weights - mean)
        torch.testing.assert_close(published[t - 1], mean, rtol=1e-4, atol=1e-6)
    assert (published[-1] - last[-1]).abs().max() > 1e-4


def test_an_identity_basis_equals_the_rule_on_the_parameters():
    def end(make):
        model = Net()
        optimizer = make(model)
        for step in range(6):
            for p, (_, g) in zip(model.parameters(), gradients(step, shapes_of(model)), strict=True):
                p.grad = g.float()
            optimizer.step()
        return dict(model.named_parameters())

    def in_basis(model):
        basis = IdentityBasis(Layout.from_named_parameters(model.named_parameters()))
        return SubspaceOptimizer(model.named_parameters(), basis, a_rule())

    expected = end(lambda model: LearnedOptimizer(model.parameters(), a_rule()))
    found = end(in_basis)
    assert far({k: p.detach() for k, p in found.items()}, {k: p.detach() for k, p in expected.items()}) < 1e-4


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_trainer_resumes_to_the_bit(tmp_path):
    rule = tmp_path / "rule"
    a_rule(0.05, average=2.0).save_pretrained(rule)

    def trainer_of(steps=6):
        args = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=3, per_device_train_batch_size=8, report_to="none",
            use_cpu=True, disable_tqdm=True, optim="sl2o", optim_args=f"rule={rule}", learning_rate=0.5,
            warmup_steps=2, logging_strategy="no",
        )  # fmt: skip
        return Trainer(Net(), args, train_dataset=ROWS)

    whole = trainer_of()
    whole.train()
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    a, b = (unwrap_optimizer(trainer.optimizer) for trainer in (whole, resumed))
    assert same(kept(a), kept(b)) and all(entry["tensors"].shape == (1, 16) for entry in a.state.values())
    fresh = trainer_of()
    fresh.create_optimizer()
    assert not unwrap_optimizer(fresh.optimizer).state


def test_rates_from_a_tenth_to_three_reach_about_the_same_loss():
    """Factors beside a frozen network on handwritten digits; a rule of fixed lengths depends on its rate."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, labels = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
    x = x.float() / 16

    def end(rule, lr, steps=120):
        torch.manual_seed(0)
        frozen = [torch.randn(32, 64) / 8, torch.randn(10, 32) / 32**0.5]
        down = [(torch.randn(4, w.shape[1]) / w.shape[1] ** 0.5).requires_grad_() for w in frozen]
        up = [torch.zeros(w.shape[0], 4, requires_grad=True) for w in frozen]
        optimizer = LearnedOptimizer(down + up, rule, lr=lr)
        scheduler = LambdaLR(optimizer, lambda t: 1 - t / steps)

        def loss(chosen):
            first, second = (w + b @ a for w, a, b in zip(frozen, down, up, strict=True))
            logits = torch.relu(x[chosen] @ first.T) @ second.T
            return torch.nn.functional.cross_entropy(logits, labels[chosen])

        for _ in range(steps):
            optimizer.zero_grad()
            loss(torch.randint(len(x), (64,))).backward()
            optimizer.step()
            scheduler.step()
        return loss(slice(None)).item()

    ours = [end(a_rule(0.0, per_tensor=8), lr) for lr in (0.1, 1.0, 3.0)]
    assert max(ours) < 0.6 and max(ours) < 1.6 * min(ours), ours
    fixed = [end(load_rule("paper-cnn", with_basis=False), lr) for lr in (0.01, 0.3)]
    assert max(fixed) > 2.0 * min(fixed), fixed
