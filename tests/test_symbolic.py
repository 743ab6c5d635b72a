"""Symbolic regression of an update rule, on rules that are known, and beside numpy and scipy."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from scipy import special, stats

from hf_sl2o import LSTMRule, RuleConfig, SymbolicRule
from hf_sl2o.analysis import symbolic
from hf_sl2o.analysis.scores import Fitted, score_expression, values_of
from hf_sl2o.analysis.symbolic import fit_symbolic, refit
from hf_sl2o.rules.config import EXPRESSIONS
from hf_sl2o.rules.expressions import FUNCTIONS, OPERATORS, Node, parse

ORACLE = {
    "abs": np.abs, "sign": np.sign, "log": lambda x: np.log(np.abs(x)), "sqrt": lambda x: np.sqrt(np.abs(x)),
    "relu": lambda x: np.maximum(x, 0), "exp": np.exp, "tanh": np.tanh, "sinh": np.sinh, "asinh": np.arcsinh,
    "erfc": special.erfc, "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide,
    "**": lambda x, y: np.abs(x) ** y,
}  # fmt: skip
SHORT = {"generations": 4, "population": 40, "max_complexity": 9, "progress": False}
NOISE = 0.01


def inputs(count=2000, seed=0):
    generator = np.random.default_rng(seed)
    g = generator.normal(size=count) * 1.2
    return 0.5 * g + 0.4 * generator.normal(size=count), g, NOISE * generator.normal(size=count)


def tanh_rule(count=2000, seed=0):
    m, g, noise = inputs(count, seed)
    return m, g, 0.2 * np.tanh(g) + noise


@pytest.fixture(scope="module")
def front():
    return fit_symbolic(*tanh_rule(), **SHORT)


def test_a_rule_that_is_known_is_found_to_its_noise(front):
    short = [fitted for fitted in front if fitted.complexity <= 4][-1]
    assert short.mse < 1.1 * NOISE**2
    assert short.text.endswith("tanh(g)") and float(short.text.split()[0]) == pytest.approx(0.2, abs=2e-3)
    held_out = short.score(*tanh_rule(seed=1))
    assert held_out["mse"] < 1.1 * NOISE**2 and held_out["pearson_r"] > 0.995


def test_a_front_is_sorted_and_each_is_closer_than_all_before(front):
    assert len(front) >= 3 and front[0].complexity == 1
    for before, after in zip(front, front[1:], strict=False):
        assert before.complexity < after.complexity and before.mse > after.mse
    assert front[-1].complexity <= SHORT["max_complexity"]
    assert front[0].mse <= 1.0001 * tanh_rule()[2].var()  # no worse than a constant


def test_what_is_returned_is_text_and_a_rule(front):
    m, g, delta = tanh_rule()
    for fitted in front:
        expression = parse(fitted.text)
        assert str(expression) == fitted.text and expression.complexity == fitted.complexity
        values = expression(torch.tensor(m), torch.tensor(g)).numpy()
        assert fitted.mse == pytest.approx(np.mean((values - delta) ** 2), rel=1e-12)
        rule = SymbolicRule(RuleConfig(expression=fitted.text))
        # in the first step m~ = g~ = sign(gradient)
        step, _ = rule(torch.tensor([2.0, -3.0]), rule.init_state(2))
        ones = torch.tensor([1.0, -1.0])
        torch.testing.assert_close(step, expression(ones, ones), rtol=1e-4, atol=1e-6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        front[0].mse = 0.0


def test_numbers_are_rounded(front):
    for fitted in front:
        for node in parse(fitted.text).walk():
            assert node.name != "number" or node.value == float(f"{node.value:.6g}")


def test_a_seed_is_repeatable(front):
    again = fit_symbolic(*(torch.tensor(x) for x in tanh_rule()), **SHORT)  # and tensors are taken
    assert again == front
    other = fit_symbolic(*tanh_rule(), **{**SHORT, "seed": 1})
    assert other != front
    assert [x for x in other if x.complexity <= 4][-1].mse < 1.1 * NOISE**2


def test_delta_that_has_nothing_to_do_with_its_inputs_is_not_found(front):
    m, g, delta = tanh_rule()
    shuffled = np.random.default_rng(0).permutation(delta)
    found = fit_symbolic(m, g, shuffled, **SHORT)[-1].score(m, g, shuffled)
    assert (found["pearson_r"] or 0) < 0.2 < 0.99 < front[-1].score(m, g, delta)["pearson_r"]


def test_numbers_inside_are_fitted():
    m, g, noise = inputs()
    m[0], g[0] = 3.0, -3.0
    delta = 0.3 * np.tanh(2.5 * g) - 0.1 * np.arcsinh(5 * m) + noise
    node = parse("0.1 * tanh(g * 1) - 0.3 * asinh(m * 1)")
    fitted, mse = symbolic._fit(node, torch.tensor(m), torch.tensor(g), delta, steps=50)
    assert mse < 1.1 * NOISE**2
    assert symbolic._numbers(fitted) == pytest.approx([0.3, 2.5, 0.1, 5], rel=0.05)
    exponent, _ = symbolic._fit(parse("1 * m**3"), torch.tensor(m), torch.tensor(g), delta, steps=5)
    assert exponent.of[1].of[1].value == 3  # 3.01 would mean another thing


def test_a_harder_rule_is_come_near():
    m, g, noise = inputs()
    delta = 0.3 * np.tanh(2.5 * g) - 0.1 * np.arcsinh(5 * m) + noise
    front = fit_symbolic(m, g, delta, generations=8, population=80, progress=False)
    assert front[-1].score(m, g, delta)["pearson_r"] > 0.95


def test_a_network_is_come_near():
    torch.manual_seed(0)
    rule = LSTMRule(RuleConfig.preset("paper-cnn"))
    state, drift, samples = rule.init_state(100), torch.zeros(100), []
    m, v = torch.zeros(100), torch.zeros(100)
    for t in range(1, 41):
        drift = 0.95 * drift + 0.3 * torch.randn(100)
        g = drift + torch.randn(100)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        scale = (v / (1 - 0.99**t)).sqrt() + 1e-8
        with torch.no_grad():
            delta, state = rule(g, state)
        if t > 5:
            samples.append(torch.stack([m / (1 - 0.9**t) / scale, g / scale, delta]))
    train, test = torch.cat(samples[::2], dim=1), torch.cat(samples[1::2], dim=1)
    front = fit_symbolic(*train, **SHORT)
    assert front[-1].score(*test)["pearson_r"] > 0.95


@pytest.mark.parametrize("name", [*FUNCTIONS, *OPERATORS])
def test_values_of_every_function_for_one_and_for_several_expressions_at_once(name):
    m, g, _ = inputs(300)
    node = Node(name, (Node("*", (Node("number", value=0.7), Node("m"))), Node("g"))[: 2 if name in OPERATORS else 1])
    with np.errstate(all="ignore"):
        for scales in ([0.7], [0.7, -1.3, 2.0]):
            of = [ORACLE[name](x, g) if name in OPERATORS else ORACLE[name](x) for x in (s * m for s in scales)]
            several = symbolic._with_numbers(node, iter([torch.tensor(scales, dtype=torch.float64)[:, None]]))
            found = values_of(several, torch.tensor(m), torch.tensor(g))
            np.testing.assert_allclose(found, np.array(of), rtol=1e-12)
    one = node(torch.tensor(m), torch.tensor(g)).numpy()
    np.testing.assert_array_equal(values_of(node, torch.tensor(m), torch.tensor(g)), one)
    assert values_of(Node("number", value=2.0), torch.tensor(m), torch.tensor(g)).tolist() == [2.0] * 300


@pytest.mark.parametrize(
    "text, tidied",
    [
        ("g * 2", "2 * g"), ("1 + g", "g + 1"), ("g + (-2)", "g - 2"), ("g - (-2) * m", "g + 2 * m"), ("--m", "m"),
        ("2 * (3 * m)", "6 * m"), ("tanh(-m)", "-tanh(m)"), ("2 * tanh(-3*m)", "(-2) * tanh(3 * m)"),
        ("2**3*m", "8 * m"),
        ("-(m - g)", "g - m"), ("(2 * m) * g", "2 * (g * m)"), ("m**3", "m ** 3"), ("-(2 * m)", "(-2) * m"),
        ("m / (g - 1) / 2", "m / (g - 1) / 2"), ("exp(-m) ** (-2)", "exp(-m) ** (-2)"), ("-m + g", "g - m"),
    ],
)  # fmt: skip
def test_tidying_changes_how_it_is_written_and_not_what_it_is(text, tidied):
    m, g = (torch.tensor(x) for x in inputs(100)[:2])
    found = symbolic._tidy(parse(text), True)
    assert str(found) == tidied and found.complexity <= parse(text).complexity
    torch.testing.assert_close(found(m, g), parse(text)(m, g), rtol=1e-12, atol=0)


def test_random_trees_keep_their_meaning_and_their_bounds():
    m, g, delta = inputs(100)
    names = [[*FUNCTIONS], [*OPERATORS]]
    search = symbolic._Search([m, g, delta], names, 9, 0)
    m, g = torch.tensor(m), torch.tensor(g)
    for _ in range(300):
        tree = search.grow(8)
        found = symbolic._tidy(tree, True)
        assert parse(str(found)).complexity == found.complexity <= tree.complexity
        if np.isfinite(values_of(tree, m, g)).all():
            torch.testing.assert_close(found(m, g), tree(m, g), rtol=1e-6, atol=1e-9, equal_nan=True)
    for candidate in search.offer(parse("tanh(m) * g")):
        assert candidate.node.complexity == candidate.complexity <= 9
    assert not list(search.offer(parse("1 / m"))) and not list(search.offer(parse("exp(m * g)")))


def test_only_what_is_allowed_is_used():
    m, g, delta = tanh_rule()
    front = fit_symbolic(m, g, delta, **{**SHORT, "functions": ["abs"], "operators": ["*", "+"]})
    names = {node.name for fitted in front for node in parse(fitted.text).walk()}
    assert names <= {"abs", "*", "+", "number", "m", "g"}
    assert fit_symbolic(m, g, delta, **{**SHORT, "functions": [], "operators": []})


@pytest.mark.parametrize("text", [*EXPRESSIONS.values(), "m / (1 + g**2)"])
def test_scores_are_those_of_numpy_and_scipy(text):
    m, g, delta = tanh_rule()
    values = parse(text)(torch.tensor(m), torch.tensor(g)).numpy()
    score = score_expression(text, m, g, delta)
    assert score["mse"] == pytest.approx(np.mean((values - delta) ** 2), rel=1e-12)
    assert score["pearson_r"] == pytest.approx(stats.pearsonr(values, delta).statistic, rel=1e-10)
    assert score == Fitted(text, 1, 0.0).score(m.tolist(), torch.tensor(g, requires_grad=True), delta)


def test_a_name_of_the_paper_and_a_constant():
    m, g, delta = tanh_rule()
    assert score_expression("exp-tanh", m, g, delta) == score_expression(EXPRESSIONS["exp-tanh"], m, g, delta)
    assert score_expression("0.5", m, g, delta)["pearson_r"] is None
    assert score_expression("g - g", m, g, delta) == {"mse": pytest.approx(np.mean(delta**2)), "pearson_r": None}
    assert score_expression("g", m, g, 0 * delta)["pearson_r"] is None


def test_what_is_not_finite_names_the_point():
    m, g, delta = tanh_rule(100)
    m[[7, 9]] = 0.0
    with pytest.raises(ValueError, match=r"1 / m is inf at sample 7, where m = 0 .*\(2 such in all\)"):
        score_expression("1 / m", m, g, delta)
    with pytest.raises(ValueError, match="has 'q' at character 1"):
        score_expression("q", m, g, delta)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda m, g, d: (m[1:], g, d), {}, "have \\[99, 100, 100\\] numbers"),
        (lambda m, g, d: (m[:, None], g, d), {}, "m has shape \\(100, 1\\), expected \\(N,\\)"),
        (lambda m, g, d: (m[:49], g[:49], d[:49]), {}, "49 samples, expected at least 50"),
        (lambda m, g, d: (m, changed(g, 3, np.nan), d), {}, "g holds nan"),
        (lambda m, g, d: (m, g, changed(d, 3, -np.inf)), {}, "delta holds -inf"),
        (lambda m, g, d: (m, g, changed(d, 3, 1e300)), {}, "delta holds 1e\\+300"),
        (lambda m, g, d: (m * 0, g, d), {}, "m is 0 in all samples"),
        (lambda m, g, d: (m, g * 0 + 2, d), {}, "g is 2 in all samples"),
        (lambda m, g, d: (m, g, d * 0 + 0.5), {}, "delta is 0.5 in all samples"),
        (lambda m, g, d: (m, ["a"] * 100, d), {}, "could not convert"),
        (lambda m, g, d: (m, g, d), {"functions": ["tanh", "cos"]}, "functions has 'cos', expected a list of"),
        (lambda m, g, d: (m, g, d), {"functions": "tanh"}, "functions has 'tanh'"),
        (lambda m, g, d: (m, g, d), {"operators": ["^"]}, "operators has '\\^'"),
        (lambda m, g, d: (m, g, d), {"max_complexity": 0}, "max_complexity is 0, expected an integer from 1 to 60"),
        (lambda m, g, d: (m, g, d), {"generations": 0}, "generations is 0"),
        (lambda m, g, d: (m, g, d), {"population": 1.5}, "population is 1.5"),
        (lambda m, g, d: (m, g, d), {"seed": -1}, "seed is -1"),
        (lambda m, g, d: (m, g, d), {"progress": 1}, "progress is 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted(change, options, message):
    with pytest.raises(ValueError, match=message):
        fit_symbolic(*change(*tanh_rule(100)), **{**SHORT, **options})


def test_refit_keeps_the_form_and_finds_the_numbers():
    m, g, noise = inputs()
    fitted = refit("1 * tanh(g - 0) + 0 * m ** 3", m, g, 0.3 * np.tanh(g - 0.4) + 0.05 * m**3 + noise)
    numbers = [float(number) for number in re.findall(r"\d\.\d+", fitted.text)]
    assert sorted(numbers) == [pytest.approx(x, rel=0.05) for x in (0.05, 0.3, 0.4)]
    assert "m ** 3" in fitted.text and fitted.mse < 1.1 * NOISE**2
    other = refit("tanh(1 * g)", m, g, 0.3 * np.tanh(g - 0.4) + 0.05 * m**3 + noise)
    assert other.mse > 4 * fitted.mse
    with pytest.raises(ValueError, match="not finite on these samples"):
        refit("exp(exp(1 * g))", m, g, noise)
