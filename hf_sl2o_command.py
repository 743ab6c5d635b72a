"""Where `hf-sl2o` begins: its help, and an unknown command, are answered without the seconds that torch takes to load.

This module stands beside the package, since an import of anything in it registers the optimizers in transformers.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Sequence

#: By the word after `hf-sl2o`, what it does; the module of that name (`-` is `_`) in `hf_sl2o.commands` does it.
COMMANDS = {
    "extract": "a basis from a recorded run",
    "meta-train": "a rule, trained on the tasks that come with the package",
    "compare": "a rule beside tuned optimizers, on tasks that come with the package",
    "inspect": "what is in a basis, rule, fine-tune, trajectory, checkpoint or result",
    "report": "one HTML page to look at, from a run or a comparison",
    "push": "a rule, basis or fine-tune to the Hugging Face Hub",
    "pull": "one from the Hub to a folder, checked",
    "plan": "bytes, wire and time of a training step, before anything is made",
}


def known(what: str, value: str, names: Iterable[str]) -> str:
    """Returns `value`; raises `ValueError` with the closest name where it is none of `names`.

    Example:

    ```python
    >>> from hf_sl2o_command import known
    >>> known("--storage", "int9", ["int8", "bf16"])
    Traceback (most recent call last):
    ValueError: --storage is 'int9', expected one of int8, bf16; did you mean 'int8'?
    ```
    """
    names = list(names)
    if value in names:
        return value
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    raise ValueError(f"{what} is {shown!r}, expected one of {', '.join(names)}{hint}")


def help_text() -> str:
    """Returns what `hf-sl2o --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: hf-sl2o COMMAND ...", "", *lines, "", "hf-sl2o COMMAND --help says more."])


def put(text: str) -> None:
    """Prints to stdout at once; that a reader has had enough, as `head` has, is no error.

    Raises:
        `OSError`: it cannot be written, such as to a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is tried again at the end
        if not isinstance(error, BrokenPipeError):
            raise


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    Args:
        words (`Sequence[str]`, *optional*, defaults to those of the process): The command and its arguments.

    Raises:
        `SystemExit`: the help of a command was printed (0).
    """
    words = sys.argv[1:] if words is None else list(words)
    if not words:
        print(help_text(), file=sys.stderr)
        return 2
    try:
        if words[0] in ("-h", "--help"):
            put(help_text())
            return 0
        known("the command", words[0], COMMANDS)
        from hf_sl2o.cli import run_command

        return run_command(words[0], words[1:])
    except ValueError as error:
        print(f"hf-sl2o: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # the help could not be printed
        print(f"hf-sl2o failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
