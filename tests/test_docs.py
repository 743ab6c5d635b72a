"""The pages' code runs and prints what they say; tables are those of the results; docstring examples run."""

import contextlib
import doctest
import functools
import importlib
import importlib.util
import io
import itertools
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_sl2o
import hf_sl2o.experiments
from hf_sl2o.foundation.files import load_json

ROOT = Path(__file__).parent.parent
OF_SITE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md", "RESULTS.md", "REPRODUCTION.md", "CONTRIBUTING.md", "recipes/README.md",
        "recipes/results/README.md", "findings/README.md", *OF_SITE,
    )
}  # fmt: skip
README = PAGES["README.md"]
NUMBER = r"\d+\.\d+"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def printed_by(page, folder):
    """Runs the blocks of a page, one after the other; returns what they print."""
    script = folder / "page.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::SyntaxWarning", str(script)]
    out = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.splitlines()


@pytest.mark.slow
def test_readme_blocks_run_in_order_and_print_what_is_written(tmp_path):
    code = blocks("README.md", "python")
    assert len(code) == 3 and len([line for line in code[0].splitlines() if line.strip()]) <= 15
    lines = [line for line in printed_by("README.md", tmp_path) if line.startswith(("loss", "in the subspace"))]
    said = [line for block in blocks("README.md", "text")[:2] for line in block.splitlines()]
    assert [re.sub(NUMBER, "#", line) for line in lines] == [re.sub(NUMBER, "#", line) for line in said]
    numbers, written = ([float(x) for line in of for x in re.findall(NUMBER, line)] for of in (lines, said))
    assert numbers == pytest.approx(written, abs=0.1)
    lora, full, same, sl2o, tuned = numbers
    assert sl2o < 0.6 * same and tuned < 0.6 * same and lora < 2.7


