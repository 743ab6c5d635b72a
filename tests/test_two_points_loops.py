"""The two points of a run with an average in plain loops: whoever reads the model has the average."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_sl2o import LearnedOptimizer
from hf_sl2o.rules import load_rule

from .conftest import Tokens, random_dense, tiny_gpt2
from .two_points_cases import KINDS, LOW, NAMED, Net, batch, begun, copies, far, optimizer_of, same, states, step


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
