"""From a folder or a file to its report, and from the report to a page on disk."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from ...foundation.files import load_json, write_atomically
from .of_comparison import comparison_report
from .of_meta import meta_report
from .of_result import result_report
from .of_run import run_report
from .page import page
from .parts import Report, sections
from .reading import last_part
from .subspace import explained, is_basis

COMPARISON = "comparison.json"


def report_on(output: str | Path) -> Report:
    """Reports on what a run left.

    Args:
        output (`str` or `Path`): The folder of a comparison, of a Trainer's run, of a meta-training, or of a basis; or
            a JSON file of results, as recipes and studies write it.

    Raises:
        `FileNotFoundError`: there is no such folder or file.
        `ValueError`: it is none of these, or a file in it cannot be read.

    Example:

    ```python
    >>> import json, pathlib
    >>> from hf_sl2o.experiments.report import report_on
    >>> run = {"eval": [[0, 2.0], [10, 1.0]], "train_loss": [[1, 2.0], [10, 1.1]], "learning_rate": 0.1}
    >>> _ = pathlib.Path("comparison.json").write_text(json.dumps({"runs": {"adamw": run}, "steps_to": {}}))
    >>> report = report_on("comparison.json")
    >>> report.kind, [figure.title for figure in report.figures()]
    ('a comparison of optimizers', ['Validation loss, 10 steps', 'Training loss, 10 steps'])

    ```
    """
    path = Path(output)
    if path.is_file():
        return _of_file(path, None)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder or file {path}; give the output of a run or of a comparison")
    if (path / COMPARISON).is_file():
        return _of_file(path / COMPARISON, path)
    for kind in (run_report, meta_report):  # a log.json may be anybody's
        if (report := kind(path)) is not None:
            return report
    if is_basis(path):
        return Report("a basis", last_part(path.resolve()), sections(("Explained variance", explained(path))))
    held = sorted(entry.name for entry in path.iterdir())[:8]
    raise ValueError(
        f"{path} holds {', '.join(held) or 'nothing'}; expected comparison.json (a comparison), trainer_state.json or "
        "checkpoint-*/trainer_state.json (a Trainer), log.json (a meta-training), or a basis. A Trainer writes its "
        "state with each checkpoint, and by trainer.save_state()"
    )


def _of_file(path: Path, folder: Path | None) -> Report:
    data = load_json(path, dict)
    title = last_part(path.resolve().parent if folder else path.resolve().with_suffix(""))
    if "runs" in data and "steps_to" in data:
        return comparison_report(data, str(path), folder, title)
    if isinstance(data.get("log_history"), list):
        raise ValueError(f"{path} is the state of a Trainer; give its folder, {path.parent}")
    return result_report(data, str(path), title)


def write_page(report: Report, path: str | Path) -> int:
    """Writes the page of a report, and returns its bytes: less than 1 MB.

    Raises:
        `ValueError`: it would be larger.
    """
    try:
        version = metadata.version("hf-sl2o")
    except metadata.PackageNotFoundError:
        version = "(a checkout)"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    made_with = f"Page made {now} by hf_sl2o {version} on Python {platform.python_version()}."
    content = page(report, made_with).encode("utf-8", "replace")
    write_atomically({Path(path): lambda temporary: Path(temporary).write_bytes(content)})
    return len(content)
