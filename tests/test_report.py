"""The report page of a run, a comparison and a meta-training: names stay text, what is no output is refused."""

import argparse
import copy
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sl2o import Layout, LSTMRule, MetaTrainer, MetaTrainingArguments, RandomBasis, RuleConfig, Task
from hf_sl2o.commands import report as command
from hf_sl2o.experiments import Arm, Comparison, ComparisonArguments, grid, training_arguments
from hf_sl2o.experiments.report import report_on, write_figures, write_page
from hf_sl2o.experiments.report.page import MOST_BYTES, page
from hf_sl2o.experiments.report.parts import Bar, Bars, Chart, Curve, Report, Section
from hf_sl2o.foundation.files import load_json, save_json, save_tensors

from .test_trainer import run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes" / "results"
E2E = RESULTS / "gpt2_e2e.json"


def texts(report):
    return " ".join(part for section in report.sections for part in section.parts if isinstance(part, str))


def figure(report, title):
    (found,) = [part for part in report.figures() if part.title.startswith(title)]
    return found


def page_of(output, folder):
    write_page(report_on(output), folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The tags and attributes that a browser would see, and whether all are closed."""

    void = {"meta", "line", "path", "rect", "circle"}

    def __init__(self, text):
        super().__init__()
        self.names, self.attributes, self.open = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained") / "my-run"
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = run(folder, **options)
    return folder, trainer


def test_the_run_of_a_trainer(trained, tmp_path):
    folder, trainer = trained
    report = report_on(folder)
    assert (report.kind, report.title) == ("a run of a Trainer", "my-run")
    loss = figure(report, "Loss")
    assert [curve.name for curve in loss.curves] == ["validation loss", "training loss"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert loss.curves[1].points == [(entry["step"], entry["loss"]) for entry in logged]
    for title, key in (
        ("Distance from", "coefficients_norm"),
        ("Share of", "gradient_share"),
        ("Length", "delta_norm"),
    ):
        points = figure(report, title).curves[0].points
        assert points == [(entry["step"], entry[f"sl2o_{key}"]) for entry in logged], key
    paths = figure(report, "Paths of the coefficients")
    assert len(paths.curves) == 6
    for curve in paths.curves:
        index = int(curve.name.removeprefix("direction ")) - 1
        for step, value in curve.points:
            saved = load_file(folder / f"checkpoint-{step:.0f}" / "coefficients.safetensors")["coefficients"]
            assert value == float(saved[index])
    ends = [abs(curve.points[-1][1]) for curve in paths.curves]
    assert ends == sorted(ends, reverse=True) and len(set(ends)) == 6
    assert str(folder.parent) not in page_of(folder, tmp_path)


def test_a_damaged_checkpoint_is_left_out_and_said(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    last = folder / "checkpoint-6" / "trainer_state.json"
    last.write_text(last.read_text()[:200])
    report = report_on(folder)
    said = [part for part in report.sections[0].parts if isinstance(part, str)]
    assert len(said) == 1 and "checkpoint-6" in said[0] and "not valid JSON" in said[0]
    assert figure(report, "Loss").curves[1].points[-1][0] == 4
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(ValueError, match="not valid JSON"):
        report_on(folder)


def test_what_is_left_out_is_named_from_any_folder(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    (folder / "checkpoint-6" / "trainer_state.json").write_text("{")
    (folder / "trainer_state.json").write_text("[]")
    monkeypatch.chdir(folder)
    for output in (".", folder):
        first, second = [part for part in report_on(output).sections[0].parts if isinstance(part, str)]
        assert first.startswith("Left out: run/trainer_state.json holds a JSON list")
        assert second.startswith("Left out: checkpoint-6/trainer_state.json is not valid JSON")


def test_the_log_of_another_program_is_no_meta_training(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    save_json(tmp_path / "run" / "log.json", [{"started": 1}])
    assert report_on(tmp_path / "run").kind == "a run of a Trainer"


def test_thousands_of_coefficients_stay_below_a_megabyte(tmp_path):
    for step in range(1, 61):
        at = tmp_path / "run" / f"checkpoint-{step}"
        values = torch.arange(3000, 0, -1).float() * step
        save_tensors(at / "coefficients.safetensors", {"coefficients": values})
        save_json(at / "trainer_state.json", {"global_step": step, "log_history": []})
    paths = figure(report_on(tmp_path / "run"), "Paths of the coefficients")
    assert paths.note.endswith("Named: the 8 largest at the end; grey: the next 200 of the other 2,992.")
    assert paths.faint[-1][-1] == (60.0, 60.0 * (3000 - 207))
    assert len(page_of(tmp_path / "run", tmp_path).encode()) < MOST_BYTES


def test_a_comparison_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rows = list(zip(x, x.sum(dim=1, keepdim=True), strict=True))
    arms = {"adamw": Arm("adamw_torch", grid(full=(0.03,)), basis="none"), "sl2o": Arm("sl2o", grid(std=(1.0,)))}
    Comparison(
        torch.nn.Linear(6, 1),
        training_arguments("out", max_steps=6, eval_steps=3, logging_steps=3, use_cpu=True, disable_tqdm=True),
        ComparisonArguments(dim=3, trajectory_steps=10, snapshots=10, seeds=1, rule="default", quick_grid=True),
        train_dataset=rows[:32], eval_dataset=rows[32:], arms=arms,
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    ).run()  # fmt: skip
    report = report_on("out")
    assert report.title == "out" and [curve.name for curve in figure(report, "Distance from").curves] == ["SL2O"]
    (checkpoint,) = Path("out/sl2o").glob("checkpoint-*")
    saved = load_file(checkpoint / "coefficients.safetensors")["coefficients"]
    dots = figure(report, "Coefficients at step 6, SL2O")
    assert dots.dots and [value for _, value in dots.curves[0].points] == saved.tolist()
    assert "11 snapshots" in texts(report) and figure(report, "Explained variance, cumulated")
    assert "Cost, paid once" in [section.title for section in report.sections]
    Tags(page_of("out", tmp_path))


def test_scores_of_generated_sentences(tmp_path):
    data = load_json(E2E)
    runs = {"sl2o": [{"seed": 1, "bleu": 0.5, "meteor": None}, {"seed": 2, "bleu": 0.7, "meteor": 0.4}]}
    runs["adamw"] = [{"seed": 1, "bleu": 0.6, "meteor": 0.3}, {"seed": 2, "diverged": True}]
    data["generation"] = {"validation": {"meanings": 547, "runs": runs}}
    save_json(tmp_path / "comparison.json", data)
    section = next(part for part in report_on(tmp_path).sections if part.title == "Generated sentences")
    said, table = section.parts
    assert said.startswith("validation: 547 meanings")
    assert list(table.heads) == ["arm", "bleu", "meteor", "a seed diverged"]
    # a mean over some of the seeds would flatter an arm
    assert table.rows == [["SL2O", "0.6000 (0.5000 to 0.7000)", "-", "no"], ["AdamW", "-", "-", "yes"]]


def test_a_meta_training(tmp_path):
    def batches(seed):
        generator = torch.Generator().manual_seed(seed + 1)
        while True:
            yield torch.randn(8, 4, generator=generator)

    def build():
        torch.manual_seed(0)
        return torch.nn.Linear(4, 2)

    basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), 5)
    loss = lambda model, batch: (model(batch) - batch[:, :2]).square().mean()  # noqa: E731
    task = Task("<counting>", build, batches, loss, basis, eval_batches=[next(batches(99))])
    settings = MetaTrainingArguments(
        str(tmp_path / "rule"), inner_steps=8, unroll_length=4, meta_epochs=3, episodes_per_task=2, disable_tqdm=True
    )
    MetaTrainer(LSTMRule(RuleConfig()), settings, [task]).train()
    report, log = report_on(tmp_path / "rule"), load_json(tmp_path / "rule" / "log.json")
    assert report.kind == "a meta-training"
    scores = [(entry["meta_epoch"], entry["score"]) for entry in log if "score" in entry]
    assert figure(report, "Score").curves[0].points == scores
    ends = figure(report, "Training loss at the end").curves[0]
    first = [entry["last_loss"] for entry in log if entry.get("task") and entry["meta_epoch"] == 0]
    assert len(first) == 2 and ends.points[0] == (0, pytest.approx(sum(first) / 2))
    assert (ends.low[0], ends.high[0]) == (min(first), max(first))
    assert "&lt;counting&gt;" in page_of(tmp_path / "rule", tmp_path)


def test_the_best_score_is_a_number(tmp_path):
    log = [{"meta_epoch": i, "score": score} for i, score in enumerate((math.nan, 0.7, math.inf, 0.5))]
    save_json(tmp_path / "log.json", log)
    assert texts(report_on(tmp_path)).startswith("Best score 0.5, of the rule after 3 meta-epochs of 3.")


# Names from files are text


def test_names_from_a_file_are_never_markup(tmp_path):
    evil = '"><script>fetch("//evil")</script><img src=x onerror=alert(1)>'
    data = load_json(E2E)
    data["runs"] = {evil: data["runs"]["sl2o"], "adamw": data["runs"]["adamw"]}
    data["steps_to"] = {evil: data["steps_to"]["adamw_whitened_final"]}
    data["recipe"] = {evil: evil, "list": [evil]}
    data["environment"] = {"device": evil, "lone": "\ud800"}
    data["amortised"] = {"unit": evil, "total": 5, "rules": {evil: 3}, "seconds": {evil: 1.0}}
    (tmp_path / "evil.json").write_text(json.dumps(data))
    text = page_of(tmp_path / "evil.json", tmp_path)
    tags = Tags(text)
    assert tags.open == [] and not tags.names & {"script", "img", "iframe", "link", "object", "a", "form"}
    assert not {name for name in tags.attributes if name.startswith("on")} | (tags.attributes & {"src", "href"})
    assert text.count("&lt;script&gt;") > 5
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "script" in Tags(text.replace("&lt;script&gt;", "<script>").replace("&lt;/script&gt;", "</script>")).names


def test_an_arm_that_is_a_path_is_not_followed(tmp_path, trained):
    folder = tmp_path / "comparison"
    folder.mkdir()
    data = load_json(E2E)
    shutil.copytree(trained[0], tmp_path / "outside")
    shutil.copytree(trained[0], folder / "inside")
    run = data["runs"]["sl2o"]
    data["runs"] = {"../outside": run, str(tmp_path / "outside"): run, "..": run, "inside": run}
    save_json(folder / "comparison.json", data)
    found = [part for part in report_on(folder).figures() if part.title.startswith("Distance")]
    assert [curve.name for curve in found[0].curves] == ["inside"]


# Size


def test_a_large_log_stays_below_a_megabyte_and_says_what_was_left_out(tmp_path):
    generator = torch.Generator().manual_seed(0)
    curve = [[step, float(torch.rand((), generator=generator)) + 1] for step in range(1200)]
    run = {"eval_per_seed": [curve], "train_loss": curve, "learning_rate": 1.0, "seconds": 1.0}
    runs = {f"arm_{index}": copy.copy(run) for index in range(40)}
    (tmp_path / "large.json").write_text(json.dumps({"runs": runs, "steps_to": {"end": {"target": 1.1}}}))
    text = page_of(tmp_path / "large.json", tmp_path)
    assert 100_000 < len(text.encode()) < MOST_BYTES and "8 further arms are not shown" in text
    assert re.search(r"Of 1,200 points at most \d+ are drawn", text)


def test_many_figures_are_drawn_with_fewer_points_and_too_many_are_refused():
    points = [(float(step), math.sin(step)) for step in range(240)]
    chart = Chart("sine", "step", "y", [Curve(f"{index}", points, style=index) for index in range(32)])
    one, many = (page(Report("a run", "t", [Section("s", [chart] * count)]), "made") for count in (1, 12))
    assert "points at most" not in one and "Of 240 points at most 80 are drawn" in many
    assert len(many.encode()) < MOST_BYTES < 12 * len(one.encode())
    bars = Section("s", [Bars("title", "steps", [Bar("arm", 1.0)])] * 2500)
    with pytest.raises(ValueError, match="2500 figures and takes more than 1,000,000 bytes"):
        page(Report("a run", "t", [bars]), "made")


# What is refused


def test_what_is_no_output_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        report_on(tmp_path / "nothing")
    (tmp_path / "some.txt").touch()
    with pytest.raises(ValueError, match=r"holds some.txt; expected comparison.json \(a comparison\)"):
        report_on(tmp_path)
    rule = ROOT / "hf_sl2o" / "rules" / "shipped" / "default"
    with pytest.raises(ValueError, match="expected comparison.json"):
        report_on(rule)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("runs",), [], "has 'runs': \\[\\], expected an object"),
        (("runs", "sl2o", "eval_per_seed"), [[[0, "1"]]], "'eval_per_seed'\\[0\\] has the entry \\[0, '1'\\]"),
        (("runs", "sl2o", "eval_per_seed"), [[[10, 1.0], [5, 1.0]]], "has the step 5 after"),
        (("runs", "sl2o", "train_loss"), 5, "'train_loss' is 5, expected a list"),
        (("steps_to", "adamw_whitened_final"), {"target": "low"}, "'adamw_whitened_final'.*expected its 'target'"),
        (("amortised",), 7, "'amortised': 7, expected an object"),
    ],
)
def test_a_wrong_comparison_is_named(tmp_path, place, value, said):
    data = load_json(E2E)
    where = data
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    save_json(tmp_path / "comparison.json", data)
    with pytest.raises(ValueError, match=said):
        report_on(tmp_path)


@pytest.mark.parametrize("value", [10**400, -(10**400), 1.7e308, math.inf], ids=["int", "-int", "float", "inf"])
def test_no_number_is_too_large_for_a_page(tmp_path, value):
    run = {"eval": [[0, 1.0], [10, -1.7e308], [20, value]], "learning_rate": value, "state_bytes": value}
    data = {"runs": {"adamw": run}, "steps_to": {}, "recipe": {"seed": value}}
    path = tmp_path / "large.json"
    path.write_text(json.dumps(data))
    if isinstance(value, int):  # no float holds it
        with pytest.raises(ValueError, match=r"has the entry \[20, -?10+"):
            report_on(path)
        run["eval"].pop()
        path.write_text(json.dumps(data))
    Tags(page_of(path, tmp_path))
    assert figure(report_on(path), "Validation loss").curves[0].points == [tuple(pair) for pair in run["eval"]]


# The command


def told(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, words))))


def test_the_command_writes_the_page_and_the_figures(tmp_path):
    path = tmp_path / "e2e.json"
    shutil.copy(E2E, path)
    facts, text = told(path, "--png", tmp_path / "figures")
    assert facts["page"] == str(tmp_path / "e2e.html") and Path(facts["page"]).stat().st_size == facts["bytes"]
    assert json.loads(json.dumps(facts)) == facts and "7 figures" in text
    from matplotlib import image

    made = sorted((tmp_path / "figures").iterdir())
    assert [str(file) for file in made] == facts["png"] and len(made) == len(facts["figures"]) == 7
    for file in made:
        pixels = image.imread(file)[..., :3]
        red = (abs(pixels - torch.tensor([0xC2, 0x41, 0x0C]).numpy() / 255) < 0.02).all(axis=-1)
        assert red.sum() > 100, file  # that of SL2O
    held = report_on(path).figures()
    assert sum(isinstance(part, Bars) for part in held) == 2


def test_the_command_refuses_and_leaves_what_is_there(tmp_path, monkeypatch):
    mine = tmp_path / "report.html"
    mine.write_text("mine")
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        told(tmp_path)
    assert mine.read_text() == "mine"
    with pytest.raises(ValueError, match="this is a folder"):
        told(E2E, "--page", tmp_path)
    with pytest.raises(ValueError, match="there is no folder or file"):
        told(tmp_path / "nothing")
    results = tmp_path / "results.json"
    shutil.copy(E2E, results)
    with pytest.raises(ValueError, match="this file is there and no page, and is not overwritten; give NAME.html"):
        told(results, "--page", results)
    with pytest.raises(ValueError, match="this is a file; give a folder"):
        told(results, "--png", results)
    with pytest.raises(ValueError, match="nothing can be written into .*results.json; give another file"):
        told(results, "--page", results / "page.html")
    assert results.read_bytes() == E2E.read_bytes() and not (tmp_path / "results.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="page.html is written, and no PNG: .*pip install"):
        told(E2E, "--page", tmp_path / "page.html", "--png", tmp_path / "png")
    assert (tmp_path / "page.html").is_file()
    with pytest.raises(ImportError):
        write_figures(report_on(E2E), tmp_path / "png")
