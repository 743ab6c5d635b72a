"""The plan of the house: who imports whom, files that are read in a sitting, and what an import costs a script."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hf_sl2o", "recipes", "benchmarks", "tests")
LAYERS = (
    "foundation", "subspace", "rules", "optim", "meta", "training", "analysis", "metrics", "experiments", "commands",
)  # fmt: skip
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 80
HEAVY = ("datasets", "evaluate", "matplotlib", "sklearn", "peft")


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def too_long(path):
    """What of a file is longer than it may be."""
    text = path.read_text(encoding="utf-8")
    found = [(path.name, len(text.splitlines()))] if len(text.splitlines()) > MOST_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            found += [(node.name, lines)] if lines > MOST_LINES_OF_A_FUNCTION else []
    return found


def test_files_and_functions_are_read_in_a_sitting(tmp_path):
    assert [entry for path in sources(*FOLDERS) for entry in too_long(path)] == []
    (tmp_path / "long.py").write_text("def f():\n" + "    x = 1\n" * MOST_LINES)
    assert too_long(tmp_path / "long.py") == [("long.py", MOST_LINES + 1), ("f", MOST_LINES + 1)]


def imported(path):
    """Modules that a file imports, by their first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_recipes_import_the_package_and_not_each_other():
    scripts = {path.stem for path in sources("recipes", "benchmarks")} | {"recipes", "benchmarks", "tests"}
    for path in sources("recipes"):
        assert not {name.partition(".")[0] for name in imported(path)} & scripts, path


def test_each_folder_says_what_it_holds_and_may_import():
    folders = {path.name for path in (ROOT / "hf_sl2o").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(LAYERS)
    for name in LAYERS:
        text = ast.get_docstring(ast.parse((ROOT / "hf_sl2o" / name / "__init__.py").read_text(encoding="utf-8")))
        assert "t may import" in text, name
        for path in (ROOT / "hf_sl2o" / name).iterdir():
            if path.name not in ("__init__.py", "__pycache__"):
                assert f"`{path.stem}" in text, (name, path.name)


def contracts(folder):
    pytest.importorskip("importlinter", reason="import-linter has no release for this Python")
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c()"
    words = [sys.executable, "-c", code, "--no-cache", str(ROOT / "layers.toml")]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (None, "", ""),
        ("optim/_common.py", "from ..training import build", "Imports go downwards"),
        ("rules/inputs.py", "from ..subspace import Basis", "Imports go downwards"),
        ("optim/learned.py", "import transformers", "Rules, bases and optimizers work in a plain torch loop"),
        ("training/build.py", "import matplotlib", "A training script loads no data sets"),
    ],
)
def test_imports_go_downwards(file, line, broken, tmp_path):
    shutil.copytree(ROOT / "hf_sl2o", tmp_path / "hf_sl2o", ignore=shutil.ignore_patterns("__pycache__"))
    if file is not None:
        path = tmp_path / "hf_sl2o" / file
        path.write_text(path.read_text(encoding="utf-8") + f"\n\ndef later():\n    {line}\n", encoding="utf-8")
    out = contracts(tmp_path)
    assert (out.returncode == 0) == (file is None), out.stdout + out.stderr
    kept = " ".join(out.stdout.split())
    assert "BROKEN" not in kept if file is None else broken in kept.partition("Broken contracts")[2], out.stdout


def added(code):
    """Modules that `code` loads after a Trainer, and what there is after a further import."""
    first = "import sys\nfrom transformers import Trainer\nbefore = set(sys.modules)\n"
    then = "\nprint(*sorted(set(sys.modules) - before))\n"
    out = subprocess.run(
        [sys.executable, "-c", first + code + then + "import matplotlib.pyplot" + then],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    return [line.split() for line in out.stdout.splitlines()]


def test_an_import_loads_what_a_training_script_needs_and_no_more():
    names, more = added("import hf_sl2o")
    assert "hf_sl2o.training.trainer" in names and not [name for name in names if "experiments" in name]
    others = [name for name in names if not name.startswith("hf_sl2o")]
    assert len(others) < 5 and not [name for name in others if name.partition(".")[0] in HEAVY], others
    assert [name for name in more if name.startswith("matplotlib")]  # a break is seen


def test_what_imports_hf_sl2o_finds_every_public_name_and_no_old_module():
    import hf_sl2o

    for name in hf_sl2o.__all__:
        assert getattr(hf_sl2o, name) is not None
    old = ("arguments", "build", "registry", "rule", "rule_config", "tasks", "comparison", "step_size", "hub", "files")
    for name in old:
        with pytest.raises(ModuleNotFoundError):
            __import__(f"hf_sl2o.{name}")
        assert f"`hf_sl2o.{name}`" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