@pytest.mark.slow
def test_what_the_readme_says_of_adamw(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, found = blocks("README.md", "python")[0], {}
    for rate in (None, 1e-2):
        words = 'optim="adamw_torch", disable_tqdm=True' + ("" if rate is None else f", learning_rate={rate}")
        torch.manual_seed(0)
        exec(code.replace('optim="sl2o"', words), {})
        found[rate] = float(re.findall(rf"^loss ({NUMBER})$", capsys.readouterr().out, flags=re.MULTILINE)[0])
    said = re.search(rf"the same script ends at ({NUMBER}), and at ({NUMBER}) with the best of six", README)
    assert list(found.values()) == pytest.approx([float(said[1]), float(said[2])], abs=0.05)


def test_the_rates_that_the_readme_calls_best_are():
    made = load_json(ROOT / "benchmarks" / "results" / "readme_example.json")["validation_loss"]
    lora, subspace = made["lora"], made["subspace, 50 steps"]
    adamw = {name: loss for name, loss in lora.items() if "adamw" in name}
    assert len(adamw) == 6 and min(adamw, key=adamw.get) == "adamw_torch 0.01"
    text = f"ends at {adamw['adamw_torch default']:.2f}, and at {adamw['adamw_torch 0.01']:.2f} with the best of six"
    assert text in README and f"loss {lora['sl2o']:.2f}\n" in README

    def best(of):
        return min((loss, name) for name, loss in subspace.items() if of(name))

    full, same = (best(lambda name, steps=steps: f"{steps} steps" in name) for steps in (600, 50))
    tuned = best(lambda name: name.startswith("subspace"))
    assert (full[1], same[1], tuned[1]) == (
        "adamw_torch 0.003, 600 steps", "adamw_torch 0.01, 50 steps", "subspace_adamw 1.0",
    )  # fmt: skip
    assert f"600 steps of AdamW {full[0]:.2f}, after 50 {same[0]:.2f}" in README
    assert f"sl2o {subspace['sl2o']:.2f}, tuned AdamW {tuned[0]:.2f}" in README


def outputs(page):
    """Lines of the `text` blocks that follow a block of Python: what that prints."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [
        line
        for (before, _), (language, text) in itertools.pairwise(fences)
        if (before, language) == ("python", "text")
        for line in text.splitlines()
        if line.strip()
    ]


def check_said(said, printed):
    """All lines that a page shows are printed, in that order; decimals may differ by a twentieth, or by 0.05."""
    lines = iter(printed)
    for line in said:
        words = re.sub(NUMBER, "#", line).split()
        same = next((other for other in lines if re.sub(NUMBER, "#", other).split() == words), None)
        assert same is not None, f"{line!r} is on the page, and not printed: {printed}"
        numbers, shown = ([float(x) for x in re.findall(NUMBER, text)] for text in (same, line))
        assert numbers == pytest.approx(shown, rel=0.05, abs=0.05), (same, line)


def test_what_a_page_shows_is_compared():
    check_said(["loss 3.87", "(20,)"], ["noise", "loss 3.85", "(20,)"])
    for printed in (["loss 3.87"], ["(20,)", "loss 3.87"], ["loss 3.47", "(20,)"], ["Loss 3.87", "(20,)"]):
        with pytest.raises(AssertionError):
            check_said(["loss 3.87", "(20,)"], printed)


# The table of docs/compare.md has a test of its own.
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in OF_SITE if blocks(page, "python") and page != "docs/compare.md"])
def test_a_page_runs_and_prints_what_it_says(page, tmp_path):
    check_said(outputs(page), printed_by(page, tmp_path))


@pytest.mark.slow
def test_the_comparison_of_the_how_to_runs_and_prints_its_table(tmp_path):
    code = blocks("docs/compare.md", "python")
    assert len(code) == 1 and len([line for line in code[0].splitlines() if line.strip()]) <= 25

    def rows(lines):
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
        return {row[0]: (float(row[1]), float(row[2])) for row in cells[1:]}

    made, said = rows(printed_by("docs/compare.md", tmp_path)), rows(blocks("docs/compare.md", "text")[0].splitlines())
    assert set(made) == set(said) == set(hf_sl2o.experiments.ARMS)
    for arm, (rate, loss) in said.items():
        assert made[arm] == (rate, pytest.approx(loss, rel=0.03)), arm
    assert {"comparison.json", "comparison.png", *made} <= {path.name for path in (tmp_path / "outputs/own").iterdir()}


def commands(page):
    if page in ("docs/launch.md", "docs/programs.md"):  # tests/test_launch.py and test_programs.py run those
        return []
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.split(" #")[0].strip()]


@functools.cache
def flags_of(script):
    """What a script's --help names."""
    module = importlib.import_module(str(Path(script).with_suffix("")).replace("/", "."))
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"--(\w+)", out.getvalue()))


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_shell_commands_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in commands(page):
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
            continue
        # tests/test_cli.py runs those of hf-sl2o; an earlier commit is checked out to stand beside today's
        if words[:2] == ["pip", "install"] or words[0] == "hf-sl2o" or words[:3] == ["git", "worktree", "add"]:
            continue
        assert words[0] in ("python", "accelerate", "torchrun"), line
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[at]).is_file(), line
        if "--config_file" in words[:at]:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        if words[at] == "benchmarks/readme_table.py":
            continue
        known = flags_of(words[at])
        if words[at] == "recipes/studies/inputs.py":  # hands on what it does not know
            known = known | flags_of("recipes/meta_train.py")
        unknown = {word[2:] for word in words[at + 1 :] if word.startswith("--")} - known
        assert not unknown, (line, unknown)


def test_each_recipe_and_each_result_is_in_its_table():
    for path in (ROOT / "recipes").glob("*.py"):
        assert f"`{path.name}`" in PAGES["recipes/README.md"], path
    for path in [*(ROOT / "recipes" / "results").iterdir(), *(ROOT / "benchmarks" / "results").iterdir()]:
        assert path.name == "README.md" or path.name in PAGES["recipes/results/README.md"], path


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
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
            assert ((ROOT / page).parent / link).exists(), (page, link)


def test_links_to_headings_lead_somewhere():
    def slugs(text):
        titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for page, text in PAGES.items():
        for file, heading in re.findall(r"\]\(([\w./]*)#([^)]+)\)", text):
            target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
            assert heading in slugs(target.read_text(encoding="utf-8")), (page, heading)


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
        if module.name.rpartition(".")[2].startswith("triton_") and importlib.util.find_spec("triton") is None:
            continue  # comes with torch for CUDA on Linux
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
