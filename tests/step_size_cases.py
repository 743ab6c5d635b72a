"""What the tests of learning rates share: classes of arguments, a small network, and what becomes of a rate."""

import dataclasses
import math

import torch
from torch import nn
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_sl2o import SL2OTrainingArguments
from hf_sl2o.training.callbacks import unwrap_optimizer

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
