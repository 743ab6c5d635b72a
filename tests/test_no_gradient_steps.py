"""Rounding is not amplified; a step at a rate of 0, or of nothing, changes neither point."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from hf_sl2o import LearnedOptimizer, RuleConfig, SL2OTrainer, SL2OTrainingArguments, SubspaceOptimizer
from hf_sl2o.rules import SHIPPED_RULES, load_rule

from .conftest import Tokens, random_dense, tiny_gpt2
from .no_gradient_cases import SHIPPED, arguments, batch, copies, same, step


def attention(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = tiny_gpt2()
        bias = model.transformer.h[0].attn.c_attn.bias
        return model, lambda: (bias[:16], bias[16:32], bias[32:])
    if kind == "opt":
        config = OPTConfig(
            vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, dropout=0.0, word_embed_proj_dim=16,
        )  # fmt: skip
        model = OPTForCausalLM(config)
        attn = model.model.decoder.layers[0].self_attn
        return model, lambda: (attn.q_proj.bias, attn.k_proj.bias, attn.v_proj.bias)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    attn = model.bert.encoder.layer[0].attention.self
    return model, lambda: (attn.query.bias, attn.key.bias, attn.value.bias)


# A tensor that is rounding as a whole (OPT's key bias) is judged by eps alone, as by Adam: a loss of a hundred times
# the size brings its rounding there.
@pytest.mark.parametrize(("kind", "loss_scale"), [("gpt2", 1), ("gpt2", 100), ("opt", 1), ("bert", 1), ("bert", 100)])
def test_rounding_is_not_amplified(kind, loss_scale):
    model, parts = attention(kind)
    optimizer = LearnedOptimizer(model.parameters(), load_rule("default-lora", with_basis=False))
    ids, before = Tokens().ids[:8], [part.detach().clone() for part in parts()]
    for _ in range(30):
        optimizer.zero_grad()
        (loss_scale * model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
    query, key, value = (float((now.detach() - old).abs().max()) for now, old in zip(parts(), before, strict=True))
    assert key < 1e-2 * min(query, value)


def test_small_gradients_that_are_true_still_move():
    """A millionth of the largest tensor's gradients, in a tensor of their own: what a rule sees is relative."""
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(20))
    start = [large.detach().clone(), small.detach().clone()]
    optimizer = LearnedOptimizer([large, small], load_rule("default-lora", with_basis=False))
    for _ in range(10):
        optimizer.zero_grad()
        (large.square().sum() + 1e-6 * small.square().sum()).backward()
        optimizer.step()
    moved = [float((p.detach() - old).abs().mean()) for p, old in zip((large, small), start, strict=True)]
    assert moved[1] > 0.5 * moved[0]


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x, labels=None):
        y = self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))))
        return {"loss": y.square().mean() if labels is None else (y - labels).square().mean(), "logits": y}


def optimizer_of(model, kind, average=4.0, attached=True):
    given = model if attached else model.named_parameters()
    if kind == "tensors":
        return LearnedOptimizer(given, load_rule("default-lora", with_basis=False), average=average)
    basis = random_dense(model.named_parameters())
    if kind == "sgd":
        return SubspaceOptimizer(given, basis, lambda c: torch.optim.SGD(c, lr=1.0, momentum=0.5), average=average)
    inner = lambda c: LearnedOptimizer(c, load_rule("default", with_basis=True), total_steps=20)  # noqa: E731
    return SubspaceOptimizer(given, basis, inner, average=average)


