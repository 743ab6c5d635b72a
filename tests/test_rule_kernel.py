"""The compiled step of a rule, beside the same step in torch."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_sl2o.rules.rule
from hf_sl2o import LearnedOptimizer, LSTMRule, Rule, RuleConfig
from hf_sl2o.rules import SHIPPED_RULES, TensorLSTMRule, kernel

SHIPPED = ("default", "default-lora", "paper-cnn", "paper-transformer")
OWN = {
    "l2o-dm": RuleConfig.preset("l2o-dm"),  # two layers of 20, the gradient alone, no tanh
    "quirks": RuleConfig.preset("paper-cnn", published_quirks=True),
    "all inputs": RuleConfig(
        momenta=(0.3, 0.99), progress=True, tensor_scale=True, agreement=True, log_sign=7.0, hidden_size=5,
        num_layers=2, reset_cell_every=2, output_scale=0.1, bias_correction_offset=1, beta1=0.4, eps=1e-3,
    ),
    "all inputs of a tensor": RuleConfig(
        momenta=(0.3, 0.99), progress=True, tensor_scale=True, per_tensor=4, distance=True, log_sign=5.0,
    ),
}  # fmt: skip
EVERY = (*SHIPPED, *OWN)
SIZES = (33, 1, 250, 7, 16, 100)  # below, at and above a vector's sixteen, and none a multiple of it but one
N = sum(SIZES)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    if kernel._library() is None:
        pytest.skip("there is no C++ compiler here, or HF_SL2O_NATIVE is 0: torch does the step")
    monkeypatch.setattr(kernel, "LEAST", 1)
    monkeypatch.setitem(hf_sl2o.rules.rule._CHUNK, "cpu", 64)


def make(name):
    torch.manual_seed(0)
    return Rule.from_pretrained(SHIPPED_RULES / name) if name in SHIPPED else Rule.from_config(OWN[name])


def gradients(steps, sizes=SIZES):
    n = sum(sizes)
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator) * torch.logspace(-4, 2, n) for _ in range(steps)]


def updates(rule, given, sizes=SIZES, *, compiled=True, dtype=torch.float32):
    """Deltas of some steps, (T, N), and the state after them."""
    rule = copy.deepcopy(rule).to(dtype)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    state, deltas, done = rule.init_state(sum(sizes), weights=weights, dtype=dtype), [], []
    with pytest.MonkeyPatch.context() as patch:

        def spied(*args, **options):
            done.append(compiled and kernel.fused_update_(*args, **options))
            return done[-1]

        patch.setattr(hf_sl2o.rules.rule, "fused_update_", spied)
        patch.setattr(kernel, "LEAST", 1 if compiled else 1 << 60)
        for g in given:
            deltas.append(rule.update_(g.to(dtype, copy=True), state, sizes=sizes, total_steps=9))
    assert done == [compiled] * len(given)
    return torch.stack(deltas), state


def far(a, b):
    """The largest distance, over b's own size and a tenth of its mean, as it may cross zero."""
    a, b = a.double(), b.double()
    return float(((a - b).abs() / (b.abs() + 0.1 * b.abs().mean() + 1e-300)).max()) if a.numel() else 0.0


@pytest.mark.parametrize("name", EVERY)
def test_a_step_is_that_of_torch(name):
    rule = make(name)
    deltas, state = updates(rule, gradients(1))
    expected, of_torch = updates(rule, gradients(1), compiled=False)
    assert deltas.shape == (1, N) and deltas.abs().min() > 0
    assert far(deltas, expected) < 1e-5
    for field, ours, theirs in zip(state._fields, state, of_torch, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, field
        assert far(ours, theirs) < 1e-5, field
    with torch.no_grad():  # the break
        broken = copy.deepcopy(rule)
        (broken.mix if isinstance(broken, TensorLSTMRule) else broken.head).weight[0, 0] *= 1.1
    assert far(updates(broken, gradients(1))[0], expected) > 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_twenty_steps_are_as_exact_as_those_of_torch(name):
    rule = make(name)
    deltas, state = updates(rule, gradients(20))
    of_torch, theirs = updates(rule, gradients(20), compiled=False)
    for field in ("exp_avg", "exp_avg_sq"):
        assert far(getattr(state, field), getattr(theirs, field)) < 1e-6
    if state.exp_avg.dtype == torch.bfloat16:  # in fp64 m is fp64
        assert far(deltas, of_torch) < 1e-4
        return
    exact, _ = updates(rule, gradients(20), compiled=False, dtype=torch.float64)
    assert far(deltas, exact) < 2 * far(of_torch, exact) + 1e-5
    assert (deltas - exact).square().mean() < 2 * (of_torch - exact).square().mean() + 1e-18
    assert far(deltas[1:], exact[:-1]) > 1e-2  # the break: a step late


def test_the_seven_columns_come_from_where_they_should():
    rule = make("all inputs")
    whole, _ = updates(rule, gradients(4))
    one, _ = updates(rule, gradients(4), sizes=(N,))
    assert far(one, whole) > 1e-3  # scale and cosine are those of each tensor
    other = Rule.from_config(OWN["quirks"])
    assert other.for_kernel().weights.numel() == 8 * 4 * (1 + 2 + 8) + 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("name", EVERY)
def test_odd_gradients_go_through_as_in_torch(name, value):
    rule = make(name)
    given = gradients(3)
    given[1][[0, 40, 300]] = value
    if value == 0:
        given[1:] = [torch.zeros(N)] * 2
    deltas, state = updates(rule, given)
    expected, of_torch = updates(rule, given, compiled=False)
    tiny = 1e-6 * float(expected[0].abs().mean())
    torch.testing.assert_close(deltas, expected, rtol=2e-4, atol=tiny, equal_nan=True)
    for ours, theirs in zip(state, of_torch, strict=True):
        tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6, equal_nan=True)
    if value != value:
        assert deltas[1].isnan().any() and not deltas[1].isnan().all()


