"""What gets no gradient stays to the bit: rows of embeddings, masks, adapters, coefficients."""

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_sl2o import DenseBasis, LearnedOptimizer, SubspaceOptimizer, Task, train_on, unroll
from hf_sl2o.meta.task import InnerRun
from hf_sl2o.rules import load_rule

from .conftest import Tokens, random_dense, tiny_gpt2
from .no_gradient_cases import NAMES, SEEN, UNSEEN, arguments, copies, rules, same


class Rows(nn.Module):
    """An embedding of which rows 1 to 3 are seen, and a tensor whose gradient is zero."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(10, 4, padding_idx=1)
        self.out = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.randn(5, 3))
        self.to(dtype)

    def forward(self, ids=None, labels=None):
        y = self.out(self.rows(ids).mean(1)) + 0 * self.unused.sum()
        loss = (y - 1).square().mean()
        return {"loss": loss, "logits": y}


IDS = torch.tensor([[1, 2, 3], [2, 3, 1], [3, 3, 1]])


def check_rows(model, before):
    assert torch.equal(model.rows.weight[UNSEEN], before.rows.weight[UNSEEN])
    assert torch.equal(model.unused, before.unused)
    assert not torch.equal(model.rows.weight[SEEN], before.rows.weight[SEEN])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("average", [0.0, 4.0])
def test_rows_and_tensors_without_gradient_stay_to_the_bit(dtype, foreach, average):
    for name, rule in rules().items():
        if dtype in (torch.bfloat16, torch.float16) and rule.config.output_scale < 0.1:
            continue  # steps below a unit of such weights
        model, before = Rows(dtype), Rows(dtype)
        options = {"foreach": foreach, "total_steps": 6, "average": average}
        optimizer = LearnedOptimizer(model.parameters(), rule, lr=0.5, **options)
        for t in range(6):
            optimizer.zero_grad()
            model(IDS)["loss"].backward()
            optimizer.step()
            if t == 2:  # a saved and loaded state has the same history
                state = optimizer.state_dict()
                optimizer = LearnedOptimizer(model.parameters(), rule, lr=0.5, **options)
                optimizer.load_state_dict(state)
        check_rows(model, before), name
        optimizer.use_average()
        check_rows(model, before), name


def test_a_hook_that_masks_rows_and_a_mask_of_gradients():
    for mask in ("hook", "grad"):
        model, before = Rows(), Rows()
        keep = torch.ones(10, 1)
        keep[3] = 0
        if mask == "hook":
            model.rows.weight.register_hook(lambda g, keep=keep: g * keep)
        optimizer = LearnedOptimizer(model, load_rule("default-lora", with_basis=False), average=9.0)
        for _ in range(5):
            optimizer.zero_grad()
            model(IDS)["loss"].backward()
            if mask == "grad":
                model.rows.weight.grad[3] = 0
            optimizer.step()
        assert torch.equal(model.rows.weight[3], before.rows.weight[3])
        assert not torch.equal(model.rows.weight[2], before.rows.weight[2])
        optimizer.use_last()
        assert torch.equal(model.rows.weight[3], before.rows.weight[3])


class Few(Tokens):
    """Sentences of tokens 1 to 19 alone."""

    def __init__(self, rows=64):
        super().__init__(rows)
        self.ids = self.ids % 19 + 1


@pytest.mark.parametrize("with_average", [True, False])
def test_embeddings_in_modules_to_save_keep_the_rows_that_no_batch_has(tmp_path, with_average):
    config = GPT2Config(vocab_size=50, n_layer=1, n_head=2, n_embd=16, n_positions=16, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True)
    model = get_peft_model(model, config)
    weight = model.get_input_embeddings().modules_to_save["default"].weight
    before = weight.detach().clone()
    args = arguments(tmp_path, optim_args=None if with_average else "average=0", dataloader_pin_memory=False)
    Trainer(model, args, train_dataset=Few()).train()
    assert torch.equal(weight[20:], before[20:]) and torch.equal(weight[0], before[0])
    assert bool((weight[1:20] != before[1:20]).any(1).all())


def test_trainable_tokens_move_only_if_they_are_seen(tmp_path):
    config = TrainableTokensConfig(token_indices=[3, 5, 40, 41], target_modules=["wte"])
    base = tiny_gpt2()
    model = get_peft_model(base, config)
    deltas = [p for name, p in model.named_parameters() if p.requires_grad]
    assert len(deltas) == 1 and deltas[0].shape[0] == 4
    before = deltas[0].detach().clone()

    class Untied(Tokens):
        def __getitem__(self, index):
            return {"input_ids": self.ids[index] % 19 + 1, "labels": self.ids[index] % 19 + 1}

    # the head is tied: mask what a softmax gives to tokens that are in no batch
    deltas[0].register_hook(lambda g: g * torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None])
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Untied())
    trainer.train()
    assert torch.equal(deltas[0][2:], before[2:])
    assert not torch.equal(deltas[0][:2], before[:2])
    trainer.optimizer.train()
    assert torch.equal(deltas[0][2:], before[2:])


def test_the_factor_of_lora_whose_first_gradient_is_zero_stays_in_the_first_step():
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = LearnedOptimizer(model, load_rule("default-lora", with_basis=False), average=9.0)
    factors = {kind: [p for n, p in model.named_parameters() if f"lora_{kind}" in n] for kind in "AB"}
    ids = Tokens().ids[:8]
    before = {kind: copies(of) for kind, of in factors.items()}
    for step in (1, 2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        zero = all(bool((p.grad == 0).all()) for p in factors["A"])
        assert zero == (step == 1)  # B is zero at the start
        optimizer.step()
        assert same(copies(factors["A"]), before["A"]) == (step == 1)
        assert not same(copies(factors["B"]), before["B"])


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def with_a_dead_direction():
    basis = random_dense(linear().named_parameters(), dim=5)
    parts = [basis.matrix(index).clone() for index in range(2)]
    for part in parts:
        part[2] = 0.0
    return DenseBasis(basis.layout, parts, basis.units)


@pytest.mark.parametrize("name", NAMES)
def test_a_coefficient_that_never_gets_gradient_stays(name):
    model, rule = linear(), rules()[name]
    inner = lambda c: LearnedOptimizer(c, rule, total_steps=20)  # noqa: E731
    optimizer = SubspaceOptimizer(model.named_parameters(), with_a_dead_direction(), inner, average=4.0)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()
    for point in (optimizer.use_last, optimizer.use_average):
        point()
        c = optimizer.coefficients
        assert c[2] == 0 and bool((c[[0, 1, 3, 4]] != 0).all())


@pytest.mark.parametrize("name", ["default", "paper-cnn", "preset l2o-dm", "all inputs"])
def test_in_train_on_and_in_meta_training_too(name):
    rule, found = rules()[name], []

    def batches(seed):
        while True:
            yield torch.ones(2, 6)

    def optimizer(c):
        found.extend(c)
        return LearnedOptimizer(c, rule, total_steps=4)

    task = Task(
        "dead", linear, batches, lambda net, x: net(x).square().mean(), with_a_dead_direction(), [torch.ones(2, 6)]
    )
    train_on(task, optimizer, 4, evaluate_at=[4])
    assert found[0][2] == 0 and bool((found[0][[0, 1, 3, 4]] != 0).all())
    run = InnerRun(task, seed=0)
    _, c, state, _ = unroll(rule, run, torch.zeros(5), rule.init_state(5), steps=4, total_steps=4)
    assert c[2] == 0 and bool((c[[0, 1, 3, 4]] != 0).all())
    assert torch.autograd.grad(c[2], list(rule.parameters()), allow_unused=True)[0].abs().max() == 0
