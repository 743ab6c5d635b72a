"""The README's code runs and prints what it says; its tables are those of the results; docstring examples run."""

import doctest
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sl2o
from hf_sl2o.foundation.files import load_json

ROOT = Path(__file__).parent.parent
README, RESULTS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_readme_blocks_run_in_order_and_print_what_is_written(tmp_path):
    code = blocks("python")
    assert len(code) >= 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(code), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::SyntaxWarning", str(script)]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr[-3000:]
    said = next(block for block in blocks("text") if block.startswith("loss after")).strip()
    printed = "\n".join(line for line in out.stdout.splitlines() if line.startswith(("loss after", "in the subspace")))
    number = r"\d+\.\d+"
    assert re.sub(number, "#", said) == re.sub(number, "#", printed)
    said_numbers, numbers = ([float(x) for x in re.findall(number, text)] for text in (said, printed))
    assert numbers == pytest.approx(said_numbers, abs=0.1)
    full, same, sl2o, tuned = numbers
    assert sl2o < 0.5 * same and tuned < 0.5 * same
    assert "torch.Size([20])" in out.stdout


def test_shell_commands_exist():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
            continue
        assert words[0] in ("python", "accelerate"), line
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).is_file()
        if "--config_file" in words[:script]:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        recipe = importlib.import_module(f"recipes.{Path(words[script]).stem}")
        fields = {
            f for cls in (recipe.RecipeArguments, hf_sl2o.SL2OTrainingArguments) for f in cls.__dataclass_fields__
        }
        for word in words[script:]:
            assert not word.startswith("--") or word.removeprefix("--") in fields, line


def test_results_name_no_folder_of_the_machine_they_were_made_on():
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for entry in value.values() if isinstance(value, dict) else value:
                yield from strings(entry)

    found = [*ROOT.glob("*/results/*.json"), *ROOT.glob("hf_sl2o/rules/shipped/*/*.json")]
    assert len(found) > 10
    for path in found:
        for text in strings(json.loads(path.read_text())):
            assert not any(word.rpartition("=")[2].startswith("/") for word in text.split()), (path.name, text)


def test_tables_are_those_of_the_results():
    out = subprocess.run(
        [sys.executable, "benchmarks/readme_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    for text in (README, RESULTS):
        links = re.findall(r"\]\(([^)#:]+)[^):]*\)", text)
        assert links and all((ROOT / link).exists() for link in links)


def test_links_to_headings_lead_somewhere():
    def slugs(text):
        titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for own, text in (("README.md", README), ("RESULTS.md", RESULTS)):
        for file, heading in re.findall(r"\]\(([\w.]*)#([^)]+)\)", text):
            assert heading in slugs({"README.md": README, "RESULTS.md": RESULTS}[file or own]), heading


def test_accelerate_configs_load():
    from accelerate.commands.config.config_args import load_config_from_file

    wanted = {"cpu": "no", "single_gpu": "bf16", "multi_gpu": "bf16"}
    for name, precision in wanted.items():
        config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
        assert config.mixed_precision == precision and config.use_cpu == (name == "cpu")


def test_versions_agree():
    assert f'version = "{hf_sl2o.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {hf_sl2o.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert hf_sl2o.__all__ == sorted(hf_sl2o.__all__, key=str) and all(hasattr(hf_sl2o, n) for n in hf_sl2o.__all__)


def test_shipped_rules_say_how_they_were_made():
    for name in ("default", "default-lora"):
        folder = ROOT / "hf_sl2o" / "rules" / "shipped" / name
        provenance = load_json(folder / "provenance.json")
        assert provenance["command"].startswith("python recipes/") and provenance["environment"]["commit"]
        assert hf_sl2o.Rule.from_pretrained(folder).config.expression is None


def examples():
    for module in pkgutil.walk_packages(hf_sl2o.__path__, "hf_sl2o."):
        loaded = importlib.import_module(module.name)
        for test in doctest.DocTestFinder(exclude_empty=True).find(loaded):
            if test.docstring and ">>>" in test.docstring:
                yield pytest.param(loaded, test.name, test.docstring, id=test.name)


@pytest.mark.parametrize("module, name, text", examples())
def test_docstring_examples(module, name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(line for line in text.splitlines() if not line.strip().startswith("```"))
    parsed = doctest.DocTestParser().get_doctest(text, {}, name, module.__file__, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(parsed).failed == 0


def test_every_public_class_has_an_example():
    bare = [
        name
        for name in hf_sl2o.__all__
        if isinstance(getattr(hf_sl2o, name), type) and "Example" not in (getattr(hf_sl2o, name).__doc__ or "")
    ]
    assert set(bare) <= {"Basis", "Estimator", "Rule", "RuleState", "SubspaceLogCallback", "SubspaceOptimizerFactory"}
