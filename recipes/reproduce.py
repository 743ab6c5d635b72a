"""Redoes the tables and figures of the paper's supplement, and says what became of each claim.

    python recipes/reproduce.py --list
    python recipes/reproduce.py --data PATH --only "figure 7"
    python recipes/reproduce.py --data PATH --results outputs/reproduce     # all of them, from nothing

One command runs on each core. What has its result in --results is not run again; killed and started again it goes on,
also inside a recipe. REPRODUCTION.md is written: for each table and figure the command, its cost, the numbers of both,
and the verdict; with --results into that folder. `--size paper` prints the commands at the paper's size and runs
nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import study_parser
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.kept.files import read_object
from hf_sl2o.experiments.supplement import ENTRIES, Entry
from hf_sl2o.foundation.checked import check_integer
from hf_sl2o.foundation.files import save_json, write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes" / "results"
MINUTES = "reproduce_minutes.json"
HEAD = """# The supplement, redone

Written by `python recipes/reproduce.py`. Every verdict is computed from the files in the last column. Minutes are
those of one core at the small size, each file counted once ("about": estimated from parts); hours those that the
paper's size may take on one GPU, where nobody has run it yet. All of it from nothing takes about {hours} hours on
two cores, one command on each; three were aimed at.

| in the supplement | of | the paper | here | verdict | command | minutes | GPU hours | files |
|---|---|---|---|---|---|---|---|---|
"""


def words_of(command: str, name: str, options: Any) -> list[str]:
    """A command of the list for this machine."""
    data = options.data
    embedded = data == "embedded"
    places = {
        "json": str(options.results / f"{name}.json"), "out": str(options.output_dir / name), "data": data,
        "cifar": "synthetic" if embedded else str(Path(data) / "cifar10"),
        "e2e": data if embedded else str(Path(data) / "e2e_nlg"),
    }  # fmt: skip
    python, *words = shlex.split(command)
    assert python == "python", command
    return [sys.executable, *(word.format(**places) for word in words)]


def run(entries: Sequence[Entry], options: Any) -> None:
    """Runs what has no result yet, `options.processes` commands at a time; one that fails does not stop the others.

    Raises:
        `RuntimeError`: a command failed (the first one is named).
    """
    commands: dict[str, tuple[Entry, str]] = {}
    for entry in entries:
        for name, command in entry.files.items():
            commands.setdefault(name, (entry, command))
    missing = []
    for name, (entry, command) in commands.items():
        if (options.results / f"{name}.json").is_file():
            print(f"{entry.name}: {options.results / f'{name}.json'} is there", flush=True)
        else:
            missing.append((entry, name, words_of(command, name, options)))
    threads = str(max(1, (os.cpu_count() or 1) // options.processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    lock = threading.Lock()

    def one(entry: Entry, name: str, words: list[str]) -> str | None:
        with lock:  # a line of its own
            print(f"{entry.name}: {shlex.join(words)}", flush=True)
        process = subprocess.Popen(words, cwd=ROOT, env=environment)
        # processor seconds: what else the machine does makes them no longer
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        with lock:
            took(options.results, name, (usage.ru_utime + usage.ru_stime) / 60)
        if code:
            return f"{entry.name}: its command failed with exit code {code}; start again to go on"
        made, result = options.output_dir / name / "comparison.json", options.results / f"{name}.json"
        if not result.is_file():
            result.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, result)
            if made.with_suffix(".png").is_file():
                shutil.copy(made.with_suffix(".png"), result.with_suffix(".png"))
        return None

    with ThreadPoolExecutor(options.processes) as pool:
        failed = [said for said in pool.map(lambda work: one(*work), missing) if said]
    if failed:
        raise RuntimeError(failed[0])


def took(results: Path, name: str, minutes: float) -> None:
    """Adds to the minutes of a core that a command took, over all its starts that came to an end."""
    path = results / MINUTES
    known = read_object(path, "minutes")["minutes"] if path.is_file() else {}
    known[name] = round(known.get(name, 0.0) + minutes, 4)
    save_json(path, {"minutes": known, "cores": os.cpu_count(), "environment": environment()})


def minutes_of(entry: Entry, results: Path) -> str:
    """As measured where that is known, else about what it takes; a file counts where it comes first."""
    path = results / MINUTES
    known = read_object(path, "minutes")["minutes"] if path.is_file() else {}
    before = {name for other in ENTRIES[: ENTRIES.index(entry)] for name in other.files}
    own = [name for name in entry.files if name not in before]
    if all(name in known for name in own):
        return f"{sum(known[name] for name in own):.0f}"
    return f"about {entry.minutes}"


def verdict_of(entry: Entry, folder: Path) -> tuple[str, str]:
    """From the results that are in the folder.

    Raises:
        `ValueError`: a result is not what its command writes today.
    """
    paths = {name: folder / f"{name}.json" for name in entry.files}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        return "not run yet", f"{', '.join(missing)} is not there"
    try:
        return entry.verdict({name: read_object(path) for name, path in paths.items()})
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{entry.name}: {', '.join(map(str, paths.values()))} is of another version of its command "
            f"({type(error).__name__}: {error}); move it away and run the command again"
        ) from error


def row(entry: Entry, folder: Path) -> str:
    word, ours = verdict_of(entry, folder)
    commands = "<br>".join(f"`{re.sub('[{}]', '', command)}`" for command in entry.files.values()) or "none"
    files = ", ".join(f"{name}.json" for name in entry.files) or "none"
    cells = (
        entry.name,
        entry.shows,
        entry.paper,
        ours,
        word,
        commands,
        minutes_of(entry, folder),
        entry.gpu_hours,
        files,
    )
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def main(argv: list[str] | None = None) -> dict[str, str]:
    parser = study_parser(__doc__, data="embedded", output_dir=Path("outputs/reproduce"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are and go")
    parser.add_argument("--size", choices=["small", "paper"], default="small")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="commands at a time (one a core)")
    parser.add_argument("--only", nargs="+", help="names such as 'figure 7', as --list shows them")
    parser.add_argument("--list", action="store_true", help="show the table; run nothing")
    options = parse_options(parser, argv)
    names = [entry.name for entry in ENTRIES]
    unknown = [name for name in options.only or () if name not in names]
    if unknown:
        raise ValueError(f"--only has {unknown[0]!r}, expected some of {', '.join(names)}")
    chosen = [entry for entry in ENTRIES if options.only is None or entry.name in options.only]
    check_integer("--processes", options.processes, 1)
    if options.size == "small" and not options.list:
        run(chosen, options)
    verdicts = {}
    for entry in chosen:
        if options.size == "paper":
            print(f"{entry.name}: {entry.shows}\n    {entry.paper_size}\n    about {entry.gpu_hours} GPU hours")
            continue
        word, ours = verdict_of(entry, options.results)
        verdicts[entry.name] = word
        print(f"{entry.name}: {entry.shows}\n    the paper: {entry.paper}\n    here: {ours}\n    {word}")
        for name, command in entry.files.items():
            words = ["python", *words_of(command, name, options)[1:]]
            print(f"    {shlex.join(words)} ({minutes_of(entry, options.results)} minutes of one core)")
    if options.size == "small" and not options.list:
        hours = f"{sum(float(minutes_of(e, options.results).split()[-1]) for e in ENTRIES) / 120:.1f}"
        page = HEAD.format(hours=hours) + "\n".join(row(entry, options.results) for entry in ENTRIES) + "\n"
        where = (ROOT if options.results == RESULTS else options.results) / "REPRODUCTION.md"
        write_atomically({where: lambda path: Path(path).write_text(page, encoding="utf-8")})
    return verdicts


if __name__ == "__main__":
    run_script(main)
