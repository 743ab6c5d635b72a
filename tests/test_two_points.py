"""Where weights are with a running average, whoever reads or changes them: in loops, Trainers, copies and files."""

import copy
import io
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_constant_schedule
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_sl2o import (
    IdentityBasis,
    Layout,
    LearnedOptimizer,
    RandomBasis,
    SL2OTrainer,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    Trajectory,
    TrajectoryCallback,
    build_optimizer,
    fit_basis,
)
from hf_sl2o.callbacks import unwrap_optimizer
from hf_sl2o.registry import load_rule

from .conftest import Tokens, random_dense, tiny_gpt2

KINDS = ["tensors", "sgd", "rule"]
LOW = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x, labels=None):
        y = self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))))
        return {"loss": (y - (0 if labels is None else labels)).square().mean(), "logits": y}


NAMED = list(Net().named_parameters())


def batch(step):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


ROWS = [{"x": x, "labels": torch.sin(2 * x[:4])} for step in range(8) for x in batch(step)]


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def states(model):
    found = model.state_dict()
    return [found[name].clone() for name, _ in model.named_parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def far(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def optimizer_of(given, kind, average=4.0, basis=None):
    named = given.named_parameters() if isinstance(given, nn.Module) else given
    if kind == "tensors":
        return LearnedOptimizer(given, load_rule("default-lora", with_basis=False), average=average)
    basis = random_dense(named) if basis is None else basis
    if kind == "sgd":
        return SubspaceOptimizer(given, basis, lambda c: torch.optim.SGD(c, lr=1.0, momentum=0.5), average=average)
    inner = lambda c: LearnedOptimizer(c, load_rule("default", with_basis=True), total_steps=20)  # noqa: E731
    return SubspaceOptimizer(given, basis, inner, average=average)


def step(model, optimizer, at, between=None):
    optimizer.zero_grad()
    model(batch(at))["loss"].backward()
    if between is not None:
        between()
    optimizer.step()


def begun(kind, steps=4, dtype=torch.float32, average=4.0):
    model = Net(dtype=dtype)
    optimizer = optimizer_of(model, kind, average)
    for at in range(steps):
        step(model, optimizer, at)
    return model, optimizer


def course_by_hand(kind, steps):
    """(last steps, averages) of a run whose optimizer has tensors, and of one without average."""
    model, plain = Net(), Net()
    optimizer, without = optimizer_of(list(model.named_parameters()), kind), optimizer_of(plain, kind, 0.0)
    lasts, averages = [], []
    for at in range(steps):
        step(model, optimizer, at)
        step(plain, without, at)
        assert far(copies(model), copies(plain)) < 1e-5
        lasts.append(copies(model))
        optimizer.use_average()
        averages.append(copies(model))
        optimizer.use_last()
    return lasts, averages


# Loops


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_gives_the_model_reads_the_average_and_trains_at_the_last(kind):
    lasts, averages = course_by_hand(kind, 6)
    model = Net()
    optimizer = optimizer_of(model, kind)
    for at in range(6):
        seen = []

        def between(seen=seen):
            seen += [copies(model), states(model)]

        before = copies(model)
        step(model, optimizer, at, between)
        assert far(copies(model), averages[at]) < 1e-5 and optimizer.at_average
        assert far(seen[0], lasts[at - 1] if at else before) < 1e-5  # the gradient is of the last step
        assert same(seen[1], before)  # and a state_dict in between is of the published weights
        assert same(states(model), copies(model))
        with torch.no_grad():  # nobody who only looks moves them
            model(batch(99))
            model.eval()(batch(99))
        model(batch(99))["loss"].backward()
        model.train()
        assert far(copies(model), averages[at]) < 1e-5
    assert far(lasts[-1], averages[-1]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["closure", "compiled", "inner", "in_place", "accelerate", "named", "checkpointed"])
def test_other_loops_come_to_the_same_points(kind, way):
    _, averages = course_by_hand(kind, 5)
    model = Net()
    run, given = model, list(model.named_parameters()) if way == "named" else model
    if way == "in_place":
        model.compile(backend="eager")
    elif way in ("compiled", "inner"):
        run = torch.compile(model, backend="eager")
        given = run if way == "compiled" else model
    basis = random_dense(Net().named_parameters())
    if way == "compiled" and kind != "tensors":
        given = model  # names of a basis have no _orig_mod
    optimizer = optimizer_of(given, kind, basis=basis)
    if way == "named":
        optimizer.attach(model)
    if way == "accelerate":
        accelerator = Accelerator(cpu=True)
        run, optimizer_ = accelerator.prepare(model, optimizer)
    for at in range(5):

        def closure(at=at):
            optimizer.zero_grad()
            if way == "checkpointed":
                y = torch.utils.checkpoint.checkpoint(run, batch(at), use_reentrant=False)
            else:
                y = run(batch(at))
            y["loss"].backward()
            return y["loss"]

        if way == "closure":
            optimizer.step(closure)
        else:
            closure()
            (optimizer_ if way == "accelerate" else optimizer).step()
        assert far(copies(model), averages[at]) < 1e-5, at
        assert same(states(model), copies(model))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_the_model_have_the_published_weights_and_live_on_their_own(kind, tmp_path):
    model, optimizer = begun(kind)
    published = copies(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert same(copies(other), published)
        other.train()(batch(9))["loss"].backward()
        assert same(copies(other), published) and same(copies(model), published)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert same(states(other), copies(other))
        assert not same(copies(other), published)
    model(batch(9))  # beside it: the model itself goes to the last step, its state_dict does not
    assert not same(copies(model), published) and same(states(model), published)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_model_and_optimizer_are_copied_together(kind, how):
    model, optimizer = begun(kind)
    pair = model, optimizer
    if how == "deepcopy":
        other, again = copy.deepcopy(pair)
    elif how == "pickle":
        other, again = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other, again = torch.load(file, weights_only=False)
    again.attach(other)
    for at in range(4, 7):
        step(model, optimizer, at)
        step(other, again, at)
        assert same(copies(model), copies(other)), at
    assert same(states(model), states(other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64])
def test_a_saved_run_of_a_loop_goes_on_to_the_bit(kind, dtype):
    """In a basis what was rounded off weights below fp32 is not saved: there it goes on to rounding."""
    model, optimizer = begun(kind, dtype=dtype)
    other = Net(5, dtype)
    other.load_state_dict(model.state_dict())
    again = optimizer_of(other, kind)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for at in range(4, 8):
        step(model, optimizer, at)
        step(other, again, at)
        if kind == "tensors" or dtype not in LOW:
            assert same(copies(model), copies(other)), at
        else:
            assert far(copies(model), copies(other)) < 5e-3, at


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_between_forward_and_step_is_of_one_point(kind):
    model, optimizer = begun(kind)
    saved = []
    step(model, optimizer, 4, lambda: saved.extend(copy.deepcopy([model.state_dict(), optimizer.state_dict()])))
    other = Net(5)
    other.load_state_dict(saved[0])
    again = optimizer_of(other, kind)
    again.load_state_dict(saved[1])
    step(other, again, 4)
    assert same(copies(model), copies(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_a_scaler_skips_leaves_nothing_behind(kind):
    model, plain = Net(), Net()
    optimizer, without = optimizer_of(model, kind), optimizer_of(plain, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for at in range(5):
        optimizer.zero_grad()
        loss = model(batch(at))["loss"]
        scaler.scale(loss * (float("inf") if at == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if at != 2:
            step(plain, without, at)
        assert same(states(model), states(plain)) or far(states(model), states(plain)) < 1e-6
        if at != 2:
            assert far(copies(model), copies(plain)) < 1e-6
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_forward_pass_without_a_step_an_evaluation_is_at_the_average(kind):
    """A batch that is left out (`continue`), a training loss that is measured, the last step skipped by a scaler."""
    model, optimizer = begun(kind)
    published = copies(model)
    expected = model.eval()(batch(50))["logits"].detach()
    model.train()(batch(4))["loss"].backward()
    optimizer.zero_grad()
    found = model.eval()(batch(50))["logits"].detach()
    assert torch.equal(found, expected)
    assert same(copies(model), published)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_any_gradient_is_none(kind):
    model, optimizer = begun(kind)
    published = copies(model)
    optimizer.zero_grad()

    optimizer.step()
    assert same(copies(model), published)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_the_average_is_refused(kind):
    model, optimizer = begun(kind)
    optimizer.zero_grad()
    model.eval()(batch(4))["loss"].backward()
    with pytest.raises(RuntimeError, match=r"call use_last\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.use_last()  # what it says helps
    model.eval()(batch(4))["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", ["adamw", *KINDS])
def test_a_second_optimizer_begins_where_the_first_one_ended(first, second):
    """Two phases on one model, as after SFT: the first optimizer is still alive, in a Trainer or a cell."""
    model, optimizer = begun(first)
    start = copies(model)
    other = Net(5)
    other.load_state_dict(model.state_dict())
    make = {"adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2)}.get(
        second, lambda net: optimizer_of(net, second)
    )
    if second == "adamw":
        optimizer.detach()  # ours do so by themselves
    again, alone = make(model), make(other)
    for at in range(4, 7):
        step(model, again, at)
        step(other, alone, at)
        assert far(copies(model), copies(other)) < 1e-6, at
        assert same(states(model), copies(model)), at
    assert far(start, copies(model)) > 1e-4 and optimizer is not None


@pytest.mark.parametrize("kind", KINDS)
def test_two_optimizers_of_two_parts_of_a_model(kind):
    """Given a part, an optimizer knows that part: a state_dict of the whole has what is published of both."""
    model = Net()
    parts = [optimizer_of(model.a, kind), optimizer_of(model.b, "tensors")]
    for at in range(4):
        before = copies(model)
        for optimizer in parts:
            optimizer.zero_grad()
        model(batch(at))["loss"].backward()
        assert same(states(model), before)
        for optimizer in parts:
            optimizer.step()
        assert same(states(model), copies(model)) and not same(copies(model), before)


def test_tied_weights_are_published_under_both_names():
    model, ids = tiny_gpt2(), Tokens().ids[:8]
    for kind in KINDS:
        optimizer = optimizer_of(model, kind)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        published = model.lm_head.weight.detach().clone()
        model(input_ids=ids, labels=ids)
        assert not torch.equal(model.lm_head.weight, published)
        found = model.state_dict()
        assert torch.equal(found["lm_head.weight"], published)
        assert torch.equal(found["transformer.wte.weight"], published)
        del optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [0.0, 4.0])
def test_states_of_torch_distributed_checkpoints_go_on_to_the_bit(kind, average):
    """They name parameters, and number none; the first call of a fresh optimizer takes a step of zeros at lr 0."""
    model, optimizer = begun(kind, average=average)
    other = Net(5)
    other.load_state_dict(get_model_state_dict(model))
    again = optimizer_of(other, kind, average)
    set_optimizer_state_dict(other, again, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for at in range(4, 7):
        step(model, optimizer, at)
        step(other, again, at)
        assert same(copies(model), copies(other)), at


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_wrappers_and_functional_calls_of_torch(kind):
    _, averages = course_by_hand(kind, 4)
    for way in ("averaged", "wrapped", "functional"):
        model = Net()
        optimizer = optimizer_of(model, kind)
        around, moving, expected = Around(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)), None
        for at in range(4):
            optimizer.zero_grad()
            if way == "functional":
                torch.func.functional_call(model, dict(model.named_parameters()), (batch(at),))["loss"].backward()
            else:
                (around if way == "wrapped" else model)(batch(at))["loss"].backward()
            if at:
                state = around.state_dict()
                assert far([state[f"inside.{name}"] for name, _ in NAMED], averages[at - 1]) < 1e-5
            optimizer.step()
            moving.update_parameters(model)
            now = copies(model)
            expected = now if expected is None else [0.5 * old + 0.5 * p for old, p in zip(expected, now, strict=True)]
            assert far(now, averages[at]) < 1e-5, (way, at)
            assert far(copies(moving.module), expected) < 1e-6
            moving.train()(batch(9))  # a copy: nothing moves
            assert far(copies(moving.module), expected) < 1e-6 and same(copies(model), now)


class Heads(nn.Module):
    """Two heads, of which a batch has one: their gradients come and go."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(8, 6), nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)])
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x, head):
        return (self.heads[head](torch.tanh(self.trunk(x))) - 1).square().mean()


@pytest.mark.parametrize("resumed_at", [None, 1, 3, 6])
def test_heads_that_take_turns_have_an_average_each(resumed_at):
    def run(foreach, attached):
        model, course = Heads(), []
        make = lambda net: LearnedOptimizer(  # noqa: E731
            net if attached else net.named_parameters(), load_rule("default-lora", with_basis=False), average=4.0,
            foreach=foreach,
        )  # fmt: skip
        optimizer = make(model)
        for at in range(8):
            if at == resumed_at:
                saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
                model = Heads()
                model.load_state_dict(saved[0])
                optimizer = make(model)
                optimizer.load_state_dict(saved[1])
            optimizer.zero_grad()
            model(batch(at), at // 2 % 2).backward()
            optimizer.step()
            if not attached:
                optimizer.use_average()
            course.append(copies(model))
            if not attached:
                optimizer.use_last()
        return course

    expected = run(False, False)
    for foreach, attached in ((None, True), (False, True), (None, False)):
        for found, of_reference in zip(run(foreach, attached), expected, strict=True):
            assert far(found, of_reference) < 1e-6
    assert far(expected[-1], expected[-2]) > 1e-4


@pytest.mark.parametrize("which", ["random", "identity"])
def test_other_bases_have_two_points_too(which):
    layout = Layout.from_named_parameters(Net().named_parameters())
    basis = RandomBasis(layout, 6) if which == "random" else IdentityBasis(layout)
    model, other = Net(), Net(4)
    optimizer = optimizer_of(model, "rule", basis=basis)
    for at in range(4):
        step(model, optimizer, at)
    published = copies(model)
    model(batch(9))
    assert far(copies(model), published) > 1e-4 and same(states(model), published)
    other.load_state_dict(model.state_dict())
    again = optimizer_of(other, "rule", basis=basis)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for at in range(4, 7):
        step(model, optimizer, at)
        step(other, again, at)
    assert same(copies(model), copies(other))


def test_what_is_outside_the_basis_has_one_point():
    class Longer(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x, labels=None):
            return {"loss": self.head(super().forward(x)["logits"]).square().mean()}

    model = Longer()
    basis = random_dense(Net().named_parameters())
    optimizer = build_optimizer(model, "sl2o", basis=basis, outside="adamw", total_steps=9)
    for at in range(4):
        before = copies(model)
        step(model, optimizer, at, lambda before=before: same(states(model), before) or pytest.fail("not published"))
        assert same(states(model), copies(model))
    published = copies(model)
    model(batch(9))
    assert torch.equal(model.head.weight, published[4]) and not torch.equal(model.a.weight, published[0])
    assert optimizer.average == 4.0 and same(states(model), published)


# What a user changes


def replace(model, how):
    other = Net(9, next(model.parameters()).dtype)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif how == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
        return
    elif how == "copy_":
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.copy_(q)
    elif how == "data.copy_":
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data.copy_(q.data)
    elif how == "vector":
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(other.parameters()), model.parameters())
    elif how == "data =":
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = q.data.clone()
    elif how == "neg_":
        for p in model.parameters():
            p.data.neg_()
    elif how == "rows":
        for p in model.parameters():
            p.data = p.data.flip(0)
    elif how == "rows in place":
        for p in model.parameters():
            p.data.copy_(p.data.flip(0).clone())


HOWS = ["load_state_dict", "copy_", "data.copy_", "vector", "data =", "neg_", "rows", "rows in place"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_training_goes_on_from_weights_that_were_replaced(kind, how, dtype):
    model, optimizer = begun(kind, dtype=dtype)
    replace(model, how)
    given = copies(model)
    assert same(states(model), given)
    seen = []
    step(model, optimizer, 4, lambda: seen.extend([copies(model), states(model)]))
    if kind == "tensors" and dtype in LOW:  # element by element: what is by chance the old number keeps its last step
        assert far(seen[0], given) < 0.01 and same(seen[1], given)
    else:
        assert same(seen[0], given) and same(seen[1], given)
    assert far(copies(model), given) < 0.2  # and it is not undone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS[:5])
def test_weights_replaced_between_forward_and_step_stay(kind, how):
    model, optimizer = begun(kind)
    seen = []

    def between():
        replace(model, how)
        seen.extend([copies(model), states(model)])

    step(model, optimizer, 4, between)
    if how != "data.copy_" or kind == "tensors":  # behind torch's back, in a basis, it is only seen after the step
        assert same(seen[0], seen[1])
    assert far(copies(model), seen[0]) < 0.2


@pytest.mark.parametrize("kind", ["sgd", "rule"])
@pytest.mark.parametrize("average", [0.0, 4.0])
@pytest.mark.parametrize("when", ["after the step", "before the step"])
def test_coefficients_follow_weights_that_were_replaced(kind, average, when):
    model, start = Net(), copies(Net())
    basis = random_dense(model.named_parameters())
    optimizer = optimizer_of(model, kind, average, basis)
    for at in range(3):
        step(model, optimizer, at)
    c = torch.linspace(-0.5, 0.5, basis.dim)

    def replace_by_those_of_c():
        with torch.no_grad():
            for p, old, way in zip(model.parameters(), start, basis.lift(c), strict=True):
                p.copy_(old + way)

    if when == "after the step":
        replace_by_those_of_c()
        torch.testing.assert_close(optimizer.coefficients, c, rtol=0, atol=1e-5)
        step(model, optimizer, 3)
    else:
        step(model, optimizer, 3, replace_by_those_of_c)
    found = basis.coordinates(list(model.parameters())) - basis.coordinates(start)
    torch.testing.assert_close(optimizer.coefficients, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64])
@pytest.mark.parametrize("through", ["copy", "data"])
def test_rows_set_to_zero_between_two_steps_stay(kind, average, dtype, through):
    model, optimizer = begun(kind, dtype=dtype, average=average)
    with torch.no_grad():
        (model.a.weight.data if through == "data" else model.a.weight)[:4] = 0
    for group in optimizer.param_groups:
        group["lr"] = 1e-4 * group["lr"]
    step(model, optimizer, 4)
    assert float(model.a.weight.detach()[:4].abs().max()) < 1e-2
    optimizer.use_last()
    assert float(model.a.weight.detach()[:4].abs().max()) < 1e-2
    assert float(model.a.weight.detach()[4:].abs().max()) > 0.1


def test_what_sharpness_aware_steps_add_and_take_off_again_leaves_the_average():
    """A user's w + e - w is w to rounding; that a number differs in its last digit is no change of the weights."""

    def run(kind, exactly):
        model = Net()
        optimizer = optimizer_of(model, kind)
        for at in range(8):
            optimizer.zero_grad()
            model(batch(at))["loss"].backward()
            old = copies(model)
            ways = [0.01 * p.grad / p.grad.norm() for p in model.parameters()]
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), ways)
            optimizer.zero_grad()
            model(batch(at))["loss"].backward()
            with torch.no_grad():
                if exactly:
                    torch._foreach_copy_(list(model.parameters()), old)
                else:
                    torch._foreach_sub_(list(model.parameters()), ways)
            optimizer.step()
        published = copies(model)
        optimizer.use_last()
        return published, copies(model)

    for kind in ("sgd", "rule", "tensors"):
        (published, last), (expected, last_expected) = run(kind, False), run(kind, True)
        assert far(last, last_expected) < 1e-5 and far(expected, last_expected) > 1e-3
        assert far(published, expected) < 1e-5, kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [0.0, 4.0])
def test_what_is_frozen_after_construction_does_not_move(kind, average):
    model, optimizer = begun(kind, average=average)
    held = model.a.weight.detach().clone()
    model.a.weight.requires_grad_(False)
    for at in range(4, 7):
        step(model, optimizer, at)
        assert torch.equal(model.a.weight, held) and torch.equal(model.state_dict()["a.weight"], held)
        optimizer.use_last()
        assert torch.equal(model.a.weight, held)
    optimizer.use_average()
    assert torch.equal(model.a.weight, held)
    model.a.weight.requires_grad_(True)
    step(model, optimizer, 7)
    assert not torch.equal(model.a.weight, held)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(6, dtype=torch.complex64)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.fft.irfft(self.w * torch.fft.rfft(x, n=10), n=10).square().mean() + (self.b - 1).square().sum()


@pytest.mark.parametrize("average", [0.0, 4.0])
def test_complex_weights_have_two_points_as_well(average):
    model, start = Spectral(), Spectral()
    make = lambda net: LearnedOptimizer(net, load_rule("default-lora", with_basis=False), average=average)  # noqa: E731
    optimizer, x = make(model), torch.randn(4, 10)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    published, moved = model.w.detach().clone(), (model.w - start.w).detach()
    assert float(moved.real.abs().max()) > 1e-3 and float(moved.imag.abs().max()) > 1e-3
    model(x)
    assert torch.equal(model.state_dict()["w"], published)
    assert torch.equal(model.w, published) == (average == 0)
    other = Spectral()
    other.load_state_dict(model.state_dict())
    again = make(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, of in ((model, optimizer), (other, again)):
        of.zero_grad()
        net(x).backward()
        of.step()
    assert torch.equal(model.w, other.w)


@pytest.mark.parametrize("average", [0.0, 4.0])
def test_fp64_weights_are_moved_in_fp64(average):
    model = Net(dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-9 * torch.randn_like(p))
    start, basis = copies(model), random_dense(Net().named_parameters())
    optimizer = optimizer_of(model, "sgd", average, basis)
    for at in range(3):
        step(model, optimizer, at)
    c = optimizer.coefficients.double() * basis.units.double()
    for index, (p, old) in enumerate(zip(model.parameters(), start, strict=True)):
        expected = old + (basis.matrix(index).double().T @ c).view(p.shape)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-7 if average else 1e-14)
        assert not torch.equal(p.detach(), p.detach().float().double())


def test_merging_an_adapter_merges_what_is_published():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["a"]))
    optimizer = build_optimizer(model, average=9.0)
    assert optimizer.average == 9.0
    for at in range(4):
        step(model, optimizer, at)
    expected = model.eval()(batch(50))["logits"].detach()
    model.train()(batch(9))
    optimizer.listens = False
    last = model.eval()(batch(50))["logits"].detach()  # the break: where it trains
    optimizer.listens = True
    optimizer.use_average()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(batch(50))["logits"].detach(), expected)
    assert float((last - expected).abs().max()) > 1e-4


# Trainers


def arguments(folder, kind, with_basis, average=True, optim="sl2o", **options):
    words = "average=9" if average else "average=0"
    if with_basis:
        if not (folder / "basis").exists():
            random_dense(Net().named_parameters()).save_pretrained(folder / "basis")
        words = f"basis={folder / 'basis'},{'average=4' if average else 'average=0'},lr=5"
    settings = {"max_steps": 6, "per_device_train_batch_size": 16, "use_cpu": True, "report_to": "none", "seed": 1}
    settings |= {
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    settings |= {"learning_rate": 1.0, "optim": optim, "optim_args": words}
    kind = SL2OTrainingArguments if issubclass(kind, SL2OTrainer) else TrainingArguments
    return kind(str(folder / "out"), **{**settings, **options})


def trainer_of(folder, kind=Trainer, with_basis=True, callbacks=(), model=None, objects=None, **options):
    args = arguments(folder, kind, with_basis, **options)
    model = Net() if model is None else model
    return kind(model, args, train_dataset=ROWS, eval_dataset=ROWS[:32], callbacks=list(callbacks), **(objects or {}))


BOTH = pytest.mark.parametrize("kind, with_basis", [(SL2OTrainer, True), (Trainer, False)])
ALL = pytest.mark.parametrize("kind, with_basis", [(Trainer, True), (SL2OTrainer, True), (Trainer, False)])
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Calls(TrainerCallback):
    """Calls a function of the state in one hook."""

    def __init__(self, hook, call):
        setattr(self, hook, lambda args, state, control, **kwargs: call(state, control, kwargs["model"]))


def read(folder, step):
    return [load_file(folder / "out" / f"checkpoint-{step}" / "model.safetensors")[name] for name, _ in NAMED]


READING = ["on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_begin", "on_epoch_end"]


@ALL
def test_callbacks_in_every_hook_read_what_is_evaluated_and_saved(tmp_path, kind, with_basis):
    seen = {hook: [] for hook in [*READING, "on_train_end", "on_substep_end", "on_pre_optimizer_step"]}
    callbacks = [
        Calls(hook, lambda state, control, model, hook=hook: seen[hook].append(
            (state.global_step, copies(model), states(model))
        ))
        for hook in seen
    ]  # fmt: skip
    options = {**EVALUATED, "logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, kind, with_basis, callbacks, **options)
    trainer.train()
    saved = {at: read(tmp_path, at) for at in range(1, 7)}
    saved[0] = copies(Net())
    for hook, notes in seen.items():
        assert len(notes) >= (1 if "train" in hook or "epoch" in hook else 6), hook
        for at, weights, state in notes:
            assert same(state, saved[at]), (hook, at)
            if hook in READING or hook == "on_train_end":
                assert same(weights, saved[at]), (hook, at)
    assert any(not same(weights, saved[at]) for at, weights, _ in seen["on_substep_end"])  # there it trains
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for at, loss in enumerate(losses, 1):
        model = Net()
        model.load_state_dict(dict(zip([name for name, _ in NAMED], saved[at], strict=True)))
        args = arguments(tmp_path, Trainer, False, optim="adamw_torch", optim_args=None)
        assert Trainer(model, args, eval_dataset=ROWS[:32]).evaluate()["eval_loss"] == loss
    assert trainer.evaluate()["eval_loss"] == trainer.predict(ROWS[:32]).metrics["test_loss"] == losses[-1]
    trainer.save_model(tmp_path / "mine")
    assert same([load_file(tmp_path / "mine" / "model.safetensors")[name] for name, _ in NAMED], saved[6])
    without = trainer_of(tmp_path / "other", kind, with_basis, average=False, **options)
    without.train()
    assert far(copies(without.model), saved[6]) > 1e-4


@BOTH
@pytest.mark.parametrize("hook", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log"])
def test_evaluating_and_saving_in_a_hook_is_of_the_same_weights_and_changes_nothing(tmp_path, kind, with_basis, hook):
    options = {"gradient_accumulation_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    reference = trainer_of(tmp_path, kind, with_basis, **EVALUATED, **options)
    reference.train()
    losses = {e["step"]: e["eval_loss"] for e in reference.state.log_history if "eval_loss" in e}
    found, called = [], []

    def call(state, control, model):
        if state.global_step == 3 and not called:
            called.append(True)
            found.append(trainer.evaluate()["eval_loss"])
            found.append(trainer.predict(ROWS[:32]).metrics["test_loss"])
            trainer.save_model(tmp_path / "mine")
            found.append(states(model))

    trainer = trainer_of(tmp_path, kind, with_basis, [Calls(hook, call)], **options)
    trainer.train()
    assert found[0] == found[1] == losses[3] and losses[3] != losses[2]
    assert same(found[2], read(tmp_path, 3))
    saved = load_file(tmp_path / "mine" / "model.safetensors")
    assert same([saved[name] for name, _ in NAMED], read(tmp_path, 3))
    assert same(copies(trainer.model), copies(reference.model))


@BOTH
def test_a_state_dict_in_compute_loss_is_published(tmp_path, kind, with_basis):
    found = {}

    class Mine(kind):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training:
                found[self.state.global_step] = states(model), copies(model)
            return loss

    trainer = trainer_of(tmp_path, Mine, with_basis, **EVALUATED)
    trainer.train()
    for at in range(1, 6):
        assert same(found[at][0], read(tmp_path, at)) and (at == 1 or not same(found[at][1], read(tmp_path, at)))


@BOTH
@pytest.mark.parametrize("what", ["should_training_stop", "should_epoch_stop"])
def test_a_run_that_is_stopped_between_micro_batches_ends_at_the_average(tmp_path, kind, with_basis, what):
    def stop(state, control, model):
        if state.global_step == 3:
            setattr(control, what, True)
            control.should_training_stop = True

    ends = []
    callbacks = [Calls("on_substep_end", stop), Calls("on_train_end", lambda s, c, model: ends.append(copies(model)))]
    trainer = trainer_of(tmp_path, kind, with_basis, callbacks, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 3
    assert same(copies(trainer.model), states(trainer.model))
    assert same(ends[0], states(trainer.model))


@BOTH
def test_batches_that_a_subclass_skips(tmp_path, kind, with_basis):
    class Mine(kind):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 3:
                return torch.tensor(0.0)  # no forward pass, no gradient
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = trainer_of(tmp_path, Mine, with_basis, **EVALUATED)
    trainer.train()
    assert trainer.state.global_step == 6 and same(read(tmp_path, 3), read(tmp_path, 4))
    assert not same(read(tmp_path, 4), read(tmp_path, 5))


@BOTH
@pytest.mark.parametrize("hook", ["on_pre_optimizer_step", "on_step_end", "on_epoch_end"])
def test_a_checkpoint_on_sigterm_resumes_to_the_uninterrupted_run(tmp_path, kind, with_basis, hook):
    whole = trainer_of(tmp_path, kind, with_basis)
    whole.train()
    at = 5 if hook == "on_epoch_end" else 3

    def request(state, control, model):
        if state.global_step == at:
            manager = next(
                one.jit_manager for one in trainer.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)
            )
            manager.is_checkpoint_requested = True  # what the handler of the signal does
            control.should_epoch_stop = hook == "on_epoch_end"

    early = "on_step_end" if hook == "on_epoch_end" else hook
    trainer = trainer_of(tmp_path, kind, with_basis, [Calls(early, request)], enable_jit_checkpoint=True)
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda one: isinstance(one, JITCheckpointCallback))  # after the request
    trainer.train()
    folders = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(folders) == 1 and folders[0].name == f"checkpoint-{at}"
    if hook in ("on_step_end", "on_epoch_end"):
        assert same(copies(trainer.model), read(tmp_path, at))
    resumed = trainer_of(tmp_path, kind, with_basis)
    resumed.train(resume_from_checkpoint=str(folders[0]))
    assert same(copies(resumed.model), copies(whole.model))


@pytest.mark.parametrize(
    "kind, with_basis, options",
    [
        (Trainer, True, {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}),
        (SL2OTrainer, True, {}),
        (Trainer, False, {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}),
    ],
)  # fmt: skip
def test_resumed_at_any_checkpoint_is_the_uninterrupted_run_to_the_bit(tmp_path, kind, with_basis, options):
    whole = trainer_of(tmp_path, kind, with_basis, **EVALUATED, **options)
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    for at in (1, 2, 5):
        resumed = trainer_of(tmp_path / "again", kind, with_basis, model=Net(3), **EVALUATED, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert same(copies(resumed.model), copies(whole.model)), at
        assert [e["eval_loss"] for e in resumed.state.log_history if "eval_loss" in e] == losses, at


def test_lora_resumed_at_any_checkpoint_is_the_uninterrupted_run_to_the_bit(tmp_path):
    def go(folder, resume=None):
        torch.manual_seed(4)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["a", "b"], lora_dropout=0.1))
        trainer = trainer_of(folder, Trainer, False, model=model, max_steps=5, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return copies(trainer.model)

    whole = go(tmp_path)
    for at in (1, 4):
        assert same(go(tmp_path / "again", str(tmp_path / "out" / f"checkpoint-{at}")), whole), at


@BOTH
def test_a_callback_added_between_two_runs(tmp_path, kind, with_basis):
    trainer = trainer_of(tmp_path, kind, with_basis, max_steps=3)
    trainer.train()
    first, seen = copies(trainer.model), []
    trainer.add_callback(Calls("on_step_end", lambda s, c, model: seen.append((copies(model), states(model)))))
    trainer.add_callback(Calls("on_step_begin", lambda s, c, model: seen.append((copies(model), states(model)))))
    trainer.train()
    assert len(seen) == 6 and all(same(a, b) for a, b in seen)
    assert same(seen[0][0], first) and same(seen[-1][0], copies(trainer.model))


@BOTH
@pytest.mark.parametrize("how", ["best", "load_state_dict", "data.copy_", "data ="])
def test_a_second_run_goes_on_from_the_weights_that_are_there(tmp_path, kind, with_basis, how):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, kind, with_basis, **(EVALUATED | options if how == "best" else {}))
    trainer.train()
    if how == "best":
        best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        assert best < 6 and same(copies(trainer.model), read(tmp_path, best))
    else:
        replace(trainer.model, how)
    given, seen = copies(trainer.model), []
    begins = Calls("on_pre_optimizer_step", lambda s, c, model: seen.append((copies(model), states(model))))
    trainer.add_callback(begins)
    trainer.train()
    assert same(seen[0][0], given) and same(seen[0][1], given)
    assert not same(copies(trainer.model), given)


@pytest.mark.parametrize("with_basis", [True, False])
@pytest.mark.parametrize("second", ["adamw_torch", "sl2o"])
def test_a_second_trainer_of_the_same_model_begins_where_the_first_one_ended(tmp_path, with_basis, second):
    """SFT, then another phase with a Trainer of its own; the first one is not deleted."""
    model = Net()
    first = trainer_of(tmp_path, Trainer, with_basis, model=model)
    first.train()
    start, seen = copies(model), []
    other = Net()
    other.load_state_dict(model.state_dict())
    options = {"optim": second, "save_strategy": "steps", "save_steps": 6}
    if second == "adamw_torch":
        options |= {"optim_args": None, "learning_rate": 1e-2}
    begins = Calls("on_pre_optimizer_step", lambda s, c, model: seen.append(copies(model)))
    again = trainer_of(tmp_path, Trainer, with_basis, [begins], model=model, **options)
    again.train()
    assert same(seen[0], start)
    assert same(read(tmp_path, 6), copies(model)) and not same(copies(model), start)
    alone = trainer_of(tmp_path / "alone", Trainer, with_basis, model=other, **options)
    alone.train()
    assert far(copies(model), copies(other)) < 1e-6 and first.model is model


@BOTH
@pytest.mark.parametrize(
    "own, length",
    [
        ("create_scheduler", {}), ("create_scheduler", {"max_steps": -1, "num_train_epochs": 1}),
        ("training_step", {}), ("compute_loss", {}), ("optimizers", {}),
        ("optimizers", {"max_steps": -1, "num_train_epochs": 1}),
    ],
)  # fmt: skip
def test_subclasses_with_steps_of_their_own(tmp_path, kind, with_basis, own, length):
    class Mine(kind):
        if own == "create_scheduler":

            def create_scheduler(self, num_training_steps, optimizer=None):
                self.lr_scheduler = get_constant_schedule(self.optimizer if optimizer is None else optimizer)
                return self.lr_scheduler

        if own == "training_step":

            def training_step(self, model, inputs, num_items_in_batch=None):
                model.train()
                loss = model(**self._prepare_inputs(inputs))["loss"]
                self.accelerator.backward(loss)
                return loss.detach()

        if own == "compute_loss":

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                y = model(**inputs)
                loss = (y["logits"] - inputs["labels"]).square().mean()
                return (loss, y) if return_outputs else loss

    reference = trainer_of(tmp_path, kind, with_basis, **length)
    reference.train()
    model, objects = Net(), {}
    if own == "optimizers":
        basis = {"basis": str(tmp_path / "basis"), "lr": 5.0, "average": 4.0} if with_basis else {"average": 9.0}
        optimizer = build_optimizer(list(model.named_parameters()), "sl2o", total_steps=6, **basis)
        objects["optimizers"] = (optimizer, get_constant_schedule(optimizer))
    trainer = trainer_of(tmp_path / "own", Mine, with_basis, model=model, objects=objects, **length)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer.average > 0 and optimizer.at_average
    assert far(copies(trainer.model), copies(reference.model)) < 1e-6
    assert same(states(trainer.model), copies(trainer.model))


@BOTH
@pytest.mark.parametrize("where", ["callback", "pre_hook"])
def test_gradients_that_are_changed_before_the_step_count(tmp_path, kind, with_basis, where):
    def zero(*args):
        for p in trainer.model.parameters():
            p.grad.zero_()

    trainer = trainer_of(tmp_path, kind, with_basis, [Calls("on_pre_optimizer_step", zero)] * (where == "callback"))
    if where == "pre_hook":
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(lambda *args: zero())
    trainer.train()
    assert same(copies(trainer.model), copies(Net()))
    trainer = trainer_of(tmp_path, kind, with_basis)
    trainer.train()
    assert not same(copies(trainer.model), copies(Net()))


# What is pruned


class Allocates(TrainerCallback):
    def __init__(self, hook):
        setattr(self, hook, self.allocate)

    def allocate(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("hook", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_ranks_that_adalora_prunes_are_zero_in_what_is_evaluated_and_saved(tmp_path, hook):
    config = AdaLoraConfig(
        init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=12, target_modules=["c_attn"],
        fan_in_fan_out=True, beta1=0.5, beta2=0.5, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_gpt2(), config)
    args = arguments(
        tmp_path, Trainer, False, max_steps=12, save_strategy="steps", save_steps=12, per_device_train_batch_size=8
    )
    trainer = Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(8), callbacks=[Allocates(hook)])
    trainer.train()
    factors = {name: p.detach() for name, p in model.named_parameters() if "lora_E" in name}
    assert len(factors) == 2 and sum(p.numel() for p in factors.values()) == 12
    # in on_pre_optimizer_step the optimizer's step comes after the mask, as AdamW's does: see the values before it
    zero = sum(int((p == 0).sum()) for p in factors.values())
    saved = load_file(tmp_path / "out" / "checkpoint-12" / "adapter_model.safetensors")
    in_file = torch.cat([value.flatten() for name, value in saved.items() if "lora_E" in name])
    alive = torch.cat([p[p != 0].flatten() for p in factors.values()])
    if hook == "on_optimizer_step":
        assert zero == 8 and torch.equal(in_file, alive)  # a file has the ranks that are left
        trainer.optimizer.train()
        assert sum(int((p == 0).sum()) for p in factors.values()) == 8


# Coefficients and starts


def fits(weights, start, basis, c, atol):
    for p, old, way in zip(weights, start, basis.lift(c), strict=True):
        torch.testing.assert_close(p.double(), old.double() + way.double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}), (torch.float32, {"best": True}), (torch.float32, {"best": True, "removed": True}),
        (torch.float32, {"save_only_model": True}), (torch.float32, {"best": True, "save_only_model": True}),
        (torch.bfloat16, {"best": True, "removed": True}), (torch.bfloat16, {"save_only_model": True}),
        (torch.float64, {"best": True, "removed": True}),
    ],
)  # fmt: skip
def test_saved_coefficients_fit_the_saved_weights(tmp_path, options, dtype):
    """theta = theta_0 + lift(c), in memory and in every checkpoint, after other weights were loaded too."""
    start, options = copies(Net(dtype=dtype)), dict(options)
    atol = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float64: 1e-6}[dtype]
    best, removed = options.pop("best", False), options.pop("removed", False)
    if best:
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}

    def remove(state, control, model):
        if removed:
            (tmp_path / "out" / f"checkpoint-{state.global_step}" / "coefficients.safetensors").unlink()

    def of_file(folder):
        tensors = load_file(folder / "model.safetensors")
        c = load_file(folder / "coefficients.safetensors")["coefficients"]
        fits([tensors[name] for name, _ in NAMED], start, basis, c, atol)
        return c

    make = lambda **more: trainer_of(  # noqa: E731
        tmp_path, SL2OTrainer, True, [Calls("on_save", remove)], model=Net(dtype=dtype), **EVALUATED, **options, **more
    )
    trainer = make()
    trainer.train()
    basis = trainer.subspace_optimizer.basis
    fits(copies(trainer.model), start, basis, trainer.subspace_optimizer.coefficients, atol)
    trainer.save_model(tmp_path / "mine")
    mine = of_file(tmp_path / "mine")
    if not removed:
        course = [of_file(tmp_path / "out" / f"checkpoint-{at}") for at in range(1, 7)]
        assert not torch.equal(course[0], course[-1])
        assert torch.equal(mine, course[-1]) != best
    trainer.train()
    fits(copies(trainer.model), start, basis, trainer.subspace_optimizer.coefficients, atol)
    if options.get("save_only_model"):
        resumed = make(max_steps=8)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        of_file(tmp_path / "out" / "checkpoint-8")
        fits(copies(resumed.model), start, basis, resumed.subspace_optimizer.coefficients, atol)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("recorded"), Net()
    recorder = TrajectoryCallback(folder / "trajectory", every_steps=2)
    args = arguments(folder, Trainer, False, optim="adamw_torch", optim_args=None, learning_rate=1e-2, max_steps=20)
    Trainer(model, args, train_dataset=ROWS, callbacks=[recorder]).train()
    fit_basis(Trajectory(folder / "trajectory"), 4, progress=False).save_pretrained(folder / "basis")
    return folder, copies(model)