@pytest.mark.parametrize("kind", ["tensors", "sgd", "rule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_step_at_lr_0_changes_neither_point(kind, dtype):
    model = Net(dtype=dtype)
    optimizer = optimizer_of(model, kind)
    for at in range(4):
        step(model, optimizer, at)

    def points():
        found = []
        for go in (optimizer.use_last, optimizer.use_average):
            go()
            found.append(copies(model.parameters()))
        return found

    before, rates = points(), [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for at in range(4, 7):
        step(model, optimizer, at)
        assert same(before[1], copies(model.parameters()))
    after = points()
    assert same(before[1], after[1])
    assert same(before[0], after[0])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    step(model, optimizer, 7)  # beside it: a step at the old rate does
    after = points()
    assert not same(before[0], after[0])


@pytest.mark.parametrize("kind", ["tensors", "sgd", "rule"])
@pytest.mark.parametrize("average", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nor_does_it_where_the_optimizer_has_tensors(kind, average, dtype):
    model = Net(dtype=dtype)
    optimizer = optimizer_of(model, kind, average, attached=False)
    for at in range(3):
        step(model, optimizer, at)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copies(model.parameters())
    for at in range(3, 6):
        step(model, optimizer, at)
        assert same(before, copies(model.parameters()))


@pytest.mark.parametrize("kind", ["tensors", "sgd", "rule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_step_of_zero_gradients_is_none(kind, dtype):
    model = Net(dtype=dtype)
    optimizer, start = optimizer_of(model, kind), copies(model.parameters())
    for at in range(2):
        step(model, optimizer, at, lambda p: p.grad.zero_())
        assert same(start, copies(model.parameters()))
    optimizer.use_last()
    assert same(start, copies(model.parameters()))


@pytest.mark.parametrize("kind", ["tensors", "sgd", "rule"])
def test_a_schedule_that_ends_at_zero_ends_the_average(kind):
    model = Net()
    optimizer = optimizer_of(model, kind)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 4))
    course = []
    for at in range(8):
        step(model, optimizer, at)
        schedule.step()
        course.append(copies(model.parameters()))
    assert all(same(course[3], later) for later in course[4:])
    assert not same(course[2], course[3])


ROWS = [{"x": batch(100)[i], "labels": batch(200)[i, :4]} for i in range(16)]


def finished(folder, kind, with_basis, resume=None, **options):
    model = Net()
    words = "average=9"
    if with_basis:
        if not (folder / "basis").exists():
            random_dense(model.named_parameters()).save_pretrained(folder / "basis")
        words = f"basis={folder / 'basis'},average=4"
    args = arguments(
        folder / "run", SL2OTrainingArguments if kind is SL2OTrainer else TrainingArguments, optim_args=words,
        **{**{"max_steps": 4, "save_strategy": "steps", "save_steps": 2}, **options},
    )  # fmt: skip
    trainer = kind(model, args, train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind, with_basis", [(Trainer, False), (SL2OTrainer, True)])
@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 1},
        {"lr_scheduler_type": "constant", "max_steps": -1, "num_train_epochs": 2},
        {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 4},
        {
            "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 2,
            "load_best_model_at_end": True,
        },
    ],
    ids=["linear", "constant", "cosine", "epochs", "accumulated", "best"],
)  # fmt: skip
def test_resuming_a_finished_run_does_not_move_the_model(tmp_path, kind, with_basis, options):
    first = finished(tmp_path, kind, with_basis, **options)
    again = finished(tmp_path, kind, with_basis, resume=True, **options)
    assert again.state.global_step == first.state.global_step == 4
    assert same(copies(first.model.parameters()), copies(again.model.parameters()))
    assert first.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
    other = finished(tmp_path, kind, with_basis, resume=str(tmp_path / "run" / "checkpoint-2"), **options)
    assert same(copies(first.model.parameters()), copies(other.model.parameters()))
    if options.get("max_steps", 4) > 0:  # beside it: two steps more do move it
        more = finished(tmp_path, kind, with_basis, resume=True, **{**options, "max_steps": 6})
        assert not same(copies(first.model.parameters()), copies(more.model.parameters()))


def test_shipped_rules_are_those_that_are_tested():
    assert sorted(path.name for path in SHIPPED_RULES.iterdir() if path.is_dir()) == SHIPPED
    assert {field.name for field in dataclasses.fields(RuleConfig)} >= {"momenta", "progress", "agreement"}
