"""BatchNorm in a subspace: recalibrated statistics, what it costs not to, the callback in a Trainer, bad input."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn
from transformers import TrainerCallback

from hf_sl2o import (
    BatchNormCallback,
    Layout,
    RandomBasis,
    SL2OTrainer,
    SL2OTrainingArguments,
    recalibrate_batch_norm,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3)
        )
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.norm(self.body(x)).mean(dim=(2, 3)))
        return (
            {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits
        )


def net():
    torch.manual_seed(0)
    return Net()


def data(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    labels = (x[:, 0].mean(dim=(1, 2)) > 0).long()
    return x * 3 + 1, labels


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_equals_torchs_own_update(kind):
    model, (x, labels) = net(), data()
    model.body[3].p = 0.0  # torch's runs dropout too
    expected = copy.deepcopy(model)
    update_bn([x[:32], x[32:]], expected)
    pick = {
        "tensor": lambda rows: x[rows],
        "tuple": lambda rows: (x[rows], labels[rows]),
        "mapping": lambda rows: {"x": x[rows], "labels": labels[rows]},
    }[kind]
    assert recalibrate_batch_norm(model, [pick(slice(0, 32)), pick(slice(32, 64))]) == 2
    for name, value in statistics(expected).items():
        torch.testing.assert_close(statistics(model)[name], value)
        assert not torch.allclose(statistics(net())[name], value, atol=1e-2)  # the break: not recalibrated


def test_modes_momenta_weights_and_random_numbers_stay():
    model, (x, _) = net(), data()
    model.train()
    model.body[1].eval()
    model.norm.momentum = 0.3
    before, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    recalibrate_batch_norm(model, [x])
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and not model.body[1].training and model.norm.training and model.norm.momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert recalibrate_batch_norm(nn.Linear(2, 2), []) == 0
    statistics = model.norm.running_mean.clone()
    with pytest.raises(ValueError, match="no batches to recalibrate"):
        recalibrate_batch_norm(model, [])
    assert torch.equal(model.norm.running_mean, statistics) and statistics.abs().sum() > 0


class Rows(torch.utils.data.Dataset):
    def __init__(self, seed):
        self.x, self.labels = data(seed=seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.labels[i]}


def trained(folder, callbacks, **options):
    """A run that moves far in few steps, as learned optimizers do."""
    model = net()
    basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=30).to_dense()
    args = SL2OTrainingArguments(
        str(folder), optim="subspace_sgd", learning_rate=100.0, max_steps=6, report_to="none", use_cpu=True,
        per_device_train_batch_size=32, eval_strategy="steps", eval_steps=3, save_steps=3, disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = SL2OTrainer(
        model,
        args,
        basis=basis,
        train_dataset=Rows(0),
        eval_dataset=Rows(1),
        callbacks=list(callbacks),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer, [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_the_callback_serves_evaluation_checkpoints_and_the_end(tmp_path):
    batches = [{"x": Rows(0).x[:32]}, {"x": Rows(0).x[32:]}]
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            model = copy.deepcopy(kwargs["model"])
            held = statistics(model)
            recalibrate_batch_norm(model, batches)
            seen.append(all(torch.equal(held[name], value) for name, value in statistics(model).items()))

    trainer, accuracies = trained(tmp_path / "with", [BatchNormCallback(batches), Watch()], eval_on_start=True)
    assert seen == [True] * 3
    last = statistics(trainer.model)
    again = net()
    again.load_state_dict(load_file(tmp_path / "with" / "checkpoint-6" / "model.safetensors"))
    assert all(torch.equal(statistics(again)[name], value) for name, value in last.items())
    seen.clear()
    _, without = trained(tmp_path / "without", [Watch()], eval_on_start=True)
    assert seen == [False] * 3
    assert accuracies[-1] > without[-1] + 0.1  # what is lost without it


def test_batch_statistics_in_evaluation_are_refused(tmp_path):
    class Stuck(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.train()
            return self

    torch.manual_seed(0)
    model = Stuck()
    args = SL2OTrainingArguments(str(tmp_path), optim="adamw_torch", report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = SL2OTrainer(model, args, eval_dataset=Rows(1), callbacks=[BatchNormCallback([{"x": Rows(0).x}])])
    for judge in (trainer.evaluate, lambda: trainer.predict(Rows(1)), trainer.evaluate):
        with pytest.raises(ValueError, match="norm is a BatchNorm that uses the statistics of the batch"):
            judge()
    with pytest.raises(ValueError, match="no batches"):
        BatchNormCallback([])
