"""Expressions as text: what they mean, checked against Python and numpy, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy import special

from hf_sl2o import RuleConfig, SymbolicRule
from hf_sl2o.rules.expressions import FUNCTIONS, Node, parse

# The oracle: the same texts, executed as Python here, where they are known.
PYTHON = {
    "abs": np.abs, "sign": np.sign, "log": lambda x: np.log(np.abs(x)), "sqrt": lambda x: np.sqrt(np.abs(x)),
    "relu": lambda x: np.maximum(x, 0), "exp": np.exp, "tanh": np.tanh, "sinh": np.sinh, "asinh": np.arcsinh,
    "erfc": special.erfc,
}  # fmt: skip
TEXTS = [
    "m", "g", "-m", "2", "-2 + 3*m", "m - g - 1", "m - (g - 1)", "m / g / 2", "m / (g / 2)", "m*g + m/g", "-m**2",
    "(-m)**2", "m**2**3", "(m**2)**3", "2 * -g", "m - -g", "m*(g + 1)*(g - 1)", "1e-3*m + .5*g + 2.*m", "m**3",
    "m**-1",
    "m - (g + 1) - (m - g)", "-(m + g) * 2", "--m", *[f"{name}(0.5*m + g)" for name in PYTHON],
    "0.2326 * tanh(g - 0.1094)", "0.2097 * exp(tanh(g)) - 0.2523", "0.0627 * exp(tanh(g + m**3))",
    "tanh(exp(-abs(m)) * g) / (1 + g**2)", "exp(1) * m",
]  # fmt: skip
# numpy does not know what |x| ** y of a negative x is
POWERS = [
    ("m**0.5", lambda m, g: np.abs(m) ** 0.5),
    ("m**g", lambda m, g: np.abs(m) ** g),
    ("2**m", lambda m, g: 2**m),
    ("(-2)**m", lambda m, g: 2**m),
]


def points():
    generator = np.random.default_rng(0)
    return generator.normal(size=200) * 2, generator.normal(size=200) * 2


def computed(text, m, g):
    return parse(text)(torch.tensor(m), torch.tensor(g)).numpy()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_means_what_it_means_in_python(text):
    m, g = points()
    expected = np.broadcast_to(eval(text, {"__builtins__": {}}, {**PYTHON, "m": m, "g": g}), m.shape)
    np.testing.assert_allclose(computed(text, m, g), expected, rtol=1e-12)
    np.testing.assert_allclose(computed(str(parse(text)), m, g), expected, rtol=1e-12)  # and what is written out
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize("text, expected", POWERS)
def test_powers_of_negative_numbers(text, expected):
    m, g = points()
    np.testing.assert_allclose(computed(text, m, g), expected(m, g), rtol=1e-12)


def test_an_exponent_that_is_odd_at_some_points():
    m, g = torch.tensor([-2.0, -2.0, -2.0, 2.0]), torch.tensor([3.0, 2.0, 0.5, 3.0])
    assert torch.allclose(parse("m**g")(m, g), torch.tensor([-8.0, 4.0, 2**0.5, 8.0]))


@pytest.mark.parametrize(
    "text, complexity", [("m", 1), ("-m", 1), ("tanh(g - 0.1094)", 4), ("0.0627*exp(tanh(g+m**3))", 9)]
)
def test_complexity_counts_what_is_written(text, complexity):
    assert parse(text).complexity == complexity


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has its end at character 1"),
        ("g +", "has its end at character 4"),
        ("a + 1", "has 'a' at character 1"),
        ("m + q(g)", "has 'q' at character 5"),
        ("g g", "has 'g' at character 3, expected an operator"),
        ("exp g", "expected a bracket after exp"),
        ("(m + g", "expected a closing bracket"),
        ("m ^ 2", "has '^' at character 3"),
        ("1e999 * m", "expected a finite number"),
        ("m.real", "expected"),
        ("__import__('os')", "has '__import__' at character 1"),
        ("tanh(m, g)", "has ','"),
        ("(" * 500 + "m" + ")" * 500, "at most 100 brackets"),
        ("-" * 500 + "m", "at most 100"),
        ("m" + "+m" * 10_000, "20,001 characters"),
    ],
)
def test_what_is_no_expression(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)
    with pytest.raises(ValueError):
        RuleConfig(expression=text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 / m", "at m = 0"),
        ("log(g)", "g = 0"),
        ("exp(m**2)", "which a run may meet"),
        ("m / (g - g)", "bound it"),
        ("sinh(3 * m)", "bound it"),
    ],
)
def test_what_is_not_finite_where_a_run_may_come(text, message):
    with pytest.raises(ValueError, match=message):
        SymbolicRule(RuleConfig(expression=text))
    assert parse(text).complexity > 1  # an expression all the same


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_has_an_autograd(name):
    m = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.9, 0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: parse(f"{name}(m * g + 0.1)")(m, g), m)


def test_a_rule_of_any_expression_is_saved_and_loaded(tmp_path):
    rule = SymbolicRule(RuleConfig(expression="0.3 * tanh(g + 2*m)"))
    rule.save_pretrained(tmp_path)
    loaded = SymbolicRule.from_pretrained(tmp_path)
    g = torch.randn(5)
    expected = 0.3 * torch.tanh(3 * g.sign())
    for of in (rule, loaded):
        assert torch.allclose(of(g, of.init_state(5))[0], expected, rtol=1e-5)
    assert loaded.fingerprint == rule.fingerprint != SymbolicRule().fingerprint


def test_numbers_are_written_out_whole():
    value = 0.1 + 0.2
    assert parse(str(Node("*", (Node("number", value=value), Node("m"))))).of[0].value == value
    assert str(Node("number", value=-1e-30)) == "(-1e-30)" and math.isclose(parse("(-1e-30)").value, -1e-30)
