"""`hf-sl2o meta-train` and `compare`: the same as from Python, settings from a file, refusals before any work."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from hf_sl2o import FirstOrder, LearnedOptimizer, MetaTrainer, MetaTrainingArguments, Rule, train_on
from hf_sl2o.cli import main
from hf_sl2o.commands import meta_train
from hf_sl2o.commands.settings import read_settings
from hf_sl2o.experiments.plans import PLANS
from hf_sl2o.experiments.tasks import problem, problems
from hf_sl2o.experiments.tasks.named import named_task
from hf_sl2o.rules import load_rule

QUICK = ("--tasks", "tiny", "--meta-epochs", "2", "--inner-steps", "20", "--eval-every", "1", "--use-cpu")


def small(data):
    """Least squares in 60 numbers: 60 steps of AdamW take a tenth of a second."""
    truth = torch.linspace(-1, 1, 60) * (1.0 if data == "embedded" else 10.0)

    def batches(part, seed):
        generator = torch.Generator().manual_seed(seed % 2**31)
        while True:
            x = torch.randn(16, 60, generator=generator)
            yield x, x @ truth + 0.1 * torch.randn(16, generator=generator)

    def loss(model, batch):
        return (model(batch[0]).squeeze(1) - batch[1]).square().mean()

    held_out = [next(batches("all", 7))]
    build = problem.seeded(lambda: torch.nn.Linear(60, 1, bias=False))
    return problem.Problem(build, batches, loss, lambda part: held_out, 0.03, 60)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(problems.PROBLEMS, "tiny", small)


def printed(capsys, *words):
    """Exit code, and what went to the two outputs."""
    code = main(list(map(str, words)))
    out = capsys.readouterr()
    return code, out.out, out.err


def as_json(capsys, *words):
    code, out, err = printed(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def said(capsys, *words):
    """The line of a refusal; nothing was printed or made before it."""
    code, out, err = printed(capsys, *words)
    assert code == 2 and not out and err.startswith("hf-sl2o: ") and err.count("\n") == 1, (code, out, err)
    assert not Path("out").exists()
    return err


# meta-train


def test_meta_train_is_the_trainer_of_python(capsys):
    facts = as_json(capsys, "meta-train", "out", *QUICK)
    torch.manual_seed(0)
    rule = Rule.from_config(PLANS["default"].config)
    args = MetaTrainingArguments("same", meta_epochs=2, inner_steps=20, eval_every=1, use_cpu=True, disable_tqdm=True)
    MetaTrainer(rule, args, [named_task("tiny", "embedded", Path("tasks"))], estimator=FirstOrder()).train()
    assert facts["fingerprint"] == rule.fingerprint == Rule.from_pretrained("out").fingerprint
    assert facts["finished"] and facts["meta_steps"] == 4 and len(facts["validation"]) == 3
    assert facts["best_score"] == min(entry["score"] for entry in facts["validation"])
    made = json.loads(Path("out/provenance.json").read_text())
    assert made["tasks"] == ["tiny"] and made["settings"]["inner_steps"] == 20 and "seconds" not in made
    # the same command has nothing to do; another one is refused
    code, text, _ = printed(capsys, "meta-train", "out", *QUICK)
    assert code == 0 and Rule.from_pretrained("out").fingerprint == rule.fingerprint
    assert text.startswith("out: a rule of 4 meta-steps, after ") and re.search(r"  tiny  1\d\.\d+ -> \d\.\d+\n", text)
    code, _, err = printed(capsys, "meta-train", "out", *QUICK, "--seed", "1")
    assert code == 2 and "was made with other settings" in err.splitlines()[-1]


def test_meta_train_goes_on_and_begins_at_a_rule(capsys):
    words = ("meta-train", "out", *QUICK, "--rule", "paper-cnn")
    stopped = as_json(capsys, *words, "--max-seconds", "0")
    assert not stopped["finished"] and stopped["meta_steps"] < 4
    code, text, _ = printed(capsys, *words, "--max-seconds", "0")
    assert code == 0 and "the same command goes on" in text
    done = as_json(capsys, *words)
    assert done["finished"] and done["meta_steps"] == 4
    assert done["fingerprint"] != load_rule("paper-cnn", with_basis=True).fingerprint
    assert done["rule"] == json.loads(json.dumps(dataclasses.asdict(load_rule("paper-cnn", with_basis=True).config)))


def test_settings_come_from_a_file_and_the_command_line_goes_first(capsys):
    Path("settings.yaml").write_text(
        "tasks: [tiny]\nmeta-epochs: 3\ninner_steps: 20\nmeta_learning_rate: 1e-3\ncurriculum: [20, 40]\n"
        "use_cpu: true\nestimator: pes\n"
    )
    facts = as_json(capsys, "meta-train", "out", "--config", "settings.yaml", "--meta-epochs", "1")
    used = facts["settings"]
    assert (used["meta_epochs"], used["inner_steps"], used["meta_learning_rate"]) == (1, 20, 1e-3)
    assert used["curriculum"] == [20, 40] and facts["estimator"].startswith("PES(")
    Path("same.json").write_text(json.dumps({"a": 1e-3, "b-c": [1]}))
    assert read_settings(Path("same.json"), ["a", "b_c"]) == {"a": 1e-3, "b_c": [1]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta_epoch: 3\n", r"a setting in settings\.yaml is 'meta_epoch', .*; did you mean 'meta_epochs'\?"),
        ("meta_epochs: 3\nmeta_epochs: 4\n", "the key 'meta_epochs' is there twice"),
        ("meta_epochs: 3\nmeta-epochs: 4\n", "sets a name twice, once with - and once with _"),
        ("- a\n", "holds a list, expected `name: value` lines"),
        ("a: [\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not determine a constructor"),
        ("meta_epochs: three\n", "meta_epochs is 'three', expected an integer"),
        ("meta_epochs: 1.5\n", "meta_epochs is 1.5, expected an integer"),
        ("meta_learning_rate: .nan\n", "meta_learning_rate is nan, expected a finite number above 0"),
        ("use_cpu: 1\n", "use_cpu is 1, expected True or False"),
        ("tasks: tiny\n", "--tasks is 'tiny', expected a list of at least one name"),
        ("tasks: [tiny, tiny]\n", "--tasks has 'tiny' twice"),
        ("meta_loss: summ\n", r"--meta-loss is 'summ', expected one of sum, log; did you mean 'sum'\?"),
        ("1: 2\n", "the key 1 is no name"),
    ],
)
def test_a_bad_file_of_settings_is_refused(capsys, text, expected):
    Path("settings.yaml").write_text(text)
    assert re.search(expected, said(capsys, "meta-train", "out", "--config", "settings.yaml"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "none.yaml"], r"--config is none\.yaml, which is not there; give a \.yaml or \.json file"),
        (["--tasks", "quadratics"], r"there is no task 'quadratics', .*; did you mean 'quadratic'\?"),
        (["--tasks", "digits-mpl-lora4"], r"did you mean 'digits-mlp'\?"),
        (["--tasks", "quadratic-lora4"], "'quadratic' cannot be adapted by LoRA"),
        (["--rule", "defalt"], "defalt"),
        (["--rule", "default", "--preset", "default"], "--rule and --preset both say where to begin"),
        (["--preset", "defaults"], r"did you mean 'default'\?"),
        (["--estimator", "first-ordr"], r"did you mean 'first-order'\?"),
        (["--inner-steps", "5", "--unroll-length", "10"], "inner_steps 5 is below unroll_length 10"),
        (["--meta-epochs", "0"], "must be at least 1"),
        (["--unrol-length", "10"], r"did you mean '--unroll-length'\?"),
        (["--data", "/nothing/there", "--tasks", "cifar-vit"], "nothing"),
    ],
)
def test_meta_train_refuses_before_any_work(capsys, words, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(expected, said(capsys, "meta-train", "out", *words))


def test_the_rule_fits_the_tasks(capsys):
    words = ("--meta-epochs", "1", "--inner-steps", "20", "--use-cpu")
    facts = as_json(capsys, "meta-train", "lora", "--tasks", "tiny-full", *words)
    assert facts["rule"]["per_tensor"] and facts["estimator"].startswith("PES(")
    facts = as_json(capsys, "meta-train", "basis", "--tasks", "tiny", *words)
    assert not facts["rule"]["per_tensor"] and facts["estimator"].startswith("FirstOrder(")
    assert "some of coefficients and some of LoRA factors" in said(
        capsys, "meta-train", "out", "--tasks", "tiny", "tiny-full"
    )


def test_meta_train_leaves_other_folders_alone(capsys):
    load_rule("default", with_basis=True).save_pretrained("mine")
    Path("file").write_text("x")
    before = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    assert "OUTPUT is mine, which holds" in said(capsys, "meta-train", "mine", *QUICK)
    assert "OUTPUT is file, a file" in said(capsys, "meta-train", "file", *QUICK)
    assert {path.name: path.read_bytes() for path in Path("mine").iterdir()} == before


def test_meta_train_goes_on_only_as_it_began(capsys, tmp_path):
    words = ("meta-train", "made", "--tasks", "tiny-full", "--meta-epochs", "1", "--inner-steps", "20", "--use-cpu")
    made = as_json(capsys, *words)
    before = {path: path.read_bytes() for path in Path("made").rglob("*") if path.is_file()}
    err = said(capsys, *words, "--data", tmp_path)
    assert "made, where a meta-training began with data 'embedded', and this one has 'folder-" in err
    assert str(tmp_path) not in err
    Rule.from_config(load_rule("default-lora", with_basis=False).config).save_pretrained("other")
    assert "began with rule 'preset-default-lora', and this one has" in said(capsys, *words, "--rule", "other")
    assert {path: path.read_bytes() for path in Path("made").rglob("*") if path.is_file()} == before
    assert as_json(capsys, *words)["fingerprint"] == made["fingerprint"]
    (Path("made") / "tasks" / "begun.json").unlink()  # an earlier version wrote none
    assert as_json(capsys, *words)["fingerprint"] == made["fingerprint"]
    # a start that was ended before its first checkpoint binds nothing
    Path("new/tasks").mkdir(parents=True)
    Path("new/tasks/begun.json").write_text('{"data": "embedded", "rule": "other"}')
    assert as_json(capsys, words[0], "new", *words[2:])["fingerprint"] == made["fingerprint"]


@pytest.mark.parametrize("command", [("meta-train", *QUICK), ("compare", "--tasks", "tiny", "--steps", "10")])
def test_a_folder_of_something_else_is_left_alone(capsys, command):
    name, *words = command
    results = {"comparison.json": '{"recipe": {}, "runs": {"adamw": {}}}', "comparison.png": "mine"}
    project = {"main.py": "mine", "config.json": "{}", "tasks/a": "mine", "runs/a": "mine"}
    for folder, files in {"results": results, "project": project}.items():
        for file, text in files.items():
            path = Path(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        err = said(capsys, name, folder, *words)
        assert re.search(rf"OUTPUT is {folder}, which holds 'com?.*' and no .* that could go on; give a new", err)
        found = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
        assert {file: path.read_text() for file, path in found.items()} == files


def test_every_setting_of_meta_training_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["meta-train", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(MetaTrainingArguments):
        flag = re.escape(f"--{field.name.replace('_', '-')} ")
        assert bool(re.search(flag, text)) == (field.name not in meta_train._NOT_OFFERED), field.name


# compare


def test_compare_is_the_runs_of_python(capsys):
    words = ("compare", "out", "--tasks", "tiny", "--steps", "20", "--seeds", "2", "--arms", "subspace_sgd")
    facts = as_json(capsys, *words)
    runs, saved = facts["tasks"]["tiny"]["runs"], json.loads(Path("out/comparison.json").read_text())
    assert set(runs) == {"sl2o", "sl2o_last", "subspace_sgd"} and saved["tasks"] == facts["tasks"]
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    task, rule = named_task("tiny", "embedded", Path("tasks")), load_rule("default", with_basis=True)
    losses = [
        train_on(task, lambda c: LearnedOptimizer(c, rule, lr=1.0, total_steps=20), 20, seed=seed, schedule="linear",
                 evaluate_at=(20,))["eval"][0][1]
        for seed in range(2)
    ]  # fmt: skip
    assert runs["sl2o_last"]["final_eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert facts["tasks"]["tiny"]["rule"]["fingerprint"] == rule.fingerprint
    # again: nothing is trained, and the text is a table
    kept = {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("*.json")}
    code, text, err = printed(capsys, *words)
    assert code == 0 and "tiny" in err and {p: p.stat().st_mtime_ns for p in Path("out/runs").rglob("*.json")} == kept
    lines = text.splitlines()
    assert lines[0] == "tiny: 40 coordinates" and lines[1].endswith("steps to subspace_sgd")
    assert {line.split()[0] for line in lines[2:5]} == set(runs)
    order = [line.split()[0] for line in lines[2:5]]
    assert order == sorted(runs, key=lambda arm: runs[arm]["final_eval_loss"])
    assert re.fullmatch(r"out/comparison\.json and comparison\.png, after .*\.", lines[-1])
    # another rule runs its own arm alone
    as_json(capsys, *words, "--rule", "paper-cnn")
    new = {path.name for path in Path("out/runs").rglob("*.json")} - {path.name for path in kept}
    assert new and all(name.startswith("rule-") for name in new)


def test_compare_of_all_weights_takes_the_other_rule(capsys):
    words = ("compare", "out", "--tasks", "tiny-full", "--steps", "10", "--seeds", "1", "--arms", "adamw_2e-4")
    facts = as_json(capsys, *words)
    (entry,) = facts["tasks"].values()
    assert entry["rule"]["fingerprint"] == load_rule("default-lora", with_basis=False).fingerprint
    assert entry["runs"]["adamw_2e-4"]["learning_rate"] == 2e-4


def test_other_data_are_other_runs(capsys, tmp_path):
    """A task of all weights has one basis whatever its data."""
    words = ("compare", "out", "--tasks", "tiny-full", "--steps", "10", "--seeds", "1", "--arms", "adamw_2e-4")
    losses = [
        as_json(capsys, *words, *data)["tasks"]["tiny-full"]["runs"]["sl2o"]["final_eval_loss"]
        for data in ((), ("--data", tmp_path), ())
    ]
    assert losses[1] > 20 * losses[0] and losses[2] == losses[0]


def test_a_rule_that_diverges_is_said_in_a_sentence(capsys):
    config = dataclasses.replace(load_rule("default-lora", with_basis=False).config, output_scale=1e25)
    Rule.from_config(config).save_pretrained("wild")
    words = ("compare", "out", "--tasks", "tiny-full", "--steps", "30", "--seeds", "1", "--arms", "adamw_2e-4")
    code, out, err = printed(capsys, *words, "--rule", "wild")
    assert code == 1 and not out
    assert err.splitlines()[-1].startswith("hf-sl2o compare failed: sl2o diverged on tiny-full; give another rule")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "digits-mpl"], r"did you mean 'digits-mlp'\?"),
        (["--steps", "0"], "--steps is 0, expected an integer from 1"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--tasks", "tiny-full", "--rule", "no-such"], "no-such"),
        (["--tasks", "tiny-full", "--arms", "adam"], r"an arm of .* is 'adam', .*; did you mean 'adamw'\?"),
        (["--tasks", "tiny-full", "--arms", "sl2o"], "the rule runs always; name what it is compared with"),
    ],
)
def test_compare_refuses_before_any_run(capsys, words, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(expected, said(capsys, "compare", "out", *words))
