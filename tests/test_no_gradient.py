"""What has no gradient does not move: in every rule, dtype and way to a step; a step of nothing changes nothing."""

import dataclasses
import hashlib
import json

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_sl2o import (
    DenseBasis,
    LearnedOptimizer,
    LSTMRule,
    Rule,
    RuleConfig,
    SL2OTrainer,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    SymbolicRule,
    Task,
    train_on,
    unroll,
)
from hf_sl2o.registry import SHIPPED_RULES, load_rule
from hf_sl2o.rule_config import EXPRESSIONS
from hf_sl2o.tasks import InnerRun

from .conftest import Tokens, random_dense, tiny_gpt2

SHIPPED = ["default", "default-lora", "paper-cnn", "paper-transformer"]
PRESETS = ["paper-cnn", "paper-transformer", "rnnprop", "l2o-dm", "symbolic"]
ALL_INPUTS = RuleConfig(
    momenta=(0.5, 0.99), progress=True, tensor_scale=True, agreement=True, log_sign=5.0, embed_size=4, num_layers=2,
    squash=False,
)  # fmt: skip


def rules():
    found = {name: load_rule(name, with_basis=False) for name in SHIPPED}
    torch.manual_seed(1)
    for name in PRESETS:
        found[f"preset {name}"] = Rule.from_config(RuleConfig.preset(name))
        found[f"published {name}"] = Rule.from_config(RuleConfig.preset(name, published_quirks=True))
    found |= {f"expression {name}": SymbolicRule(RuleConfig(expression=name)) for name in EXPRESSIONS}
    found["all inputs"] = LSTMRule(ALL_INPUTS)
    return found


NAMES = sorted(rules())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copies(tensors):
    return [p.detach().clone() for p in tensors]


# Rules


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_moves_a_coordinate_only_after_a_gradient(name):
    rule = rules()[name]
    state, course = rule.init_state(3), []
    for t in range(30):
        g = torch.tensor([0.0, 0.0 if t < 20 else 1e-2, 1e-2 * (-1) ** t])
        delta, state = rule(g, state, total_steps=30)
        course.append(delta)
    deltas = torch.stack(course)
    assert torch.equal(deltas[:, 0], torch.zeros(30))
    assert torch.equal(deltas[:20, 1], torch.zeros(20)) and bool((deltas[20:, 1] != 0).any())
    assert bool((deltas[:, 2] != 0).any())


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place_and_steps_of_several_tensors_move_it_as_little(name):
    rule = rules()[name]
    state = rule.init_state(12)
    for _ in range(4):
        g = torch.cat([torch.zeros(4), 1e-2 * torch.randn(5), torch.zeros(3)])
        delta = rule.update_(g.clone(), state, sizes=(4, 6, 2), total_steps=4)
        assert torch.equal(delta[g == 0], torch.zeros(7)) and bool((delta[g != 0] != 0).all())


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])
def test_the_guard_leaves_ordinary_gradients_as_they_are(scale):
    """Beside the definition: the network's output itself, at gradients far from eps and from rounding."""
    rule = load_rule("default-lora", with_basis=False)
    state = rule.init_state(50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        g = scale * (torch.randn(50, generator=generator).abs() + 0.1)
        new_m, new_v = torch.lerp(g, state.exp_avg, 0.9), torch.lerp(g * g, state.exp_avg_sq, 0.99)
        t = state.step + 1
        m_hat, v_hat = new_m / (1 - 0.9**t), new_v / (1 - 0.99**t)
        s = v_hat.mean().sqrt() + 1e-8
        inputs = torch.stack([m_hat / (v_hat.sqrt() + 1e-8), g / (v_hat.sqrt() + 1e-8), m_hat / s, g / s], dim=-1)
        logs = (inputs.abs().log() / 10).clamp_min(-1)
        signs = (inputs * torch.exp(torch.tensor(10.0))).clamp(-1, 1)
        output, *_ = rule._output(torch.stack([logs, signs], dim=-1).flatten(-2), state.hidden, state.cell)
        delta, state = rule(g, state)
        torch.testing.assert_close(delta, 0.01 * output, rtol=1e-4, atol=1e-7)


def test_old_files_have_the_guard_too(tmp_path):
    rule = LSTMRule(RuleConfig())
    rule.save_pretrained(tmp_path / "rule")
    config = json.loads((tmp_path / "rule" / "config.json").read_text())
    later = ("momenta", "progress", "tensor_scale", "agreement", "base_width", "average")
    kept = {key: value for key, value in config["rule"].items() if key not in later}
    save_file({name: tensor.contiguous() for name, tensor in rule.state_dict().items()}, tmp_path / "plain")
    (tmp_path / "plain").replace(tmp_path / "rule" / "model.safetensors")
    sha256 = hashlib.sha256((tmp_path / "rule" / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "rule" / "config.json").write_text(json.dumps({"rule": kept, "sha256": sha256}))
    old = Rule.from_pretrained(tmp_path / "rule")
    assert old.fingerprint == rule.fingerprint
    state = old.init_state(2)
    for _ in range(5):
        delta, state = old(torch.tensor([0.0, 1e-3]), state)
        assert delta[0] == 0 and delta[1] != 0


@pytest.mark.parametrize("name", ["default", "default-lora", "paper-cnn"])
def test_one_gradient_long_ago_does_not_let_it_walk(name):
    """A token seen in one batch: thereafter its row has no gradient, and AdamW moves it by ten steps at most."""
    rule = load_rule(name, with_basis=False)
    state, walked, typical = rule.init_state(64), torch.zeros(64), 0.0
    generator, steps = torch.Generator().manual_seed(0), 400
    for t in range(steps):
        g = 1e-2 * torch.randn(64, generator=generator)
        g[0] = 1e-2 if t == 0 else 0.0
        with torch.no_grad():
            delta, state = rule(g, state, total_steps=steps)
        if t >= 50:
            walked += delta
            typical += float(delta[1:].square().mean().sqrt()) / (steps - 50)
    assert abs(float(walked[0])) < 20 * typical


# Optimizers


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


SEEN, UNSEEN = [2, 3], [0, 1, 4, 5, 6, 7, 8, 9]
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


def arguments(folder, kind=TrainingArguments, **options):
    settings = {"max_steps": 5, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "seed": 1}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "optim": "sl2o"}
    return kind(str(folder), **{**settings, **options})


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


# Rounding


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


# Steps of nothing


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x, labels=None):
        y = self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))))
        return {"loss": y.square().mean() if labels is None else (y - labels).square().mean(), "logits": y}


def batch(step):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


def optimizer_of(model, kind, average=4.0, attached=True):
    given = model if attached else model.named_parameters()
    if kind == "tensors":
        return LearnedOptimizer(given, load_rule("default-lora", with_basis=False), average=average)
    basis = random_dense(model.named_parameters())
    if kind == "sgd":
        return SubspaceOptimizer(given, basis, lambda c: torch.optim.SGD(c, lr=1.0, momentum=0.5), average=average)
    inner = lambda c: LearnedOptimizer(c, load_rule("default", with_basis=True), total_steps=20)  # noqa: E731
    return SubspaceOptimizer(given, basis, inner, average=average)


def step(model, optimizer, at, change=lambda p: None):
    optimizer.zero_grad()
    model(batch(at))["loss"].backward()
    for p in model.parameters():
        change(p)
    optimizer.step()


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
