"""The command `hf-sl2o`: `hf-sl2o plan --model llama-7b` says what a step of training will cost.

Exit codes: 0 it was done, 1 it failed, 2 bad input (one sentence on stderr says which), 130 it was interrupted.

A command is a module of `hf_sl2o.commands`, imported when it is asked for, and one line in `hf_sl2o_command.COMMANDS`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_sl2o_command import COMMANDS, known, main, put

from .commands.words import finite

__all__ = ["COMMANDS", "main", "run_command"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the closest option where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        put(self.format_help().rstrip("\n"))

    def parse_strict(self, words: Sequence[str]) -> argparse.Namespace:
        """Returns the arguments; an unknown option is named before one that is missing.

        Raises:
            `ValueError`: an option is unknown, or argparse refuses the arguments.
        """
        options = sorted(self._option_string_actions)
        for word in words:
            if word == "--":
                break
            if word.startswith("--"):
                known(f"an option of {self.prog}", word.partition("=")[0], options)
        return self.parse_args(list(words))


def parser_of(name: str) -> Parser:
    """The parser of a command."""
    command = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
    parser = Parser(
        f"hf-sl2o {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=command.run)
    return parser


def run_command(name: str, words: Sequence[str]) -> int:
    """Runs the command `name` and returns its exit code; raises `ValueError` on bad input."""
    try:
        arguments = parser_of(name).parse_strict(words)
        with contextlib.redirect_stdout(sys.stderr):  # what libraries and stages say of their progress
            facts, text = arguments.run(arguments)
        put(json.dumps(finite(facts), indent=2, allow_nan=False) if arguments.json else text)
    except FileNotFoundError as error:
        raise ValueError(_line(error)) from error
    except (OSError, RuntimeError, ImportError, FloatingPointError, MemoryError) as error:
        print(f"hf-sl2o {name} failed: {_line(error)}", file=sys.stderr)
        return 1
    return 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
