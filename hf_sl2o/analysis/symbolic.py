"""Symbolic regression of an update rule (supplement 2.5): expressions of m~ and g~, as short or as close as may be.

A small genetic programming. Trees are crossed and mutated; each is offered as it is, scaled, shifted, and both; its
numbers are fitted by Levenberg-Marquardt; and those stay that no other beats in both complexity and error, then those
that only these beat, and so on (NSGA-II), one of each shape. It evolves on some of the samples, and ends on all.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..foundation.checked import check_flag, check_integer, shown
from ..rules import RuleConfig, SymbolicRule
from ..rules.expressions import FUNCTIONS, OPERATORS, Node, parse
from .scores import Fitted, checked_samples, score_expression, values_of

_LEAST, _SAMPLE = 50, 1000  # samples: at least, and to evolve on
_TRIES, _FRONTS = 10, 4  # starts of the numbers of a shape; fronts that are fitted to all points in the end
_ODD = ("tanh", "sinh", "asinh", "sign")
_NUMBER = re.compile(r"(?<!\*\* )(?<![-\w.])(?:\(-(\d[-+\d.e]*)\)|\d[-+\d.e]*)")  # but no exponent
_MET = torch.cartesian_prod(*[torch.linspace(-31.6, 31.6, 9)] * 2).unbind(-1)  # fp32; about what SymbolicRule tries
_number = functools.partial(Node, "number", ())


def _numbers(node: Node) -> list[float]:
    """The numbers in it that are fitted, from the left: no exponents, of which 3 means another thing than 3.01."""
    of = node.of[:1] if node.name == "**" and node.of[1].name == "number" else node.of
    return [node.value] if node.name == "number" else [value for part in of for value in _numbers(part)]


def _with_numbers(node: Node, numbers: Iterator[Any]) -> Node:
    if node.name == "number":
        return _number(next(numbers))
    kept = node.name == "**" and node.of[1].name == "number"
    return Node(node.name, tuple(x if kept and i else _with_numbers(x, numbers) for i, x in enumerate(node.of)))


def _unsigned(node: Node) -> Node | None:
    """The node without the minus sign before it; None if there is none."""
    if node.name == "number" and node.value < 0:
        return _number(-node.value)
    if node.name == "*" and node.of[0].name == "number" and node.of[0].value < 0:
        return Node("*", (_number(-node.of[0].value), node.of[1]))
    return node.of[0] if node.name == "neg" else None


def _tidy(node: Node, signs: bool) -> Node:
    """One way to write it: numbers computed, first in products and last in sums; few signs, if + may become -."""
    if not node.of:
        return node
    name, of = node.name, tuple(_tidy(part, signs) for part in node.of)
    if all(part.name == "number" for part in of):
        value = float(values_of(Node(name, of), torch.zeros(1).double(), torch.zeros(1).double())[0])
        return _number(value) if np.isfinite(value) else Node(name, of)
    if name in ("+", "*"):
        first, last = sorted(
            of, key=lambda part: ((part.name == "number") == (name == "+"), _NUMBER.sub("#", str(part)))
        )
        if name == "*" and first.name == "number" and last.name == "neg":
            return Node("*", (_number(-first.value), last.of[0]))
        if name == last.name == "*" and first.name == last.of[0].name == "number":
            return Node("*", (_number(first.value * last.of[0].value), last.of[1]))
        if name == first.name == "*" and first.of[0].name == "number":
            return Node("*", (first.of[0], _tidy(Node("*", (first.of[1], last)), signs)))
        of = first, last
    plain, plain_first = _unsigned(of[-1]), _unsigned(of[0])
    if name == "neg" and plain:
        return plain
    if name == "neg" and of[0].name == "*" and of[0].of[0].name == "number":  # of a positive number, here
        return Node("*", (_number(-of[0].of[0].value), of[0].of[1]))
    if name == "neg" and of[0].name == "-":
        return Node("-", of[0].of[::-1])
    if name in _ODD and plain:
        return Node("neg", (Node(name, (plain,)),))
    if signs and name in ("+", "-") and plain:
        return Node("-" if name == "+" else "+", (of[0], plain))
    if signs and name == "+" and plain_first:
        return Node("-", (of[1], plain_first))
    return Node(name, of)


def _core(node: Node) -> Node:
    """Without the numbers that scale and shift the whole."""
    kept = [part for part in node.of if part.name != "number"]
    outer = node.name in ("neg", "+", "-", "*", "/") and len(kept) == 1 and (node.name != "/" or kept[0] is node.of[0])
    return _core(kept[0]) if outer else node


def _replace(node: Node, old: Node, new: Node) -> Node:
    """Puts `new` where `old`, the object, is."""
    if node is old:
        return new
    return Node(node.name, tuple(_replace(part, old, new) for part in node.of), node.value) if node.of else node


class _Candidate(NamedTuple):
    complexity: int
    mse: float
    shape: str
    node: Node


def _fronts(candidates: Sequence[_Candidate]) -> list[tuple[int, _Candidate]]:
    """Sorts by the number of the Pareto front: those that none beats, then those that only these beat, and so on."""
    lowest: list[float] = []  # error of the last in each front: the best there is of its complexity or less
    ranked = []
    for candidate in sorted(candidates, key=lambda c: c[:3]):
        front = bisect.bisect_right(lowest, candidate.mse)  # the first in which none is as good
        lowest[front : front + 1] = [candidate.mse]
        ranked.append((front, candidate))
    return sorted(ranked, key=lambda pair: pair[0])


class _Search:
    """The population, and what was tried."""

    def __init__(self, samples: list[np.ndarray], names: list[list[str]], most: int, seed: int) -> None:
        self.m, self.g, self.delta = torch.from_numpy(samples[0]), torch.from_numpy(samples[1]), samples[2]
        (self.functions, self.operators), self.most = names, most
        self.signs = {"+", "-"} <= set(self.operators)
        self.rng = np.random.default_rng(seed)
        self.tries = Counter[str]()
        self.alive: list[tuple[int, _Candidate]] = []

    def offer(self, tree: Node) -> Iterator[_Candidate]:
        """The tree without its outer numbers, as it is, scaled, shifted and both, with numbers fitted."""
        core = _core(_tidy(tree, self.signs))
        if core.complexity > self.most or not np.isfinite(values_of(core, *_MET)).all():
            return
        for node in self._scaled(core):
            shape, size = _NUMBER.sub("#", str(node)), node.complexity
            if size > self.most or self.tries[shape] >= (_TRIES if _numbers(core) else 1):
                continue
            self.tries[shape] += 1
            node, mse = _fit(node, self.m, self.g, self.delta, steps=3)
            best = min((c.mse for front, c in self.alive if not front and c.complexity <= size), default=0.0)
            if _numbers(core) and mse < 2 * best:
                node, mse = _fit(node, self.m, self.g, self.delta, steps=12)
            if np.isfinite(mse) and np.isfinite(values_of(node, *_MET)).all():
                yield _Candidate(size, mse, shape, node)

    def _scaled(self, core: Node) -> list[Node]:
        """h, b h, h + a and b h + a, as far as there are operators for it."""
        values = values_of(core, self.m, self.g)
        center = values - values.mean()
        slope = float(center @ self.delta / max(center @ center, 1e-300))
        forms = [Node("neg", (core,)) if slope < 0 and "-" in self.operators else core]
        forms += [Node("*", (_number(slope), core))] if "*" in self.operators else []
        shift = next((name for name in ("+", "-") if name in self.operators), None)
        for form in list(forms) if shift else ():
            by = float((self.delta - values_of(form, self.m, self.g)).mean()) * (1 if shift == "+" else -1)
            forms.append(Node(str(shift), (form, _number(by))))
        return [_tidy(form, self.signs) for form in forms]

    def grow(self, size: int) -> Node:
        """A random tree of about `size`."""
        rng, binary = self.rng, self.operators if size > 2 else []
        if size <= 1 or not (self.functions or binary):
            name = str(rng.choice(["g", "m", "number"], p=[0.45, 0.35, 0.2]))
            return Node(name, value=float(rng.normal()) if name == "number" else 0.0)
        if self.functions and (not binary or rng.random() < 0.5):
            return Node(str(rng.choice(self.functions)), (self.grow(size - 1),))
        name = str(rng.choice(binary))
        left = size - 2 if name == "**" else int(rng.integers(1, size - 1))
        power = name == "**" and rng.random() < 0.8
        right = _number(float(rng.choice([2.0, 3.0, 0.5]))) if power else self.grow(size - 1 - left)
        return Node(name, (self.grow(left), right))

    def seeds(self, count: int) -> list[Node]:
        """Simple sums, each function of each, two functions of m or g, and random trees."""
        terms = [parse(text) for text in ("g", "m", "1", "1 * g", "1 * m", "g + m", "g + 1", "g + 1 * m")]
        terms = [term for term in terms if not {x.name for x in term.walk()} & set(OPERATORS) - set(self.operators)]
        trees = [Node(name, (term,)) for name in self.functions for term in terms]
        twice = [Node(name, (tree,)) for name in self.functions for tree in trees if tree.complexity == 2]
        return terms + trees + twice + [self.grow(int(self.rng.integers(2, 8))) for _ in range(count)]

    def child(self) -> Node:
        """A new tree from one or two of the population, of which earlier fronts are likelier."""
        rng = self.rng
        first, second = (self.alive[int(rng.integers(len(self.alive), size=2).min())][1].node for _ in range(2))
        first = _core(first) if rng.random() < 0.5 else first
        chosen, other = (nodes[int(rng.integers(len(nodes)))] for nodes in map(list, (first.walk(), second.walk())))
        kind = rng.random()
        if kind < 0.25:  # crossover
            return _replace(first, chosen, other)
        if kind < 0.4 and (names := [name for name in self.operators if name != "**"]):  # a sum of both, say
            scaled = "*" in self.operators and rng.random() < 0.6
            parts = tuple(Node("*", (_number(1.0), x)) if scaled else x for x in (_core(first), _core(second)))
            return Node("+" if scaled and "+" in names else str(rng.choice(names)), parts)
        if kind < 0.55:
            return _replace(first, chosen, self.grow(int(rng.integers(1, 5))))
        if kind < 0.65:  # hoist
            return chosen
        if kind < 0.8 and (names := [name for name in ("+", "*") if name in self.operators]):  # one more number
            name = str(rng.choice(names))
            return _replace(first, chosen, Node(name, (chosen, _number(float(rng.normal(name == "*", 0.5))))))
        if kind < 0.9 and chosen.name != "neg":  # another name
            alike = self.functions if len(chosen.of) == 1 else self.operators
            return _replace(first, chosen, Node(str(rng.choice(alike)), chosen.of) if chosen.of else self.grow(2))
        jittered = (x * float(rng.normal(1, 0.5)) + float(rng.normal(0, 0.1)) for x in _numbers(first))
        return _with_numbers(first, jittered)

    def run(self, generations: int, population: int, progress: bool) -> list[Node]:
        """Evolves; returns the first fronts."""
        trees = self.seeds(population)
        bar = tqdm(range(generations), desc="fit_symbolic", unit="gen", mininterval=1.0, disable=not progress)
        for _ in bar:
            found = [c for _, c in self.alive] + [c for tree in trees for c in self.offer(tree)]
            of_shape = {c.shape: c for c in sorted(found, key=lambda c: -c.mse)}  # the best of each
            self.alive = _fronts(list(of_shape.values()))[:population]
            trees = [self.child() for _ in range(population)]
            bar.set_postfix(mse=f"{min(candidate.mse for _, candidate in self.alive):.3g}", refresh=False)
        return [candidate.node for front, candidate in self.alive if front < _FRONTS]


def _fit(node: Node, m: torch.Tensor, g: torch.Tensor, delta: np.ndarray, steps: int) -> tuple[Node, float]:
    """Fits the numbers in an expression by Levenberg-Marquardt; returns it and its mean squared error."""

    def error(x: np.ndarray) -> float:
        return float(np.square(values_of(_with_numbers(node, iter(x.tolist())), m, g) - delta).mean())

    x = np.array(_numbers(node))
    mse, damping = error(x), 1e-2
    for _ in range(steps if len(x) and np.isfinite(mse) else 0):
        width = 1e-6 * np.maximum(np.abs(x), 1e-3)
        moved = x[:, None] + np.column_stack([np.zeros_like(x), np.diag(width)])  # (k, k + 1)
        values = values_of(_with_numbers(node, iter(torch.from_numpy(moved[..., None]))), m, g)  # (k + 1, N)
        slopes = (values[1:] - values[0]) / width[:, None]
        curvature, slope, before = slopes @ slopes.T, slopes @ (delta - values[0]), mse
        if not np.isfinite(curvature).all():
            break
        for _ in range(4):
            ridge = damping * np.diag(curvature) + 1e-12 * np.trace(curvature) + 1e-300
            trial = x + np.linalg.lstsq(curvature + np.diag(ridge), slope)[0]
            lower = error(trial)
            damping = damping / 10 if lower < mse else damping * 10
            if lower < mse:
                x, mse = trial, lower
                break
        if not mse < before * (1 - 1e-4):
            break
    return _with_numbers(node, iter(x.tolist())), mse


def _finished(node: Node, signs: bool, m: np.ndarray, g: np.ndarray, delta: np.ndarray) -> Fitted | None:
    """Fitted to all points, rounded, and scored as it is written; None where a run could not use it."""
    node, mse = _fit(node, torch.from_numpy(m), torch.from_numpy(g), delta, steps=20)
    for digits in (4, 5, 6, 8, 17):
        text = str(_tidy(_with_numbers(node, (float(f"{x:.{digits}g}") for x in _numbers(node))), signs))
        try:
            SymbolicRule(RuleConfig(expression=text))
            found = Fitted(text, parse(text).complexity, score_expression(text, m, g, delta)["mse"] or 0.0)
        except ValueError:
            return None
        if found.mse <= 1.001 * mse + 1e-8 * delta.var():
            break
    return found


def fit_symbolic(
    m: Any,
    g: Any,
    delta: Any,
    *,
    functions: Sequence[str] = tuple(FUNCTIONS),
    operators: Sequence[str] = ("+", "-", "*", "/", "**"),
    max_complexity: int = 15,
    generations: int = 60,
    population: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> list[Fitted]:
    """Finds expressions of m~ and g~ for the updates of a rule.

    Args:
        m, g, delta (`np.ndarray` of shape `(N,)`, or what becomes one): m~, g~ and the update, N at least 50.
        functions, operators (`Sequence[str]`, *optional*): Those it may use; all of the grammar by default.
        max_complexity (`int`, *optional*, defaults to 15): Most numbers, variables, operators and functions in one.
        generations, population (`int`, *optional*): How long to search, and among how many.
        seed (`int`, *optional*, defaults to 0): The same seed finds the same expressions.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        The Pareto front, shortest first: each [`Fitted`] is closer than all before, and good for a [`SymbolicRule`].

    Raises:
        `ValueError`: samples that are too few, not finite, constant or of different lengths; a function or operator
            that is not in the grammar; a number out of its range.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_sl2o.analysis.symbolic import fit_symbolic
    >>> m, g = np.random.default_rng(0).normal(size=(2, 200))
    >>> front = fit_symbolic(m, g, 0.2 * np.tanh(g), generations=3, population=40, progress=False)
    >>> front[-1].score(m, g, 0.2 * np.tanh(g))["pearson_r"] > 0.999
    True
    ```
    """
    check_integer("max_complexity", max_complexity, 1, 60)
    check_integer("generations", generations, 1)
    check_integer("population", population, 2)
    check_integer("seed", seed)
    check_flag("progress", progress)
    for kind, given, known in (("functions", functions, FUNCTIONS), ("operators", operators, OPERATORS)):
        unknown = [given] if isinstance(given, str) else [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{kind} has {shown(unknown[0])}, expected a list of some of {', '.join(known)}")
    samples = checked_samples(m, g, delta, _LEAST)
    for name, array in zip(("m", "g", "delta"), samples, strict=True):
        if np.ptp(array) <= 1e-12 * np.abs(array).max() or np.ptp(array) < 1e-30:
            raise ValueError(f"{name} is {array[0]:g} in all samples, expected one that varies; sample a whole run")
    some = np.random.default_rng(seed).permutation(len(samples[0]))[:_SAMPLE]
    with np.errstate(all="ignore"):
        search = _Search([array[some] for array in samples], [[*functions], [*operators]], max_complexity, seed)
        found = [_finished(node, search.signs, *samples) for node in search.run(generations, population, progress)]
    front: list[Fitted] = []
    for fitted in sorted((x for x in found if x is not None), key=lambda x: (x.complexity, x.mse, x.text)):
        if not front or fitted.mse < 0.9999 * front[-1].mse - 1e-20 * samples[2].var():  # not by rounding alone
            front.append(fitted)
    return front


def refit(text: str, m: Any, g: Any, delta: Any) -> Fitted:
    """Fits the numbers in an expression to samples, but exponents; its form stays as it is.

    Args:
        text (`str`): The expression; its numbers are where the search begins.
        m, g, delta (`np.ndarray` of shape `(N,)`, or what becomes one): As for [`fit_symbolic`].

    Returns:
        [`Fitted`]: no farther than `text` itself.

    Raises:
        `ValueError`: it is not in the grammar; the samples are bad; with these numbers no run could use it.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_sl2o.analysis.symbolic import refit
    >>> m, g = np.random.default_rng(0).normal(size=(2, 200))
    >>> refit("tanh(1 * g)", m, g, np.tanh(0.5 * g)).text
    'tanh(0.5 * g)'
    ```
    """
    samples = checked_samples(m, g, delta, _LEAST)
    with np.errstate(all="ignore"):
        found = _finished(_tidy(parse(text), True), True, *samples)
    if found is None:
        raise ValueError(f"{text!r} is not finite on these samples, or where a run may come; give another form")
    return found