def starts_warned(caplog):
    return [record for record in caplog.records if "not those that the basis was made from" in record.getMessage()]


@pytest.mark.parametrize("kind", [Trainer, SL2OTrainer])
def test_another_start_than_the_basis_was_made_from_is_named_once(tmp_path, kind, fitted, caplog):
    caplog.set_level(logging.WARNING, logger="hf_sl2o")
    folder, end = fitted
    (tmp_path / "basis").symlink_to(folder / "basis")

    def go(model, resume=None, **options):
        caplog.clear()
        trainer = trainer_of(tmp_path, kind, True, model=model, **options)
        trainer.train(resume_from_checkpoint=resume)
        return len(starts_warned(caplog))

    assert go(Net(), save_strategy="steps", save_steps=3) == 0
    assert go(Net(), str(tmp_path / "out" / "checkpoint-3")) == 0
    assert go(Net(5), str(tmp_path / "out" / "checkpoint-3")) == 0  # a resumed run has its weights from there
    for dtype in LOW:
        assert go(Net(dtype=dtype)) == 0
    model = Net()
    with torch.no_grad():
        for p, q in zip(model.parameters(), end, strict=True):
            p.copy_(q)
    assert go(model) == 0  # the end of the recorded run
    assert go(Net(5)) == 1
    model = Net()
    nn.init.normal_(model.b.weight)
    assert go(model) == 1
    assert "b.weight" in starts_warned(caplog)[0].getMessage()
