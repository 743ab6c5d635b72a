"""From what a user says to a rule: an object, a folder, a Hub id, or the name of one that ships."""

from __future__ import annotations

import logging
from pathlib import Path

from .rule import Rule

logger = logging.getLogger(__name__)

#: The rules that ship with the package, a folder each.
SHIPPED_RULES = Path(__file__).parent / "shipped"


def load_rule(rule: str | Path | Rule | None, *, with_basis: bool) -> Rule:
    """Returns the rule itself, from a folder or the Hub, or the one that ships with the package.

    Args:
        rule (`str`, `Path`, [`Rule`], *optional*): A path, a Hub id, the name of a rule that ships (`"default"`,
            `"default-lora"`, `"paper-cnn"`, `"paper-transformer"`), a rule, or None for the shipped default. A folder
            of that name goes first.
        with_basis (`bool`): Which shipped rule: `default` for coefficients of a basis, `default-lora` for raw tensors.
    """
    if isinstance(rule, Rule):
        return rule
    if rule is None:
        name = "default" if with_basis else "default-lora"
        logger.info("no rule given: using %r, which ships with hf_sl2o", name)
        return Rule.from_pretrained(SHIPPED_RULES / name)
    shipped = {path.name for path in SHIPPED_RULES.iterdir() if path.is_dir()}
    if isinstance(rule, str) and rule in shipped and not Path(rule).is_dir():
        return Rule.from_pretrained(SHIPPED_RULES / rule)
    try:
        return Rule.from_pretrained(rule)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. The rules that ship: {', '.join(sorted(shipped))}") from None