def test_no_gradient_ever_no_step():
    for name in EVERY:
        deltas, state = updates(make(name), [torch.zeros(N)] * 3)
        assert not deltas.any() and not state.exp_avg.any() and not state.exp_avg_sq.any()


def test_a_step_that_is_not_finite_changes_nothing():
    rule = make("default")
    state = rule.init_state(N)
    rule.update_(gradients(1)[0], state, total_steps=9)
    before = [tensor.clone() for tensor in state]
    g = gradients(1)[0]
    rule.update_(g, state, finite=torch.tensor(False), total_steps=9)
    assert not g.any() and all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    rule.update_(g, state, finite=torch.tensor(True), total_steps=9)
    assert int(state.step) == 2 and not torch.equal(before[3], state.hidden)


@pytest.mark.parametrize("name", ["default", "default-lora", "all inputs"])
def test_threads_and_neighbours_change_no_bit(name):
    rule, sizes = make(name), (20_000, 3, 8192, 25_001)
    monkeypatched = torch.get_num_threads()
    found = []
    numbers = torch.ones(4, 3 + rule.config.input_size)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            state, g = (
                rule.init_state(sum(sizes), weights=[torch.ones(size) for size in sizes]),
                gradients(1, sizes)[0],
            )
            assert kernel.fused_update_(rule, g, state, numbers, sizes=sizes, finite=None, total_steps=9)
            found.append((g, state))
    finally:
        torch.set_num_threads(monkeypatched)
    (one, after_one), (two, after_two) = found
    assert torch.equal(one, two) and all(torch.equal(a, b) for a, b in zip(after_one, after_two, strict=True))
    # each coordinate alone: every tensor has the same numbers here
    where = slice(28_190, 28_211)
    alone = gradients(1, sizes)[0][where].clone()
    state = rule.init_state(len(alone), weights=[torch.ones(len(alone))])
    assert kernel.fused_update_(rule, alone, state, numbers[:1], sizes=None, finite=None, total_steps=9)
    assert torch.equal(alone, one[where])


@pytest.mark.parametrize("sizes", [SIZES, (20_000, 3, 8192, 25_001)])
def test_sums_over_tensors(sizes):
    n, generator = sum(sizes), torch.Generator().manual_seed(0)
    g, v = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    vectors = [torch.randn(n, generator=generator).bfloat16(), torch.randn(n, 3, generator=generator)[:, 1]]
    found = kernel.fused_sums(g, vectors, v, sizes)
    products = [g.double() ** 2, v.double()]
    for vector in vectors:
        products += [g.double() * vector.double(), vector.double() ** 2]
    for sums, product in zip(found, products, strict=True):
        expected = [part.sum() for part in product.split(sizes)]
        scale = max(float(part.abs().sum()) for part in product.split(sizes))
        torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-6, atol=1e-8 * scale)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads if threads < 3 else 1)
        again = kernel.fused_sums(g, vectors, v, sizes)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # the break: numbers move from one tensor to the next
    assert not torch.allclose(kernel.fused_sums(g, [], v, (sizes[0] + 1, sizes[1] - 1, *sizes[2:]))[1], found[1])
    g[0] = float("nan")
    assert kernel.fused_sums(g, [], v, sizes)[0].isnan().tolist() == [True, *[False] * (len(sizes) - 1)]


def test_sums_that_the_kernel_does_not_know_are_left_to_torch():
    g, v = torch.ones(N), torch.ones(N)
    assert len(kernel.fused_sums(g, [], v, SIZES)) == 2
    assert kernel.fused_sums(g, [], v, (N - 1,)) is None
    assert kernel.fused_sums(g.double(), [], v.double(), SIZES) is None
    assert kernel.fused_sums(torch.ones(2 * N)[::2], [], v, SIZES) is None
    assert kernel.fused_sums(g, [torch.ones(2 * N).bfloat16()[::2]], v, SIZES) is None
    assert kernel.fused_sums(g, [g] * 33, v, SIZES) is None
    learns = g.clone().requires_grad_()
    assert kernel.fused_sums(learns, [], v, SIZES) is None
    with torch.no_grad():
        assert kernel.fused_sums(learns, [], v, SIZES)[0].sum() == N


