"""Gives each Python process that is started below `python -m hf_sl2o.run` the names `optim="sl2o"` and so on.

Python imports `sitecustomize` at its start. This one costs a process that does not train nothing: it waits for the two
modules of transformers that know optimizers. When the first is there, the names go into its choices, since a command
line may be read before a Trainer is imported; when the second is there, hf_sl2o registers as always. hf_sl2o itself
cannot be imported at the first, which modules that it needs wait for.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_NAMES = ("sl2o", "subspace_adamw", "subspace_sgd")


def add_member(enum: Any, value: str) -> Any:
    """Adds a member to an enumeration of strings, or returns the one that is there.

    Example:

    ```python
    >>> import enum
    >>> from hf_sl2o.training.startup.sitecustomize import add_member
    >>> class Colour(str, enum.Enum):
    ...     RED = "red"
    >>> add_member(Colour, "blue") is add_member(Colour, "blue") is Colour("blue")
    True
    ```
    """
    if value in enum._value2member_map_:
        return enum._value2member_map_[value]
    member = str.__new__(enum, value)
    member._name_, member._value_ = name, _ = value.upper(), value
    member.__objclass__, member._sort_order_ = enum, len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = enum._value2member_map_[value] = member
    type.__setattr__(enum, name, member)
    return member


def _add_names(module: Any) -> None:
    for value in _NAMES:
        add_member(module.OptimizerNames, value)


def _register(module: Any) -> None:
    if importlib.util.find_spec("hf_sl2o") is None:  # it was run from a folder, not installed
        sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(_HERE))))
    try:
        import hf_sl2o  # noqa: F401
    except ImportError as error:  # a process of another environment, which may not want our names
        print(f'hf_sl2o could not be imported, so optim="sl2o" is not known here: {error}', file=sys.stderr)


class _Finder:
    """Calls a function with each of some modules after its first import."""

    def __init__(self, then: dict[str, Any]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.then:
            return None
        then = self.then.pop(name)
        spec = importlib.util.find_spec(name)  # asks all finders; this one no longer answers
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_the_other() -> None:
    """Runs the `sitecustomize` that this one stands in front of."""
    folders = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
    spec = PathFinder.find_spec("sitecustomize", folders)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder({"transformers.training_args": _add_names, "transformers.trainer": _register}))  # type: ignore[arg-type]
    _run_the_other()
