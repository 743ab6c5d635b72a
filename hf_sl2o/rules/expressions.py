"""Expressions of m~ and g~ as text: parsed by a small grammar, computed by torch, never executed as Python.

    sum     = product {("+" | "-") product}
    product = signed {("*" | "/") signed}
    signed  = "-" signed | power
    power   = atom ["**" signed]
    atom    = number | "m" | "g" | function "(" sum ")" | "(" sum ")"

m and g stand for m~ and g~. The functions are those of supplement 2.5: abs, sign, log, sqrt, relu, exp, tanh, sinh,
asinh, erfc. As symbolic regression has them, log and sqrt take the magnitude, and x ** y is |x| ** y, times the sign
of x where y is an odd integer.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

VARIABLES = ("m", "g")
_TOKEN = re.compile(r"\s*(\*\*|[-+*/()]|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|[A-Za-z_]\w*)")
_LONGEST, _DEEPEST = 10_000, 100  # characters; levels


def _power(x: Any, y: Any) -> torch.Tensor:
    if not torch.is_tensor(y):
        return x**y if y == int(y) else x.abs() ** y
    size = abs(x) ** y
    return torch.where(y.remainder(2) == 1, size * torch.sign(torch.as_tensor(x)), size)


FUNCTIONS: dict[str, Callable[[Any], torch.Tensor]] = {
    "abs": torch.abs,
    "sign": torch.sign,
    "log": lambda x: x.abs().log(),
    "sqrt": lambda x: x.abs().sqrt(),
    "relu": torch.relu,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sinh": torch.sinh,
    "asinh": torch.asinh,
    "erfc": torch.special.erfc,
}
OPERATORS: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": _power,
}
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "**": 4}  # how tightly an operator binds


@dataclass(frozen=True)
class Node:
    """A number ("number", with `value`), a variable, an operator, a function, or "neg", and what it is of."""

    name: str
    of: tuple[Node, ...] = ()
    value: float = 0.0

    def __str__(self) -> str:
        """The text that [`parse`] reads to the same expression."""
        if self.name == "number":
            text = repr(self.value).removesuffix(".0")
            return text if self.value >= 0 else f"({text})"
        if self.name in VARIABLES:
            return self.name
        if self.name in FUNCTIONS:
            return f"{self.name}({self.of[0]})"
        rank = _RANK[self.name]
        if self.name == "neg":
            return f"-{_bracketed(self.of[0], rank)}"
        left, right = self.of
        # "-" and "/" group to the left, "**" to the right
        return (
            f"{_bracketed(left, rank + (self.name == '**'))} {self.name} "
            f"{_bracketed(right, rank + (self.name != '**'))}"
        )

    def walk(self) -> Iterator[Node]:
        """This node and all below it, from the left."""
        yield self
        for node in self.of:
            yield from node.walk()

    @property
    def complexity(self) -> int:
        """Numbers, variables, operators and functions in it; a sign is none."""
        return sum(node.name != "neg" for node in self.walk())

    def __call__(self, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Computes it for m~ and g~, both `(N,)`."""
        value = self._of(m, g)
        return value.expand_as(m) if torch.is_tensor(value) else torch.full_like(m, value)

    def _of(self, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor | float:
        if self.name == "number":
            return self.value  # not a tensor: x ** 3 is then x x x
        if self.name in VARIABLES:
            return m if self.name == "m" else g
        first, *rest = (node._of(m, g) for node in self.of)
        if not torch.is_tensor(first) and not any(torch.is_tensor(part) for part in rest):
            first = m.new_full((), first)  # of numbers alone
        if self.name == "neg":
            return -first
        return OPERATORS[self.name](first, rest[0]) if rest else FUNCTIONS[self.name](first)


def _bracketed(node: Node, rank: int) -> str:
    return f"({node})" if _RANK.get(node.name, 9) < rank else str(node)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Node:
    """Reads an expression.

    Args:
        text (`str`): Such as `"0.2326 * tanh(g - 0.1094)"`.

    Raises:
        `ValueError`: it is not in the grammar; the message names the place.

    Example:

    ```python
    >>> from hf_sl2o.rules.expressions import parse
    >>> expression = parse("0.2326*tanh(g - 0.1094)")
    >>> str(expression), expression.complexity
    ('0.2326 * tanh(g - 0.1094)', 6)
    ```
    """
    if len(text) > _LONGEST:
        raise ValueError(f"an expression of {len(text):,} characters, expected at most {_LONGEST:,}")
    reader = _Reader(text)
    node = reader.sum(0)
    if reader.next is not None:
        raise reader.error("an operator or the end")
    return node


class _Reader:
    """The tokens of a text, of which `next` is the one to come, and one method for each line of the grammar."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.at = text, 0, 0
        self.next: str | None = None
        self.take()

    def take(self) -> str | None:
        """Returns the token and goes to the next one."""
        taken, rest = self.next, self.text[self.end :]
        self.at = self.end + len(rest) - len(rest.lstrip())
        if not rest.strip():
            self.next = None
        elif match := _TOKEN.match(rest):
            self.next, self.end = match[1], self.end + match.end()
        else:
            self.next = rest.strip()[0]
            raise self.error("a number, m, g, a function, an operator or a bracket")
        return taken

    def error(self, expected: str) -> ValueError:
        found = "its end" if self.next is None else repr(self.next)
        shown = self.text if len(self.text) < 80 else self.text[:77] + "..."
        return ValueError(
            f"the expression {shown!r} has {found} at character {self.at + 1}, expected {expected}; it is one of m "
            f"and g with + - * / ** and {', '.join(FUNCTIONS)}"
        )

    def sum(self, depth: int) -> Node:
        node = self.product(depth)
        while self.next in ("+", "-"):
            node = Node(str(self.take()), (node, self.product(depth)))
        return node

    def product(self, depth: int) -> Node:
        node = self.signed(depth)
        while self.next in ("*", "/"):
            node = Node(str(self.take()), (node, self.signed(depth)))
        return node

    def signed(self, depth: int) -> Node:
        if depth > _DEEPEST:
            raise self.error(f"at most {_DEEPEST} brackets and signs in one another")
        if self.next == "-":
            self.take()
            node = self.signed(depth + 1)
            return Node("number", value=-node.value) if node.name == "number" else Node("neg", (node,))
        return self.power(depth)

    def power(self, depth: int) -> Node:
        node = self.atom(depth)
        if self.next == "**":
            self.take()
            node = Node("**", (node, self.signed(depth + 1)))
        return node

    def atom(self, depth: int) -> Node:
        token = self.next
        if token == "(":
            return self.bracket(depth)
        if token in FUNCTIONS:
            self.take()
            if self.next != "(":
                raise self.error(f"a bracket after {token}")
            return Node(str(token), (self.bracket(depth),))
        if token in VARIABLES:
            self.take()
            return Node(str(token))
        if token is None or not (token[0].isdigit() or token[0] == "."):
            raise self.error("a number, m, g, a function or a bracket")
        value = float(token)
        if not math.isfinite(value):
            raise self.error("a finite number")
        self.take()
        return Node("number", value=value)

    def bracket(self, depth: int) -> Node:
        self.take()
        node = self.sum(depth + 1)
        if self.next != ")":
            raise self.error("a closing bracket")
        self.take()
        return node