class Halved(LSTMRule):
    def _output(self, *args):
        output, hidden, cell = super()._output(*args)
        return output / 2, hidden, cell


def unknown():
    rule, state = LSTMRule(), LSTMRule().init_state(N)
    hooked = LSTMRule()
    hooked.cells[0].register_forward_hook(lambda module, inputs, output: None)
    return {
        "an embedding": (Rule.from_config(RuleConfig.preset("rnnprop")), None),
        "an expression": (Rule.from_config(RuleConfig.preset("symbolic")), None),
        "a subclass": (Halved(), None),
        "a hook": (hooked, None),
        "many units": (LSTMRule(RuleConfig(hidden_size=65)), None),
        "many columns": (LSTMRule(RuleConfig(momenta=(0.5,) * 31)), None),
        "fp64": (LSTMRule().double(), LSTMRule().init_state(N, dtype=torch.float64)),
        "steps of their own": (rule, state._replace(step=torch.arange(float(N)))),
        "apart in memory": (rule, state._replace(exp_avg=torch.zeros(2 * N)[::2])),
    }


@pytest.mark.parametrize("what", sorted(unknown()))
def test_what_the_kernel_does_not_know_is_done_by_torch(what):
    rule, state = unknown()[what]
    state = rule.init_state(N) if state is None else state
    g = gradients(1)[0].to(state.exp_avg_sq.dtype)
    tensors = rule.tensor_step(rule.tensor_inputs(g, state), state.tensors)[0]
    before = [tensor.clone() for tensor in (g, *state)]
    assert not kernel.fused_update_(rule, g, state, tensors, sizes=None, finite=None)
    assert all(torch.equal(a, b) for a, b in zip(before, (g, *state), strict=True))
    expected, _ = rule(g, state)
    torch.testing.assert_close(rule.update_(g, state), expected.detach())


def test_few_coordinates_and_numbers_in_tensors_are_left_to_torch(monkeypatch):
    rule = LSTMRule()
    options = {"sizes": None, "finite": None}
    tensors = torch.ones(1, 2)
    assert kernel.fused_update_(rule, torch.ones(N), rule.init_state(N), tensors, **options)
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    assert not kernel.fused_update_(rule, torch.ones(N), rule.init_state(N), tensors, betas=betas, **options)
    monkeypatch.setattr(kernel, "LEAST", N + 1)
    assert not kernel.fused_update_(rule, torch.ones(N), rule.init_state(N), tensors, **options)
    monkeypatch.setattr(kernel, "LEAST", 1)
    monkeypatch.setattr(kernel, "load_native", lambda source: None)  # no compiler
    assert not kernel.fused_update_(rule, torch.ones(N), rule.init_state(N), tensors, **options)


def test_progress_without_a_number_of_steps_is_refused_all_the_same():
    rule = make("default")
    with pytest.raises(ValueError, match="total_steps is None"):
        rule.update_(torch.ones(N), rule.init_state(N))


def test_autograd_sees_that_the_state_was_changed():
    rule = LSTMRule()
    state, w = rule.init_state(N), torch.ones(N, requires_grad=True)
    kept = (state.hidden[:, 0, 0] * w).sum()
    rule.update_(torch.ones(N), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def losses(name, compiled, steps=200):
    """Of a regression, whose weight is apart in memory; a deep network would make 1 % of a last digit."""
    torch.manual_seed(0)
    model = nn.Linear(20, 30)
    model.weight = nn.Parameter(torch.randn(20, 30).t() / 20**0.5)
    assert not model.weight.is_contiguous()
    x = torch.randn(256, 20)
    y = x @ torch.randn(20, 30) / 20**0.5 + 0.3 * torch.randn(256, 30)  # the noise keeps the loss above 0
    optimizer = LearnedOptimizer(model, make(name), lr=0.01 if name == "default" else 1.0, total_steps=steps)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LEAST", 1 if compiled else 1 << 60)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["default", "default-lora"])
def test_a_run_ends_where_that_of_torch_ends(name):
    ours, theirs = losses(name, True), losses(name, False)
    assert ours[-1] < 0.5 * ours[0]
    for step in (5, 20, 60, 199):
        assert ours[step] == pytest.approx(theirs[step], rel=1e-4)
    assert ours[5] != pytest.approx(theirs[4], rel=1e-4)  # the break: a step less


def test_triton_kernel_in_its_interpreter():
    pytest.importorskip(
        "triton", reason="Triton comes with torch for CUDA; pip install triton runs its interpreter here"
    )
    worker = Path(__file__).with_name("triton_worker.py")
    out = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr[-2000:]
    *rows, checks = map(json.loads, out.stdout.splitlines())
    assert len(rows) == 5 and checks == [True, False]  # other weights are not taken for the rule's
    for row in rows:
        assert row["deltas"] < 1e-4 and max(row["state"].values()) < 5e-4 and row["skipped"], row
        assert row["broken"] > 1e-3, row
        assert row["odd"] < 1e-4, row
