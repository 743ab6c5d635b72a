"""`python -m hf_sl2o.run`: scripts, modules, commands and launchers; the names are known in child processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sl2o import run
from hf_sl2o.training.startup.sitecustomize import add_member

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable

SCRIPT = """
import sys
exec(sys.argv.pop(1))
from transformers import HfArgumentParser, TrainingArguments
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
from transformers import Trainer
print(__name__, args.optim.value, Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)
"""
OPTIONS = ["--output_dir", "out", "--optim", "sl2o", "--use_cpu", "true"]
KNOWN = "__main__ sl2o SubspaceOptimizerFactory"
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""
SPAWN = """
import multiprocessing, sys
def main(results):
    from transformers import TrainingArguments
    results.put(TrainingArguments("out", optim="sl2o", use_cpu=True).optim.value)
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=main, args=(results,))
    process.start()
    print(results.get(timeout=60))
    process.join()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "spawn.py").write_text(SPAWN)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text(SCRIPT)
    (tmp_path / "package" / "__main__.py").write_text("print('ran the package')")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "__init__.py").write_text("")
    return tmp_path


def start(folder, *words, head=("-m", "hf_sl2o.run"), **environment):
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [PYTHON, *head, *words], cwd=folder, capture_output=True, text=True, timeout=100, env={**env, **environment}
    )


def child(folder, *words, before="", **environment):
    """What a launcher does below `python -m hf_sl2o.run`: another process, with the environment that it was given."""
    inherited = run.child_environment({"PYTHONPATH": f"{ROOT}{before and os.pathsep}{before}"})
    return start(folder, *words, head=(), **{**inherited, **environment})


def test_a_module_has_the_names(folder):
    out = start(folder, "-m", "package.train", "0", *OPTIONS)
    assert out.returncode == 0 and out.stdout.strip().splitlines()[-1] == KNOWN, out.stderr[-3000:]


def test_a_launchers_processes_have_the_names(folder):
    words = ["torchrun", "--standalone", "--nproc_per_node", "1", "script.py", "0", *OPTIONS]
    out = start(folder, *words, PATH="/usr/bin:/bin")  # the command of this environment, which is not activated
    assert out.returncode == 0 and out.stdout.strip().splitlines()[-1] == KNOWN, out.stderr[-3000:]


def test_the_names_are_there_whatever_is_imported_first(folder):
    first = "from transformers import TrainerCallback, Seq2SeqTrainer; import peft, accelerate"
    out = child(folder, "launcher.py", "script.py", first, *OPTIONS)
    assert out.returncode == 0 and out.stdout.strip().splitlines()[-1] == KNOWN, out.stderr[-3000:]
    assert "could not be imported" not in out.stderr


def test_processes_that_multiprocessing_spawns_have_the_names(folder):
    out = child(folder, "spawn.py")
    assert out.returncode == 0 and out.stdout.strip() == "sl2o", out.stderr[-3000:]


def test_the_users_own_customisation_runs_and_a_process_that_does_not_train_pays_nothing(folder):
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("import builtins; builtins.theirs = 5")
    (folder / "leave.py").write_text("import sys; print(theirs, 'transformers' in sys.modules); sys.exit(theirs)")
    out = child(folder, "leave.py", before=str(folder / "site"))
    assert out.returncode == 5 and out.stdout.strip() == "5 False", out.stderr


def test_a_package_a_script_by_another_name_and_a_command_are_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "named").write_text("import sys; print(__name__, sys.argv)")
    for words, text in (
        (["-m", "package"], "ran the package"),
        (["./named", "--x"], "__main__ ['./named', '--x']"),
    ):
        monkeypatch.setattr(sys, "argv", ["run", *words])
        run.main()
        assert capsys.readouterr().out.strip() == text
    seen = []
    monkeypatch.setattr(os, "execv", lambda *words: seen.append(words))
    monkeypatch.setattr(sys, "argv", ["run", "torchrun", "x.py"])
    run.main()
    command = str(Path(PYTHON).parent / "torchrun")
    assert seen == [(command, [command, "x.py"])] and os.environ["PYTHONPATH"].endswith("startup")


def test_a_process_of_an_environment_without_us_goes_on(folder):
    (folder / "transformers").mkdir()
    (folder / "transformers" / "__init__.py").write_text("")
    enum = "import enum\nclass OptimizerNames(str, enum.Enum):\n    A = 'a'\n"
    (folder / "transformers" / "training_args.py").write_text(enum)
    (folder / "transformers" / "trainer.py").write_text("from . import training_args")
    code = "import transformers.trainer as t; print([m.value for m in t.training_args.OptimizerNames])"
    environment = run.child_environment({"PYTHONPATH": str(folder)})
    out = start(folder, "-c", code, head=("-S", "-X", "utf8"))  # no customisation without site
    assert out.stdout.strip() == "['a']", out.stderr
    out = start(folder, "-c", code, head=(), PYTHONPATH=environment["PYTHONPATH"])
    assert out.stdout.strip() == "['a', 'sl2o', 'subspace_adamw', 'subspace_sgd']", out.stderr
    assert out.returncode == 0 and out.stderr.startswith("hf_sl2o could not be imported, so optim=")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "expected something to run and found nothing"),
        (["absent.py"], "expected a Python script and found 'absent.py', which is no file"),
        (["absent"], "'absent' is no Python script, and no such command is beside"),
        (["-m"], "expected a module after -m and found nothing"),
        (["-m", "absent"], "there is no module 'absent' to run"),
        (["-m", "absent.part"], "there is no module 'absent.part' to run"),
        (["-m", "empty"], "there is no module 'empty' to run"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(folder, monkeypatch, words, text):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", ["run", *words])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as error:
        run.main()
    said = str(error.value.code)
    assert said.startswith(text) and "usage: python -m hf_sl2o.run (SCRIPT.py | -m MODULE | COMMAND)" in said
    assert "\n" not in said


def test_help_and_the_environment_of_children(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--help"])
    run.main()
    assert capsys.readouterr().out.startswith("usage: python -m hf_sl2o.run")
    ours = run.child_environment({})["PYTHONPATH"]
    assert Path(ours, "sitecustomize.py").is_file()
    twice = run.child_environment(run.child_environment({"PYTHONPATH": "/a", "OTHER": "1"}))
    assert twice == {"PYTHONPATH": os.pathsep.join([ours, "/a"]), "OTHER": "1"}


def test_startup_knows_the_names_that_we_register():
    from transformers.training_args import OptimizerNames

    from hf_sl2o.training.arguments import OPTIMIZERS
    from hf_sl2o.training.startup import sitecustomize

    assert set(sitecustomize._NAMES) == set(OPTIMIZERS)
    for name in OPTIMIZERS:  # registered already: the very member
        assert add_member(OptimizerNames, name) is OptimizerNames(name)
