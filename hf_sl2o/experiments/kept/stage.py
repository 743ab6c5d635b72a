"""A stage of a comparison: done once, and again where its settings or files have changed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .files import keep, kept, made_files, only_run, say, whole


def stage(
    folder: Path,
    name: str,
    key: str,
    work: Callable[[], dict[str, Any]],
    *,
    collective: bool = False,
    made: Path | None = None,
) -> dict[str, Any]:
    """Runs `work` unless its result of the same key is there: on the first process, or on all if it is collective.

    Args:
        folder (`Path`): Holds the results of stages.
        name, key (`str`): Of the stage, and of everything its result depends on.
        work (`Callable`): The stage.
        collective (`bool`, *optional*, defaults to `False`): All processes take part.
        made (`Path`, *optional*): The folder that `work` fills; if one of its files is gone, the stage is done again.
    """
    path, state = folder / "stages" / f"{name}.json", PartialState()
    known = kept(path)
    done = whole(known, path, key, made)
    state.wait_for_everyone()
    say(f"[{name}] done before, same settings" if done else f"[{name}] ...")
    if done:
        return known
    with only_run(path):
        start = time.perf_counter()
        if state.is_main_process and made is not None and known.get("key") == key:
            shutil.rmtree(made, ignore_errors=True)  # what is left of it is not gone on with
        state.wait_for_everyone()
        result = work() if collective or state.is_main_process else {}
        if state.is_main_process:
            seconds = time.perf_counter() - start
            keep(path, {"key": key, "seconds": seconds, **result, "files": made_files(made)})
        state.wait_for_everyone()
    return kept(path)
